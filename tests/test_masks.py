"""Masks of elements: how they are made, and the local engine under them, against plain PyTorch."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from anatomies import gpt2
from masks_kit import ANATOMY, DOWN, HEAD, NORM, TRAIN, UP, Q, assert_held_back, local, masked_plan, plainly, run
from safetensors.torch import load_file, save_file
from tiny import phase_of, recipe_of, tiny_llama, train_steps
from tiny_runs import tiny_recipe

import dsfreeze.engine.masks as masks_module
import dsfreeze.job
from dsfreeze.anatomy import Anatomy, Layer, Tensor
from dsfreeze.checkpoint import find_checkpoint
from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.masks import Bits, make_masks
from dsfreeze.engine.process import build_engine
from dsfreeze.errors import UserError
from dsfreeze.files import sha256_of
from dsfreeze.loop import train
from dsfreeze.plan import Adapter, FreezePlan, Mask

# -- bits --------------------------------------------------------------------------------------------------------------


def test_bits_are_the_mask_they_were_made_of():
    """Oracle: the bool tensor itself, whole and cut anywhere."""
    mask = torch.rand(7, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    bits = Bits.of(mask)
    assert bits.packed.nbytes == 10
    assert bits.count == int(mask.sum())
    assert torch.equal(bits.whole(), mask)
    flat = mask.reshape(-1)
    for first in range(78):
        for last in range(first, 78):
            assert torch.equal(bits.between(first, last), flat[first:last])


def drawn(count, numel, seed=5):
    packed = masks_module._draw(count, numel, seed)
    return Bits(torch.from_numpy(packed), (numel,)).whole()


@pytest.mark.parametrize("numel", [1, 7, 8, 15, 64, 1001, 5000])
def test_as_many_are_drawn_as_asked(numel, monkeypatch):
    """Oracle: a full ordering of the keys, which `_draw` does without; in chunks of 8, or at once."""
    whole = np.concatenate(list(masks_module._keys(numel, 5)))
    order = np.argsort(whole, kind="stable")
    for count in {1, numel // 3 or 1, numel // 2 or 1, numel}:
        wanted = torch.zeros(numel, dtype=torch.bool)
        wanted[order[:count].copy()] = True
        assert torch.equal(drawn(count, numel), wanted)
        with monkeypatch.context() as patch:
            patch.setattr(masks_module, "CHUNK", 8)
            assert torch.equal(drawn(count, numel), wanted)


def test_equal_keys_are_taken_in_order(monkeypatch):
    """Oracle: arithmetic; with so few different keys hardly any element has one of its own."""
    monkeypatch.setattr(masks_module, "_keys", lambda numel, seed: iter([np.arange(numel, dtype=np.uint32) % 3]))
    assert drawn(5, 9).tolist() == [True, True, False, True, True, False, True, False, False]


def test_every_element_is_as_likely():
    """Oracle: the binomial's standard deviation, over 4000 seeds."""
    found = sum(drawn(10, 40, seed).double() for seed in range(4000)) / 4000
    assert found.mean() == pytest.approx(0.25)
    assert (found - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5


def test_the_draw_is_the_same_for_ever():
    """Oracle: what it was when this was written. Another draw would thaw what a resumed run held back."""
    plan = plan_of(Mask(UP, 3, share=3 / 2048, seed=42))
    (bits,) = make_masks(plan, ANATOMY).values()
    assert bits.whole().flatten().nonzero().flatten().tolist() == GOLDEN


GOLDEN = [824, 955, 1422]


def test_tensors_and_seeds_are_drawn_apart():
    """Oracle: two independent halves of 2048 agree in 1024 places, give or take 5 standard deviations of 23."""
    gate = UP.replace("up_proj", "gate_proj")
    one, other = make_masks(plan_of(*(Mask(n, 1024, share=0.5, seed=1) for n in (UP, gate))), ANATOMY).values()
    (third,) = make_masks(plan_of(Mask(UP, 1024, share=0.5, seed=2)), ANATOMY).values()
    for a, b in ((one, other), (one, third)):
        assert abs(int((a.whole() == b.whole()).sum()) - 1024) < 115


def test_rows_are_outputs_wherever_they_lie():
    """Oracle: GPT-2's fused matrix holds q, k and v as thirds of its columns, and of its bias; Llama's would as rows."""
    fused, bias = Tensor("c.weight", (4, 12), "qkv", fan_in_fan_out=True), Tensor("c.bias", (12,), "bias")
    rows = Tensor("r.weight", (12, 4), "qkv")
    anatomy = Anatomy("made", "gpt2", (Layer("layers.0", (fused, bias, rows), "c"),))
    block = ((0, 4), (8, 12))
    made = tuple(Mask(t.name, 8 * (t.numel // 12), rows=block) for t in (fused, bias, rows))
    plan = FreezePlan("made", (replace(PHASE, trainable=("c.weight", "c.bias", "r.weight")),), masks=made)
    bits = {name: each.whole() for name, each in make_masks(plan, anatomy).items()}
    kept = torch.tensor([True] * 4 + [False] * 4 + [True] * 4)
    assert torch.equal(bits["c.bias"], kept)
    assert torch.equal(bits["c.weight"], kept.expand(4, 12))
    assert torch.equal(bits["r.weight"], kept[:, None].expand(12, 4))
    assert any(t.fan_in_fan_out for t in gpt2().tensors)


# -- mistakes ----------------------------------------------------------------------------------------------------------

PHASE = phase_of(ANATOMY, "bottom")


def plan_of(*masks, **more):
    return FreezePlan("made", (PHASE,), masks=masks, **more)


def lora(*targets):
    return Adapter("lora", 2, 4.0, 0.0, targets)


LOWEST = "model.layers.0.mlp.up_proj.weight"
MISTAKES = [
    (plan_of(Mask("lm_haed.weight", 1, rows=((0, 1),))), r"model lacks.*Did you mean 'lm_head.weight'"),
    (plan_of(Mask(LOWEST, 32, rows=((0, 1),))), "never trains it"),
    (plan_of(Mask(UP, 32, rows=((0, 1),)), adapter=lora(UP)), "carries an adapter"),
    (plan_of(Mask(UP, 32)), "said by nothing"),
    (plan_of(Mask(UP, 32, rows=((0, 1),), share=0.5, seed=1)), "said by rows and share"),
    (plan_of(Mask(UP, 0, rows=((0, 1),))), "Train at least one"),
    (plan_of(Mask(UP, 9999, rows=((0, 1),))), "trains 9999 of 2048"),
    (plan_of(Mask(UP, 32, rows=((0, 1),)), Mask(UP, 64, rows=((1, 3),))), "two masks"),
    (plan_of(Mask(UP, 64, rows=((0, 1),))), "trains 32 elements, and the plan says 64"),
    (plan_of(Mask(UP, 64, rows=((63, 65),))), r"outputs \[\(63, 65\)\], and the tensor has 64"),
    (plan_of(Mask(UP, 64, rows=((3, 4), (3, 5)))), "apart from each other"),
    (plan_of(Mask(UP, 64, rows=((-1, 1),))), "the tensor has 64"),
    (plan_of(Mask(UP, 1024, share=0.6, seed=1)), "draws 1024 of 2048"),
    (plan_of(Mask(UP, 1024, share=0.5)), "a seed"),
]


@pytest.mark.parametrize(("plan", "message"), MISTAKES, ids=[m[:20] for _, m in MISTAKES])
def test_masks_that_cannot_be_kept_are_refused(plan, message):
    """Oracle: the message; before an engine is built."""
    with pytest.raises(UserError, match=message):
        build_engine(tiny_llama(), ANATOMY, recipe_of("local"), plan)


FILES = [
    ({DOWN: torch.ones(32, 64, dtype=torch.bool)}, {"sha256": "0" * 64}, "not those that the plan was made with"),
    ({UP: torch.ones(64, 32, dtype=torch.bool)}, {}, "has no mask of"),
    ({DOWN: torch.ones(64, 32, dtype=torch.bool)}, {}, r"shape \[64, 32\], and the tensor \[32, 64\]"),
    ({DOWN: torch.ones(32, 64)}, {}, "torch.float32 and not bool"),
    ({DOWN: torch.full((32, 64), 2, dtype=torch.uint8)}, {}, "uint8 of 0 and 1"),
    ({DOWN: torch.zeros(32, 64, dtype=torch.uint8)}, {}, "trains 0 elements, and the plan says 2048"),
]


@pytest.mark.parametrize(("content", "changes", "message"), FILES, ids=[m[:20] for *_, m in FILES])
def test_files_that_are_no_masks_are_refused(tmp_path, content, changes, message):
    """Oracle: the message."""
    file = tmp_path / "masks.safetensors"
    save_file(content, file)
    mask = Mask(DOWN, 2048, file=str(file), sha256=sha256_of(file))
    with pytest.raises(UserError, match=message):
        make_masks(plan_of(replace(mask, **changes)), ANATOMY)


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 64], ids=["missing", "empty", "garbage"])
def test_unreadable_files_are_refused(tmp_path, content):
    """Oracle: the message names the file; the digest is right wherever there is one."""
    file = tmp_path / "masks.safetensors"
    if content is not None:
        file.write_bytes(content)
    digest = sha256_of(file) if content is not None else "0" * 64
    with pytest.raises(UserError, match=r"masks\.safetensors cannot be read"):
        make_masks(plan_of(Mask(DOWN, 1, file=str(file), sha256=digest)), ANATOMY)


# -- the local engine --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("state", ["keep", "clear"])
def test_equals_a_plain_loop(tmp_path, state, bf16):
    """Oracle: `plainly`, with decay and clipping that bites, over refreezes; held elements to the bit."""
    plan = masked_plan(tmp_path, state=state)
    engine = local(plan, bf16=bf16)
    losses, norms = run(engine, plan)
    wanted, wanted_norms, weights = plainly(plan, bf16=bf16)
    close = 2e-3 if bf16 else 1e-6
    assert losses == pytest.approx(wanted, abs=close)
    assert norms == pytest.approx(wanted_norms, rel=1e-2 if bf16 else 1e-5)
    assert min(norms) > TRAIN["max_grad_norm"]
    got = dict(engine.module.named_parameters())
    for name, value in weights.items():
        torch.testing.assert_close(got[name].detach(), value, atol=1.6e-2 if bf16 else 1e-6, rtol=0)
    assert_held_back(plan, {n: p.detach() for n, p in got.items()})


def test_without_masks_the_same_elements_move(tmp_path):
    """What the tests of bit-identity could not tell apart, they would not test."""
    plan = masked_plan(tmp_path)
    engine = LocalEngine(tiny_llama(), ANATOMY, recipe_of("local", **TRAIN))
    run(engine, plan)
    with pytest.raises(AssertionError):
        assert_held_back(plan, dict(engine.module.named_parameters()))


def test_a_gradient_of_zero_is_not_enough(tmp_path):
    """Oracle: the start's bits, with moments from elsewhere that push every element, and gradients put in behind the hook."""
    plan = masked_plan(tmp_path)
    engine = local(plan)
    run(engine, plan, 0, 1)
    for entry in engine.optimizer.state.values():
        entry["exp_avg"].fill_(1.0)
    before = dict(engine.module.named_parameters())[NORM].detach().clone()
    run(engine, plan, 1, 3)
    weights = {n: p.detach() for n, p in engine.module.named_parameters()}
    trained = make_masks(plan, ANATOMY)[NORM].whole()
    assert torch.equal(weights[NORM][~trained], before[~trained])
    assert (weights[NORM] - before)[trained].abs().min() > 1e-3


def test_what_is_not_a_number_in_a_held_gradient_is_nobody_s(tmp_path):
    """Oracle: the finite norm of the rest."""
    plan = masked_plan(tmp_path)
    engine = local(plan)
    engine.enter(plan.phases[0])
    trained = make_masks(plan, ANATOMY)[HEAD].whole()
    parameter = dict(engine.module.named_parameters())[HEAD]
    spoilt = torch.where(trained, 1.0, torch.nan)
    (parameter * spoilt).sum().backward()
    assert torch.equal(parameter.grad, trained.float())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_state_comes_back_at_any_step(tmp_path, bf16):
    """Oracle: the uninterrupted run, to the bit."""
    plan = masked_plan(tmp_path, state="offload")
    whole = local(plan, bf16=bf16)
    run(whole, plan)
    for stop in (1, 3, 5, 7):
        engine = local(plan, bf16=bf16)
        run(engine, plan, 0, stop)
        state = engine.export_state()
        again = local(plan, bf16=bf16)
        again.enter(plan.phase_at(stop - 1))
        again.load_state(state)
        run(again, plan, stop)
        for mine, theirs in zip(again.module.parameters(), whole.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def test_movement_looks_at_each_half_of_a_masked_tensor(tmp_path):
    """Oracle: held elements of two tensors are changed by hand, and the trained ones of one of them put back."""
    plan = masked_plan(tmp_path)
    engine = local(plan)
    named = dict(engine.module.named_parameters())
    before = {n: p.detach().clone() for n, p in named.items()}
    engine.enter(plan.phases[0])
    train_steps(engine, 0, 2)
    named[Q].data[10, 3] += 1e-6  # between the blocks of rows
    held = ~make_masks(plan, ANATOMY)[UP].whole()
    named[UP].data.copy_(before[UP] + 1e-6 * held)
    assert engine.movement().frozen_changed == (Q, UP)
    assert engine.movement().never_moved == (UP,)
    assert engine.movement(frozen=False).frozen_changed == ()
    with pytest.raises(AssertionError, match=r"frozen tensors changed.*q_proj"):
        engine.enter(plan.phases[1])


def hooks_of(engine):
    optimizer = engine.optimizer
    on_step = len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)
    return on_step, sorted(n for n, p in engine.module.named_parameters() if p._backward_hooks)


def test_hooks_follow_what_trains_and_are_gone_after_close(tmp_path):
    """Oracle: the plan's masked tensors of each phase; none without masks."""
    plan = masked_plan(tmp_path)
    engine = local(plan)
    for phase in (*plan.phases, plan.phases[0]):
        engine.enter(phase)
        assert hooks_of(engine) == (2, sorted(set(plan.held_back) & set(phase.trainable)))
    engine.close()
    assert hooks_of(engine) == (0, [])
    bare = local(replace(plan, masks=()))
    bare.enter(plan.phases[0])
    assert hooks_of(bare) == (0, [])


def test_gradients_and_changes_are_of_trained_elements(tmp_path):
    """Oracle: the norm that the step reports; the distance from the start."""
    plan = masked_plan(tmp_path)
    engine = local(plan)
    engine.enter(plan.phases[0])
    start = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    engine.watch(gradients=True, changes=True)
    (norm,) = train_steps(engine, 0, 1)[1]
    assert sum(squared for _, squared in engine.gradients().values()) == pytest.approx(norm**2, rel=1e-5)
    trained = make_masks(plan, ANATOMY)[UP].whole()
    moved = dict(engine.module.named_parameters())[UP].detach() - start[UP]
    assert engine.changes()[UP][0] == pytest.approx(float(moved[trained].double().square().sum()))


# -- whole runs --------------------------------------------------------------------------------------------------------


def masked_run(tmp_path, monkeypatch, seed=3, **train_options):
    """A recipe whose plan holds back half of every matrix that it trains."""
    make_plan = dsfreeze.job.make_plan

    def masked(anatomy, options, num_steps, setting):
        plan = make_plan(anatomy, options, num_steps, setting)
        chosen = [anatomy.by_name[n] for n in sorted(plan.ever_trained)]
        return replace(
            plan, masks=tuple(Mask(t.name, t.numel // 2, share=0.5, seed=seed) for t in chosen if len(t.shape) == 2)
        )

    monkeypatch.setattr(dsfreeze.job, "make_plan", masked)
    options = {"save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1, **train_options}
    return tiny_recipe(tmp_path, train=options)


def test_a_masked_run_resumes_and_exports(tmp_path, monkeypatch):
    """Oracle: the uninterrupted run's weights to the bit, and the start model's where elements are held back."""
    summary = train(masked_run(tmp_path, monkeypatch))
    assert summary["never_moved"] == []
    run_folder, again = tmp_path / "run", tmp_path / "again"
    wanted = load_file(run_folder / "model" / "model.safetensors")
    base = load_file(tmp_path / "model" / "model.safetensors")
    plan = FreezePlan.from_json((run_folder / "model" / "dsfreeze_plan.json").read_text())
    assert plan.masks
    for mask in plan.masks:
        if mask.tensor in base:
            same = wanted[mask.tensor] == base[mask.tensor]
            assert int(same.sum()) >= mask.trained
            assert not same.all()
    checkpoint = find_checkpoint(run_folder, str(run_folder / "checkpoint-4"))
    assert json.loads((checkpoint.folder / "manifest.json").read_text())["plan"]["masks"]
    shutil.copytree(checkpoint.folder, again / "checkpoint-4")
    train(masked_run(tmp_path, monkeypatch, output_dir=str(again), resume_from_checkpoint=True))
    resumed = load_file(again / "model" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in wanted.items())


def test_another_mask_is_another_plan(tmp_path, monkeypatch):
    """Oracle: UserError, before the engine sees the state."""
    train(masked_run(tmp_path, monkeypatch, max_steps=4))
    monkeypatch.undo()
    with pytest.raises(UserError, match="plan"):
        train(masked_run(tmp_path, monkeypatch, seed=4, resume_from_checkpoint=True))
