"""Engines that enter one phase after another, on two gloo ranks: the same training everywhere, and the same state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from forks import run_ranks
from tiny import llama_anatomy, phase_of, recipe_of, tiny_llama, train_steps
from zero_kit import LAYOUTS, STAGES, make_zero

from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.process import process_group
from dsfreeze.estimate import estimate
from dsfreeze.plan import FreezePlan, Phase

ANATOMY = llama_anatomy(tiny_llama())


def tensors(*parts):
    return tuple(t.name for t in ANATOMY.tensors if any(part in t.name for part in parts))


#: first step and what trains; the third cuts through layers, so that one layer holds tensors of different step counts
PHASES = [
    Phase(0, 3, phase_of(ANATOMY, "bottom").trainable),
    Phase(3, 3, phase_of(ANATOMY, ["embed", "layers.0", "layers.3"]).trainable),
    Phase(6, 3, tensors("0.self_attn.q", "0.mlp", "1.", "3.self_attn.k", "3.mlp", "norm")),
    Phase(9, 3, phase_of(ANATOMY, ["layers.2", "layers.3", "norm", "head"]).trainable),
    Phase(12, None, phase_of(ANATOMY, "full").trainable),
]
STEPS = 15
RULES = [("keep", False), ("offload", False), ("clear", False), ("clear", True)]
TRAIN = {"weight_decay": 0.1, "adam_epsilon": 1e-2, "gradient_checkpointing": True}


def phase_at(step):
    return [p for p in PHASES if p.first_step <= step][-1]


def train(engine, first, last):
    losses = []
    for step in range(first, last):
        engine.enter(phase_at(step))
        losses += train_steps(engine, step, step + 1, lr=5e-3)[0]
        moved = engine.movement()
        assert moved.frozen_changed == moved.never_moved == ()
    return losses


def local(rule, bf16=False):
    state, drop = rule
    recipe = recipe_of("local", bf16=bf16, **TRAIN)
    return LocalEngine(tiny_llama(), ANATOMY, recipe, state=state, drop_master=drop)


def zero(layout, rule, bf16=False):
    engine = make_zero(None, *layout, bf16=bf16, **TRAIN)
    engine.rule, engine.drop_master = rule
    return engine


def everywhere(layouts, rules, bf16):
    results = {}
    with process_group(recipe_of()):
        for number, layout in enumerate(layouts):
            for rule in rules:
                engine = zero(layout, rule, bf16)
                losses = train(engine, 0, STEPS)
                weights = engine.export_weights(n for n, _ in engine.module.named_parameters())
                results[number, rule] = (losses, weights, {k: sorted(v) for k, v in engine.export_state().items()})
                engine.close()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_moving_plans_train_the_same_at_every_stage(bf16):
    """Oracle: LocalEngine, held against hand-written PyTorch in test_local_engine.py. fp32: losses 1e-5 (rounding that
    Adam amplifies); bf16: as for static plans (test_zero_engine.py)."""
    close_loss, close_weight = (5e-3, 1.6e-2) if bf16 else (1e-5, 1e-5)
    wanted = {}
    for rule in RULES:
        engine = local(rule, bf16)
        losses = train(engine, 0, STEPS)
        weights = {n: p.detach().float() for n, p in engine.module.named_parameters()}
        wanted[rule] = (losses, weights, {k: sorted(v) for k, v in engine.export_state().items()})
    layouts = STAGES if bf16 else LAYOUTS
    leader, other = run_ranks(everywhere, layouts, RULES, bf16, timeout=240)
    for (number, rule), (losses, weights, kinds) in leader.items():
        where = f"{layouts[number]} {rule}"
        assert losses == pytest.approx(wanted[rule][0], abs=close_loss), where
        assert other[number, rule][0] == losses, where
        assert kinds == wanted[rule][2], where
        for name, value in weights.items():
            torch.testing.assert_close(
                value.float(), wanted[rule][1][name], atol=close_weight, rtol=0, msg=f"{where} {name}"
            )


def measured(layouts, bf16):
    """By layout: what a step's gradients and the way from the start come to, and bytes in every phase against the plan's."""
    found = []
    with process_group(recipe_of()):
        for layout in layouts:
            engine = zero(layout, RULES[0], bf16)
            engine.enter(PHASES[4])
            engine.watch(gradients=True, changes=True)
            train_steps(engine, 0, 1, lr=5e-3)
            found.append((engine.gradients(), engine.changes()))
            engine.close()
    return found


@pytest.mark.slow
def test_measurements_are_the_same_at_every_stage():
    """Oracle: LocalEngine's, themselves held against `.grad` and the weights in test_moving_local.py."""
    engine = local(RULES[0])
    engine.enter(PHASES[4])
    engine.watch(gradients=True, changes=True)
    train_steps(engine, 0, 1, lr=5e-3)
    leader, other = run_ranks(measured, LAYOUTS, False, timeout=120)
    assert leader == other
    for layout, (gradients, changes) in zip(LAYOUTS, leader, strict=True):
        for name in ANATOMY.in_order(PHASES[4].trainable):
            assert gradients[name] == pytest.approx(engine.gradients()[name], rel=1e-4), (layout, name)
            assert changes[name] == pytest.approx(engine.changes()[name], rel=1e-4), (layout, name)


def held_in_phases(layouts, rules, bf16):
    found = {}
    with process_group(recipe_of()):
        for number, layout in enumerate(layouts):
            for rule in rules:
                engine = zero(layout, rule, bf16)
                for phase in PLAN.phases:
                    engine.enter(phase)
                    train_steps(engine, phase.first_step, phase.first_step + 1, lr=5e-3)
                    held = engine.memory()
                    found[number, rule, phase.first_step] = (held.masters, held.optimizer_state, held.parked)
                engine.close()
    return found


PLAN = FreezePlan("made", (*PHASES[:4], replace(PHASES[4], num_steps=3)))


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_live_bytes_after_every_switch_are_the_plan_s(bf16):
    """Oracle: `estimate` of the phase at that stage, over 2 ranks: to the byte."""
    layouts = [("zero1", {}), ("zero2", {}), ("zero3", STAGES[3][1])]
    ranks = run_ranks(held_in_phases, layouts, RULES, bf16, timeout=240)
    for (number, rule, step), _ in ranks[0].items():
        plan = replace(PLAN, state=rule[0], drop_master=rule[1])
        cost = estimate(
            ANATOMY, plan, stage=number + 1, world_size=2, dtype_bytes=2 if bf16 else 4, phase=plan.phase_at(step)
        )
        wanted = (cost.masters, cost.optimizer_state, cost.parked)
        assert [found[number, rule, step] for found in ranks] == [wanted] * 2, (layouts[number], rule, step)
