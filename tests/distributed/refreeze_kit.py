"""Plain DeepSpeed engines that change what trains, and the same training in one process of plain PyTorch."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny import config_of, examples, recipe_of, tiny_llama
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from dsfreeze.engine.ranks import read_ranks
from dsfreeze.engine.refreeze import refreeze

LR, WORLD_SIZE = 5e-3, 2
ADAM = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-2, "weight_decay": 0.1}


def names_of(*layers, also=()):
    """Tensors of tiny_llama's layers by number, and whatever else is named in part."""
    parts = [f".layers.{n}." for n in layers] + list(also)
    return [n for n, _ in tiny_llama().named_parameters() if any(part in n for part in parts)]


ALL = [n for n, _ in tiny_llama().named_parameters()]
ENDS = ("model.norm", "lm_head")
#: what trains from which step on
SCHEDULES = {
    "freeze": {0: ALL, 4: names_of(2, 3, also=ENDS), 8: names_of(3, also=ENDS)},
    "thaw": {0: names_of(3, also=ENDS), 4: names_of(2, 3, also=ENDS), 8: ALL},
    "rotate": {step: names_of((step // 3) % 4, (step // 3 + 2) % 4, also=("lm_head",)) for step in range(0, 30, 3)},
    "back and forth": {step: names_of(*((0, 1) if (step // 4) % 2 else (2, 3)), also=ENDS) for step in range(0, 30, 4)},
    "one layer": {step: names_of((step // 2) % 4) for step in range(0, 30, 2)},
    "through layers": {
        0: names_of(1, also=("0.self_attn.q", "0.mlp")), 3: names_of(1, also=("0.self_attn", "2.mlp.up")),
        6: names_of(3, also=("0.mlp", "1.self_attn.k", "2.mlp.up_proj", "lm_head")), 10: ALL, 13: names_of(0, 2),
        16: names_of(1, also=("0.self_attn.v", "norm")),
    },
}  # fmt: skip


#: for `Odd`: tensors without layer numbers, of one element, tied
SCHEDULES["odd"] = {
    0: ["embed.weight", "first.weight", "first.bias", "gate", "score.bias"], 2: ["score.bias"], 4: ["gate", "score.bias"],
    6: ["embed.weight", "norm.weight", "norm.bias"], 8: ["score.weight", "score.bias", "first.bias"],
    10: ["embed.weight", "first.weight", "first.bias", "gate", "norm.weight", "norm.bias", "score.weight", "score.bias"],
    12: ["gate"],
}  # fmt: skip


class Odd(nn.Module):
    """A tied head, buffers, parameters of the model itself, a bias of one element."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first = nn.Embedding(61, 6), nn.Linear(6, 6)
        self.gate = nn.Parameter(torch.ones(6))
        self.norm, self.score = nn.LayerNorm(6), nn.Linear(6, 1)
        self.head = nn.Linear(6, 61, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("share", torch.tensor(0.5))

    def forward(self, input_ids, labels, use_cache):
        self.seen += 1
        hidden = self.norm(torch.tanh(self.first(self.embed(input_ids))) * self.gate)
        logits = self.head(hidden) * (1 + self.share * self.score(hidden))
        return CausalLMOutput(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@dataclass
class Case:
    schedule: str
    zero: str = "zero2"
    rule: str = "keep"
    bf16: bool = False
    steps: int = 30
    clip: float = 0.0
    accumulation: int = 1
    drop_master: bool = False
    method: str = "auto"
    sections: dict = field(default_factory=dict)
    mixed_groups: bool = False
    fused: bool = False
    momentum: bool = False
    world_size: int = WORLD_SIZE

    @property
    def reduces_at_once(self):
        """Stages 2 and 3 average over ranks at every micro-step, 0 and 1 at the last: in bf16 that rounds otherwise."""
        return self.zero[4] in "23"

    def model(self):
        model = Odd() if self.schedule == "odd" else tiny_llama()
        return model.to(torch.bfloat16 if self.bf16 else torch.float32)

    def optimizer(self, groups, **more):
        if self.momentum:
            return torch.optim.SGD(groups, lr=0.05, momentum=0.9, dampening=0.5, weight_decay=0.1)
        return torch.optim.AdamW(groups, **{**ADAM, **more})


def make_engine(case, names):
    model = case.model()
    recipe = recipe_of(
        case.zero, bf16=case.bf16, max_grad_norm=case.clip, gradient_accumulation_steps=case.accumulation
    )
    config = config_of(recipe, dist.get_world_size(), **case.sections)
    named = dict(model.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(name in names)
    chosen = [named[n] for n in names]
    groups = (
        [{"params": chosen}]
        if case.mixed_groups
        else [{"params": [p for p in chosen if p.dim() > 1]}, {"params": [p for p in chosen if p.dim() == 1]}]
    )
    if case.mixed_groups is False:
        groups[1:] = [{**groups[1], "weight_decay": 0.0}] if groups[1]["params"] else []
    optimizer = case.optimizer(groups, fused=case.fused)
    rates = [group["lr"] for group in optimizer.param_groups]
    if case.zero == "zero0" and case.bf16:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if case.zero == "zero0" and case.bf16:
        optimizer.state.clear()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    return engine


def decay_of(case, value):
    return ADAM["weight_decay"] if case.mixed_groups or value.dim() > 1 else 0.0


def loss_of(module, step, rank, micro, case):
    """The mean loss over this rank's examples of a micro-batch."""
    batch = examples(step * case.accumulation + micro, count=2 * case.world_size)
    part = {k: v[rank * 2 : (rank + 1) * 2] for k, v in batch.items()}
    return module(**part, use_cache=False).loss


def full_weights(engine):
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if hasattr(parameter, "ds_tensor"):
            shares = [torch.empty_like(parameter.ds_tensor) for _ in range(dist.get_world_size())]
            dist.all_gather(shares, parameter.ds_tensor.data.contiguous())
            weights[name] = torch.cat(shares)[: parameter.ds_numel].view(parameter.ds_shape).clone()
        else:
            weights[name] = parameter.detach().clone()
    return weights


def run_deepspeed(case):
    """The weights after the case's steps, on this rank; frozen tensors are looked at after every phase."""
    schedule, rank = SCHEDULES[case.schedule], read_ranks().rank
    engine = make_engine(case, schedule[0])
    before, active = full_weights(engine), schedule[0]
    gc.freeze()  # stage 3 collects garbage at every refreeze: not all that is here already
    for step in range(case.steps):
        if step in schedule and step:
            now = full_weights(engine)
            moved = {n for n in now if not torch.equal(now[n], before[n])}
            # in bf16 a step may be too small to move a gain
            assert moved <= set(active) if case.bf16 else moved == set(active), (step, moved ^ set(active))
            before, active = now, schedule[step]
            engine = refreeze(engine, active, case.rule, drop_master=case.drop_master, method=case.method)
            assert {n for n, p in engine.module.named_parameters() if p.requires_grad} == set(active)
        for micro in range(case.accumulation):
            engine.backward(loss_of(engine, step, rank, micro, case))
            engine.step()
    return full_weights(engine)


def run_torch(case):
    """The oracle: one process, one AdamW per tensor, so that nothing is shared; a tensor that leaves loses its moments
    under `clear`, and its master too where it is dropped."""
    model = case.model()
    named = dict(model.named_parameters())
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
    optimizers = {n: case.optimizer([{"params": [m], "weight_decay": decay_of(case, m)}]) for n, m in masters.items()}
    schedule, active = SCHEDULES[case.schedule], []
    for step in range(case.steps):
        if step in schedule:
            for name in set(active) - set(schedule[step]) if case.rule == "clear" else ():
                optimizers[name].state.clear()
                if case.drop_master:
                    masters[name].data.copy_(named[name])
            active = schedule[step]
        gradients = {n: torch.zeros_like(named[n]) for n in active}
        local = [{n: torch.zeros_like(named[n]) for n in active} for _ in range(case.world_size)]
        for micro in range(case.accumulation):
            for p in named.values():
                p.grad = None
            for rank, sums in enumerate(local):
                loss = loss_of(model, step, rank, micro, case) / case.accumulation
                for name, share in zip(active, torch.autograd.grad(loss, [named[n] for n in active]), strict=True):
                    sums[name] += share
            if case.reduces_at_once or micro == case.accumulation - 1:
                for name in active:
                    gradients[name] += sum(sums[name] / case.world_size for sums in local)
                    for sums in local:
                        sums[name].zero_()
        wide = {n: g.float() for n, g in gradients.items()}
        if case.clip:
            norm = torch.sqrt(sum(g.double().pow(2).sum() for g in wide.values()))
            wide = {n: g * min(1.0, case.clip / (float(norm) + 1e-6)) for n, g in wide.items()}
        for name in active:
            masters[name].grad = wide[name]
            optimizers[name].step()
            named[name].data.copy_(masters[name])
    return {n: p.detach() for n, p in named.items()}


def worst(one, other):
    return max(float((one[n].float() - other[n].float()).abs().max()) for n in other)


def worst_ulps(one, other):
    """The largest difference of bf16 weights, in units of the last place of the reference (8 bits of mantissa)."""
    ulps = {n: torch.exp2(torch.frexp(w.float()).exponent.float() - 8) for n, w in other.items()}
    return max(float(((one[n].float() - other[n].float()).abs() / ulps[n]).max()) for n in other)
