"""LocalEngine against plain PyTorch, written out."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import SETS, examples, llama_anatomy, micro_batches, phase_of, recipe_of, tiny_llama, train_steps
from torch.utils.flop_counter import FlopCounterMode

from dsfreeze.engine.local import LocalEngine
from dsfreeze.errors import UserError
from dsfreeze.plan import Phase


def make(choice, **train):
    model = tiny_llama()
    anatomy = llama_anatomy(model)
    engine = LocalEngine(model, anatomy, recipe_of("local", **train))
    engine.enter(phase_of(anatomy, choice))
    return engine


def plain_loop(choice, steps, *, clip=0.0, decay=0.0, accumulation=1):
    """The oracle: torch.optim.AdamW with two groups, torch's clipping, the loss as cross entropy summed over terms."""
    model = tiny_llama()
    names = set(phase_of(llama_anatomy(model), choice).trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    trained = {n: p for n, p in model.named_parameters() if n in names}
    spared = [p for n, p in trained.items() if "norm" in n]
    others = [p for n, p in trained.items() if "norm" not in n]
    groups = [{"params": others, "weight_decay": decay}, {"params": spared, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-3)
    losses, norms = [], []
    for step in range(steps):
        batch = examples(step)
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), clip or math.inf)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - 0.02 * step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, dict(model.named_parameters())


@pytest.mark.parametrize(
    ("choice", "options"),
    [
        ("full", {}),
        ("bottom", {"weight_decay": 0.1}),
        ("top", {"max_grad_norm": 0.5}),
        ("interval", {"weight_decay": 0.1, "max_grad_norm": 0.5, "gradient_accumulation_steps": 2}),
    ],
)
def test_equals_a_plain_loop(choice, options):
    """Oracle: `plain_loop`, which sees the global batch at once."""
    engine = make(choice, **options)
    accumulation = options.get("gradient_accumulation_steps", 1)
    losses, norms = train_steps(engine, 0, 8, accumulation=accumulation)
    wanted, wanted_norms, weights = plain_loop(
        choice, 8, clip=options.get("max_grad_norm", 0.0), decay=options.get("weight_decay", 0.0)
    )
    assert losses == pytest.approx(wanted, abs=1e-5)
    assert norms == pytest.approx(wanted_norms, rel=1e-4)
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(parameter, weights[name], atol=1e-5, rtol=0)


def test_frozen_stays_frozen_to_the_bit_and_movement_says_so():
    """Oracle: the weights before; a frozen tensor is changed, a trained one put back by hand, and both named."""
    engine = make("bottom", weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    train_steps(engine, 0, 3)
    trained = set(phase_of(engine.anatomy, "bottom").trainable)
    assert {n for n, p in engine.module.named_parameters() if not torch.equal(p, before[n])} == trained
    assert engine.movement().frozen_changed == engine.movement().never_moved == ()
    parameters = dict(engine.module.named_parameters())
    parameters["model.layers.0.mlp.up_proj.weight"].data[3, 4] += 1e-6
    held = "model.layers.3.mlp.up_proj.weight"
    parameters[held].data.copy_(before[held])
    assert engine.movement().frozen_changed == ("model.layers.0.mlp.up_proj.weight",)
    assert engine.movement().never_moved == (held,)


def test_nothing_is_recorded_below_the_lowest_trainable_layer():
    """Oracle: whether what leaves a block has a graph: of 4 blocks, the two that train."""
    engine = make("bottom")
    outputs = {}
    for index, block in enumerate(engine.module.model.layers):
        block.register_forward_hook(lambda m, a, o, index=index: outputs.update({index: o}))
    batch, weight = micro_batches(examples(0), 0, 1, 1)[0]
    engine.forward_backward(batch, weight)
    assert [outputs[i].requires_grad for i in range(4)] == [False, False, True, True]
    assert all(p.grad is None for n, p in engine.module.named_parameters() if "layers.0" in n or "layers.1" in n)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_prefix_evaluates_and_the_rest_trains(checkpointing):
    """Oracle: the modes seen inside the forward pass, after somebody called train() and eval() on the whole module."""
    engine = make("bottom", gradient_checkpointing=checkpointing)
    seen = {}
    for name, module in engine.module.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: m.training}))
    engine.no_grad_forward({"input_ids": examples(0)["input_ids"]})
    assert not any(seen.values())
    engine.module.train()
    batch, weight = micro_batches(examples(0), 0, 1, 1)[0]
    engine.forward_backward(batch, weight)
    for index in range(4):
        assert seen[f"model.layers.{index}.mlp.down_proj"] is (index >= 2)
    assert not seen["model.embed_tokens"]
    assert seen["lm_head"]


