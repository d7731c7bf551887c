"""Engines that enter one phase after another, on two gloo ranks: the same training everywhere, and the same state."""

from __future__ import annotations

import pytest
import torch
from forks import run_ranks
from tiny import llama_anatomy, phase_of, recipe_of, tiny_llama, train_steps
from zero_kit import LAYOUTS, STAGES, make_zero

from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.process import process_group
from dsfreeze.plan import Phase

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
