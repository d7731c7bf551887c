"""Masks of elements on two gloo ranks, at every stage, against plain PyTorch."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forks import outcomes_of, run_ranks
from marks import some_fast
from masks_kit import ANATOMY, STEPS, TRAIN, assert_held_back, masked_plan, plainly, run
from tiny import config_of, recipe_of, tiny_llama
from zero_kit import SHARDED

from dsfreeze.engine.masks import make_masks
from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.engine.zero import ZeroEngine
from dsfreeze.errors import UserError

#: by stage, what one fork trains: layout, further zero_optimization keys, state rule, bf16
STAGES = {
    0: [("zero0", {}, "keep", False), ("zero0", {}, "keep", True)],
    1: [("zero1", {"round_robin_gradients": True}, "offload", False), ("zero1", {}, "keep", True)],
    2: [("zero2", {}, "keep", False), ("zero2_offload", {}, "clear", True)],
    3: [("zero3", SHARDED, "keep", False), ("zero3_offload", {"stage3_param_persistence_threshold": 1000, "sub_group_size": 3000}, "offload", True)],
}  # fmt: skip

#: in the last phase, when one layer's tensors have made different numbers of steps: loading regroups them
STOP = 7


def engine_on(case, plan):
    name, zero, _, bf16 = case
    recipe = recipe_of(name, bf16=bf16, **TRAIN)
    config = config_of(recipe, dist.get_world_size(), **zero)
    return ZeroEngine(tiny_llama(), ANATOMY, recipe, config, state=plan.state, masks=make_masks(plan, ANATOMY))


def everyones(state):
    values = [state]
    dist.broadcast_object_list(values)
    return values[0]


def hooked(engine):
    optimizer = engine.optimizer
    held = any(p._backward_hooks for p in engine.module.parameters())
    return bool(held or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def train_masked(cases, plans):
    """By case: losses, norms, weights; and what a run does that is resumed after `STOP` steps."""
    results = []
    with process_group(recipe_of()):
        for case in cases:
            plan = plans[case[2]]
            engine = engine_on(case, plan)
            first = run(engine, plan, 0, STOP)
            state = everyones(engine.export_state())
            rest = run(engine, plan, STOP)
            weights = engine.export_weights(t.name for t in ANATOMY.tensors)
            assert hooked(engine)
            engine.close()
            assert not hooked(engine)
            again = engine_on(case, plan)
            again.enter(plan.phase_at(STOP - 1))
            again.load_state(state)
            resumed = run(again, plan, STOP)
            reached = again.export_weights(t.name for t in ANATOMY.tensors)
            again.close()
            results.append(((first[0] + rest[0], first[1] + rest[1]), weights, resumed, reached))
    return results


@pytest.mark.parametrize("stage", some_fast(reversed(STAGES)))
def test_every_stage_equals_a_plain_loop(stage, tmp_path):
    """Oracle: `plainly`, over refreezes, with decay and clipping: fp32 to 1e-6, bf16 as the other tests of stages; elements held
    back to the bit; a resumed run to the bit."""
    plans = {rule: masked_plan(tmp_path, state=rule) for rule in ("keep", "offload", "clear")}
    leader, _ = run_ranks(train_masked, STAGES[stage], plans, timeout=120)
    for case, ((losses, norms), weights, resumed, reached) in zip(STAGES[stage], leader, strict=True):
        *_, rule, bf16 = case
        plan = plans[rule]
        wanted, wanted_norms, golden = plainly(plan, bf16=bf16)
        assert losses == pytest.approx(wanted, abs=5e-3 if bf16 else 2e-6), case
        assert norms == pytest.approx(wanted_norms, rel=0.1 if bf16 else 1e-5), case
        for name, value in golden.items():
            torch.testing.assert_close(
                weights[name].float(), value.float(), atol=1.6e-2 if bf16 else 1e-6, rtol=0, msg=f"{case} {name}"
            )
        assert_held_back(plan, weights)
        assert resumed[0] == losses[STOP:], case
        assert resumed[1] == pytest.approx(norms[STOP:], rel=1e-6), case  # at stage 0 added up in another order
        assert all(torch.equal(reached[name], value) for name, value in weights.items()), case
    assert len(losses) == STEPS


def train_in_parts(plan):
    """By stage: two micro-steps to a step, blocks recomputed in the backward pass."""
    results = {}
    with process_group(recipe_of()):
        for stage in ("zero0", "zero1", "zero2", "zero3"):
            recipe = recipe_of(stage, gradient_accumulation_steps=2, gradient_checkpointing=True, **TRAIN)
            config = config_of(recipe, dist.get_world_size())
            engine = ZeroEngine(tiny_llama(), ANATOMY, recipe, config, masks=make_masks(plan, ANATOMY))
            losses, norms = run(engine, plan, accumulation=2)
            results[stage] = losses, norms, engine.export_weights(t.name for t in ANATOMY.tensors)
            engine.close()
    return results


@pytest.mark.slow
def test_micro_steps_and_recomputing_change_nothing(tmp_path):
    """Oracle: `plainly`, which takes each step's examples in one pass and keeps its activations."""
    plan = masked_plan(tmp_path)
    leader, _ = run_ranks(train_in_parts, plan, timeout=120)
    wanted, wanted_norms, golden = plainly(plan)
    for stage, (losses, norms, weights) in leader.items():
        assert losses == pytest.approx(wanted, abs=2e-6), stage
        assert norms == pytest.approx(wanted_norms, rel=1e-5), stage
        for name, value in golden.items():
            torch.testing.assert_close(weights[name], value, atol=1e-6, rtol=0, msg=f"{stage} {name}")
        assert_held_back(plan, weights)