def test_a_filler_adds_exactly_nothing():
    """Oracle: the run without it. The filler's labels are all -100, so its own mean loss is not a number."""
    engine, other = make("bottom", gradient_accumulation_steps=2), make("bottom")
    batch, weight = micro_batches(examples(0), 0, 1, 1)[0]
    filler = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], -100)}
    engine.forward_backward(batch, weight)
    assert engine.forward_backward(filler, 0.0) == 0.0
    other.forward_backward(batch, weight)
    assert engine.step(1e-2) == other.step(1e-2)
    for mine, theirs in zip(engine.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def lm8(checkpointing):
    model = tiny_llama(layers=8, hidden=128, vocab=64)
    anatomy = llama_anatomy(model)
    engine = LocalEngine(model, anatomy, recipe_of("local", gradient_checkpointing=checkpointing))
    engine.enter(phase_of(anatomy, ["layers.6", "layers.7"]))
    return engine


def backward_gigaflops(engine):
    batch = examples(0, count=4, length=128, vocab=64)
    outputs = engine.module(**batch, use_cache=False)
    with FlopCounterMode(display=False) as counter:
        outputs.loss.backward()
    return counter.get_total_flops() / 1e9


def test_checkpointing_starts_at_the_lowest_trainable_layer():
    """Oracle: 0.948 GF of backward and recomputation (transformers' own switch: 2.760; no checkpointing: 0.679), and
    the gradients without checkpointing."""
    engine, plain = lm8(True), lm8(False)
    engine._modes.train()
    plain._modes.train()
    assert backward_gigaflops(plain) < 0.70
    assert 0.90 < backward_gigaflops(engine) <= 0.96
    gradients = {n: p.grad for n, p in engine.module.named_parameters() if p.grad is not None}
    assert len(gradients) == 18
    for name, parameter in plain.module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_state_comes_back_and_training_goes_on_to_the_bit(bf16):
    """Oracle: the uninterrupted run."""
    whole = make("interval", bf16=bf16, weight_decay=0.1)
    train_steps(whole, 0, 3)
    state = whole.export_state()
    rest, _ = train_steps(whole, 3, 6)
    assert ("master" in next(iter(state.values()))) is bf16
    assert all(float(entry["step"]) == 3 for entry in state.values())
    resumed = make("interval", bf16=bf16, weight_decay=0.1)
    resumed.load_state(state)
    assert train_steps(resumed, 3, 6)[0] == rest
    for mine, theirs in zip(resumed.module.parameters(), whole.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_bf16_keeps_small_updates_in_the_masters():
    """Oracle: bf16's spacing near 1 is 4e-3: at 1e-5 a step the weight cannot move, and its master must."""
    engine = make("bottom", bf16=True)
    name = "model.norm.weight"
    for step in range(4):
        train_steps(engine, step, step + 1, lr=1e-5)
    entry = engine.export_state()[name]
    assert entry["weight"].dtype == torch.bfloat16
    assert entry["master"].dtype == torch.float32
    assert torch.equal(entry["weight"], torch.ones_like(entry["weight"]))
    assert 0 < (entry["master"] - 1).abs().max() < 1e-4
    assert engine.movement().never_moved == ()


@pytest.mark.parametrize(("bf16", "trainable", "frozen"), [(False, 12, 4), (True, 14, 2)])
def test_bytes_are_of_the_trained_tensors_alone(bf16, trainable, frozen):
    """Oracle: bytes per parameter: weight, master, two moments; plus the gradient between backward and step."""
    engine = make("bottom", bf16=bf16)
    numbers = {n: p.numel() for n, p in engine.module.named_parameters()}
    chosen = sum(numbers[n] for n in phase_of(engine.anatomy, "bottom").trainable)
    train_steps(engine, 0, 1)
    memory = engine.memory()
    held = memory.weights + memory.masters + memory.optimizer_state
    assert held == trainable * chosen + frozen * (sum(numbers.values()) - chosen)
    assert memory.gradients == 0
    batch, weight = micro_batches(examples(0), 0, 1, 1)[0]
    engine.forward_backward(batch, weight)
    assert engine.memory().gradients == (2 if bf16 else 4) * chosen
    assert engine.memory(reset_peak=True).peak >= engine.memory().allocated * 0.5


def test_groups_are_one_layer_each_split_by_decay_only_where_there_is_decay():
    """Oracle: the layers' own tensors."""
    engine = make("interval")
    assert [g.layer for g in engine.groups] == SETS["interval"]
    engine = make("interval", weight_decay=0.1)
    assert [(g.layer, g.weight_decay) for g in engine.groups] == [
        ("layers.0", 0.1), ("layers.0", 0.0), ("layers.2", 0.1), ("layers.2", 0.0), ("norm", 0.0), ("head", 0.1),
    ]  # fmt: skip
    assert all(("norm" in name) is (g.weight_decay == 0) for g in engine.groups for name in g.tensors)


class TestMistakes:
    def test_everything_frozen(self):
        model = tiny_llama()
        engine = LocalEngine(model, llama_anatomy(model), recipe_of("local"))
        with pytest.raises(UserError, match="every tensor is frozen"):
            engine.enter(Phase(0, None, ()))

    def test_unknown_tensor_names_the_nearest(self):
        model = tiny_llama()
        engine = LocalEngine(model, llama_anatomy(model), recipe_of("local"))
        with pytest.raises(UserError, match=r"Did you mean 'lm_head.weight'"):
            engine.enter(Phase(0, None, ("lm_haed.weight",)))

    def test_a_flag_flipped_by_hand(self):
        engine = make("bottom")
        engine.module.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        batch, weight = micro_batches(examples(0), 0, 1, 1)[0]
        with pytest.raises(UserError, match=r"model.layers.0.mlp.up_proj.weight .*behind the plan's back"):
            engine.forward_backward(batch, weight)

    def test_state_that_lacks_a_tensor(self):
        engine = make("bottom")
        state = engine.export_state()
        del state["lm_head.weight"]
        with pytest.raises(UserError, match=r"does not hold 'lm_head\.weight'"):
            make("bottom").load_state(state)

    def test_no_update_when_the_gradient_is_not_finite(self):
        engine = make("bottom")
        before = [p.detach().clone() for p in engine.module.parameters()]
        batch, _ = micro_batches(examples(0), 0, 1, 1)[0]
        engine.forward_backward(batch, math.inf)
        assert engine.step(1e-2) == math.inf
        for mine, theirs in zip(engine.module.parameters(), before, strict=True):
            assert torch.equal(mine, theirs)


def test_generates_greedily_and_trains_on():
    """Oracle: transformers' own greedy generation on an untouched copy."""
    engine = make("bottom")
    prompt = {"input_ids": examples(0)["input_ids"][:1], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    wanted = tiny_llama().generate(**prompt, do_sample=False, max_new_tokens=5)
    assert torch.equal(engine.generate(prompt, max_new_tokens=5), wanted)
    train_steps(engine, 0, 1)
    assert engine.movement().never_moved == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_equals_cpu(monkeypatch):
    """Oracle: the same run on the CPU."""
    on_gpu, _ = train_steps(make("bottom"), 0, 5)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    on_cpu, _ = train_steps(make("bottom"), 0, 5)
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)
