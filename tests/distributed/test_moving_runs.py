"""Whole runs of moving plans: the same losses at every stage, and a stopped run goes on as if it had not been stopped.

Oracle throughout: the uninterrupted run of the local engine on the same global batch, in fp32, to 1e-5.
"""

from __future__ import annotations

import pytest
from forks import run_ranks
from marks import some_fast
from safetensors.torch import load_file
from test_train import losses, train, train_all, values
from tiny_runs import tiny_recipe

from dsfreeze.record import read_record

STAGES = ("zero0", "zero1", "zero2", "zero3")
#: one of each kind of plan; set and rule in `freeze`, number of steps
PLANS = {
    "lisa": {"strategy": "lisa", "active_layers": 1, "switch_every": 3, "state": "keep"},
    "badam": {"strategy": "badam", "switch_every": 3, "order": "descending", "state": "clear"},
    "hift": {"strategy": "hift", "state": "offload"},
    "gradual": {"strategy": "gradual_unfreezing", "switch_every": 4},
    "freezeout": {"strategy": "freezeout", "t0": 0.4, "power": 1},
}
STEPS = 13


def recipe_of(folder, freeze, **train_options):
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3, "export": False}
    return tiny_recipe(folder, freeze={"fraction": None, **freeze}, train={**options, **train_options})


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_stage_has_the_losses_of_the_local_engine(tmp_path, plan):
    recipe = recipe_of(tmp_path, PLANS[plan], save_strategy="no", weight_decay=0.1, adam_epsilon=1e-2)
    golden = train(values(recipe, "local", tmp_path / "local", ranks=1))
    assert golden["never_moved"] == []
    leader, other = run_ranks(train_all, [values(recipe, z, tmp_path / z, ranks=2) for z in STAGES], timeout=200)
    assert leader == other
    for zero, summary in zip(STAGES, leader, strict=True):
        assert losses(tmp_path / zero) == pytest.approx(losses(tmp_path / "local"), abs=1e-5), zero
        assert summary["switches"] == golden["switches"] > 0


@pytest.mark.parametrize("bf16", some_fast([True, False]), ids=["bf16", "fp32"])
@pytest.mark.parametrize("plan", ["lisa", "badam", "hift"])
def test_resuming_at_any_step_changes_nothing(tmp_path, plan, bf16):
    """Bit for bit, in the middle of a phase and at its boundaries; bf16 shows that parked masters are saved."""
    recipe = recipe_of(tmp_path, PLANS[plan], bf16=bf16)
    train(values(recipe, "local", tmp_path / "local", ranks=1))
    expected = losses(tmp_path / "local")
    for step in (2, 3, 6, 7, 12):
        folder = tmp_path / f"from-{step}"
        start = tmp_path / "local" / f"checkpoint-{step}"
        train(values(recipe, "local", folder, ranks=1, resume_from_checkpoint=str(start)))
        assert losses(folder) == expected[step:], step


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["lisa", "badam", "hift"])
def test_resuming_at_another_stage_and_world_size(tmp_path, plan):
    """2 ranks -> 1 and 1 -> 2, at a boundary (6) and within a phase (7), through every stage."""
    recipe = recipe_of(tmp_path, PLANS[plan], adam_epsilon=1e-2)
    train(values(recipe, "local", tmp_path / "local", ranks=1))
    expected = losses(tmp_path / "local")
    source = tmp_path / "local"
    for number, (zero, ranks, step) in enumerate(
        [("zero1", 2, 2), ("zero3", 1, 6), ("zero2", 2, 7), ("zero3", 2, 9), ("zero0", 2, 10), ("zero2", 1, 11)]
    ):
        folder = tmp_path / f"{number}-{zero}"
        raw = values(recipe, zero, folder, ranks=ranks, resume_from_checkpoint=str(source / f"checkpoint-{step}"))
        run_ranks(train, raw, world_size=ranks, timeout=120)
        assert losses(folder) == pytest.approx(expected[step:], abs=1e-5), (zero, ranks, step)
        source = folder


def test_a_checkpoint_holds_what_was_trained_and_nothing_else(tmp_path):
    """peers.md row 12. Oracle: the plan."""
    recipe = recipe_of(tmp_path, {**PLANS["badam"], "order": "ascending"})
    train(values(recipe, "local", tmp_path / "run", ranks=1))
    plan = read_record(tmp_path / "run").plan
    for step in (3, 4, 9):
        saved = load_file(tmp_path / "run" / f"checkpoint-{step}" / "weights.safetensors")
        assert set(saved) == plan.until(step).ever_trained