def drawn_here(plan):
    """This rank's masks; and an engine whose steps are not known to be one torch optimizer's is refused with them alone."""
    with process_group(recipe_of()):
        recipe = recipe_of("zero1")
        config = config_of(recipe, dist.get_world_size())
        config |= {"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
        for masks in (make_masks(plan, ANATOMY), None):
            engine = ZeroEngine(tiny_llama(), ANATOMY, recipe, config, masks=masks)
            with pytest.raises(UserError, match=r"torch_autocast.*masks of elements") if masks else nullcontext():
                engine.enter(plan.phases[0])
            engine.close()
        return {name: bits.packed.numpy().tobytes() for name, bits in make_masks(plan, ANATOMY).items()}


def build_without(plan, spoil):
    """Rank 1 finds another file than rank 0."""
    if os.environ["RANK"] == "1":
        file = Path(plan.held_back["model.layers.2.mlp.down_proj.weight"].file)
        mine = file.with_name("rank1.safetensors")
        if spoil:
            mine.write_bytes(file.read_bytes() + b" ")
        plan = replace(plan, masks=tuple(replace(m, file=str(mine)) if m.file else m for m in plan.masks))
    plan.__dict__["digest"] = "the same"
    with process_group(recipe_of()):
        build_engine(tiny_llama(), ANATOMY, recipe_of("zero2"), plan)


def test_ranks_draw_the_same_and_a_bad_file_is_everybody_s_error(tmp_path):
    """Oracles: one process; UserError on both ranks, where one of them alone lacks the file or has another; and of an engine whose
    steps cannot be followed."""
    plan = masked_plan(tmp_path)
    wanted = {name: bits.packed.numpy().tobytes() for name, bits in make_masks(plan, ANATOMY).items()}
    assert run_ranks(drawn_here, plan) == [wanted, wanted]
    for spoil, message in ((False, "cannot be read"), (True, "not those that the plan was made with")):
        found = outcomes_of(build_without, plan, spoil)
        assert [(o.kind, o.error) for o in found] == [("error", "UserError")] * 2
        assert message in found[1].text
        assert "On rank 1: The masks in" in found[0].text
