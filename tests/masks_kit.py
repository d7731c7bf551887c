"""Plans whose tensors train in part, of the tiny Llama, and the same training in plain PyTorch."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import examples, llama_anatomy, recipe_of, tiny_llama, train_steps

from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.masks import make_masks
from dsfreeze.plan import FreezePlan, Mask, Phase

ANATOMY = llama_anatomy(tiny_llama())
#: what trains for three steps each: layers, and parts of them. layers.2's attention leaves and comes back, its MLP goes on, so that
#: in the end their step counts differ; layers.3 leaves, the head leaves and comes back
SETS = [["layers.2.", "layers.3.", "model.norm", "lm_head"], ["layers.0.", "layers.2.mlp"], ["layers.2.", "lm_head"]]
STEPS = 9
UP, DOWN, Q, OUT = (
    f"model.layers.2.{name}.weight" for name in ("mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj")
)
LOWER, NORM, HEAD = "model.layers.0.mlp.gate_proj.weight", "model.norm.weight", "lm_head.weight"
#: all that the rules of moving tensors are told apart by
TRAIN = {"weight_decay": 0.1, "max_grad_norm": 0.3, "adam_epsilon": 1e-2}


def written(file: Path) -> dict[str, torch.Tensor]:
    """Masks in a file, one of bool and one of uint8."""
    generator = torch.Generator().manual_seed(3)
    draw = {name: torch.rand(ANATOMY.by_name[name].shape, generator=generator) for name in (DOWN, OUT)}
    masks = {DOWN: draw[DOWN] < 0.7, OUT: (draw[OUT] < 0.2).to(torch.uint8)}
    save_file(masks, file)
    return masks


def masked_plan(folder: Path, **rule) -> FreezePlan:
    """Three phases; masks by rows, share and file, of matrices, of a gain, of the head."""
    file = folder / "masks.safetensors"
    masks = written(file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    numel = {name: ANATOMY.by_name[name].numel for name in (UP, LOWER, NORM, HEAD)}
    shares = {UP: 0.5, LOWER: 0.25, NORM: 0.5, HEAD: 0.3}
    made = (
        Mask(Q, 12 * 32, rows=((0, 4), (24, 32))),
        *(Mask(n, math.floor(s * numel[n]), share=s, seed=7) for n, s in shares.items()),
        *(Mask(n, int(m.sum()), file=str(file), sha256=sha) for n, m in masks.items()),
    )
    phases = tuple(
        Phase(3 * n, 3, tuple(t.name for t in ANATOMY.tensors if any(part in t.name for part in parts)))
        for n, parts in enumerate(SETS)
    )
    return FreezePlan("made", phases, masks=made, **rule)


def trained_elements(plan: FreezePlan) -> dict[str, torch.Tensor]:
    return {name: bits.whole() for name, bits in make_masks(plan, ANATOMY).items()}


def local(plan: FreezePlan, **train) -> LocalEngine:
    recipe = recipe_of("local", **{**TRAIN, **train})
    return LocalEngine(tiny_llama(), ANATOMY, recipe, state=plan.state, masks=make_masks(plan, ANATOMY))


def run(engine, plan, first=0, last=STEPS, accumulation=1):
    """Losses and gradient norms of the plan's steps; nothing frozen may have changed, and everything else must have moved."""
    losses, norms = [], []
    for step in range(first, last):
        engine.enter(plan.phase_at(step))
        loss, norm = train_steps(engine, step, step + 1, lr=5e-3, accumulation=accumulation)
        losses, norms = losses + loss, norms + norm
        if step + 1 == (plan.phase_at(step).end or STEPS):
            moved = engine.movement()
            assert moved.frozen_changed == moved.never_moved == ()
    return losses, norms


def plainly(plan: FreezePlan, *, bf16: bool = False, steps: int = STEPS):
    """The oracle: a master and a torch.optim.AdamW for each tensor, whose elements held back get no gradient and are put
    back after every step; losses, norms, weights."""
    model = tiny_llama()
    named = dict(model.named_parameters())
    for parameter in named.values() if bf16 else ():  # not the buffers: rotary frequencies stay fp32
        parameter.data = parameter.data.bfloat16()
    masters = {n: p.detach().float().clone().requires_grad_() for n, p in named.items()}
    start = {n: m.detach().clone() for n, m in masters.items()}
    decay = TRAIN["weight_decay"]
    optimizers = {
        n: torch.optim.AdamW([m], eps=1e-2, fused=True, weight_decay=0.0 if "norm" in n else decay) for n, m in masters.items()
    }  # fmt: skip
    trained, active, losses, norms = trained_elements(plan), (), [], []
    for step in range(steps):
        chosen = plan.phase_at(step).trainable
        for name in set(active) - set(chosen) if plan.state == "clear" else ():
            optimizers[name].state.clear()
        active = chosen
        model.zero_grad()
        loss = model(**examples(step), use_cache=False).loss.float()
        loss.backward()
        for name in active:
            masters[name].grad = named[name].grad.float() * trained.get(name, 1)
        norm = torch.nn.utils.clip_grad_norm_([masters[n] for n in active], TRAIN["max_grad_norm"])
        for name in active:
            optimizers[name].param_groups[0]["lr"] = 5e-3 * (1 - 0.02 * step)
            optimizers[name].step()
            if name in trained:
                masters[name].data.copy_(torch.where(trained[name], masters[name], start[name]))
            named[name].data.copy_(masters[name])
        losses.append(loss.item())
        norms.append(float(norm))
    return losses, norms, {n: p.detach() for n, p in named.items()}


def assert_held_back(plan: FreezePlan, weights) -> None:
    """The elements that do not train have the start's bits; the others have moved, nearly all of them."""
    start = dict(tiny_llama().named_parameters())
    for name, trained in trained_elements(plan).items():
        before, after = start[name].detach().to(weights[name].dtype), weights[name]
        assert torch.equal(after[~trained], before[~trained]), name
        assert not torch.equal(after[trained], before[trained]), name
