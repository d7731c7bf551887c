"""Whole runs whose plan is revised from what they measure: decided once, by rank 0, the same everywhere; resumed exactly.

Oracle: the local engine's uninterrupted run with the same global batch, in fp32.
"""

from __future__ import annotations

import json

import pytest
from forks import run_ranks
from marks import some_fast
from test_train import losses, train, train_all, values
from tiny_runs import tiny_recipe

from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.record import read_record

#: options that make a run of 12 steps on four layers decide more than once, or once early
RULES = {
    "adt_h": {"track_steps": 4, "fraction": 0.5},
    "adt_l": {"track_steps": 4, "fraction": 0.5, "measure": "rel_l2", "stability_check": True},
    "autofreeze": {"switch_every": 3},
    "tang_like": {"switch_every": 3, "threshold": 0.99},
    "egeria_like": {"switch_every": 1, "window": 3, "slope": 1e3, "hits": 1},
    "smartfrz": {"switch_every": 1, "window": 2, "variance": 1.0},
    "adagradselect": {"switch_every": 2, "active_layers": 2},
    "grass": {"switch_every": 2, "active_layers": 1},
    "blockllm": {"switch_every": 2, "patience": 1, "sparsity": 0.6},
}
STEPS = 12


def recipe_of(folder, name, **train_options):
    options = {"max_steps": STEPS, "save_strategy": "no", "learning_rate": 5e-3, "adam_epsilon": 1e-2, "export": False}
    return tiny_recipe(
        folder, freeze={"fraction": None, "strategy": name, **RULES[name]}, train={**options, **train_options}
    )


def decisions(folder):
    """(step, plan digest, scores to six digits) of every revision."""
    found = read_record(folder).revisions
    return [
        (line["step"], line["plan"]["digest"], {k: pytest.approx(v, rel=1e-3, abs=1e-6) for k, v in line["scores"].items()})
        for line in found
    ]  # fmt: skip


def plain(folder):
    return [(line["step"], line["plan"]["digest"], line["scores"]) for line in read_record(folder).revisions]


@pytest.mark.slow
@pytest.mark.parametrize("name", RULES)
def test_every_stage_decides_and_trains_the_same(tmp_path, name):
    recipe = recipe_of(tmp_path, name)
    train(values(recipe, "local", tmp_path / "local", ranks=1))
    expected = decisions(tmp_path / "local")
    assert expected, "the run decided something"
    stages = ("zero0", "zero1", "zero2", "zero3")
    leader, other = run_ranks(train_all, [values(recipe, z, tmp_path / z, ranks=2) for z in stages], timeout=200)
    assert leader == other
    for zero in stages:
        assert plain(tmp_path / zero) == expected, zero
        assert losses(tmp_path / zero) == pytest.approx(losses(tmp_path / "local"), abs=1e-5), zero


@pytest.mark.parametrize("name", some_fast(RULES, 2))
def test_a_stopped_run_decides_what_it_would_have_decided(tmp_path, name):
    """Stopped before, at and after decisions; bit for bit."""
    recipe = recipe_of(tmp_path, name, save_strategy="steps", save_steps=1)
    train(values(recipe, "local", tmp_path / "run", ranks=1))
    expected, made = losses(tmp_path / "run"), plain(tmp_path / "run")
    for step in (2, 3, 4, 7):
        folder = tmp_path / f"from-{step}"
        start = tmp_path / "run" / f"checkpoint-{step}"
        train(values(recipe, "local", folder, ranks=1, resume_from_checkpoint=str(start)))
        assert losses(folder) == expected[step:], step
        assert plain(folder) == [line for line in made if line[0] > step], step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adt_h", "tang_like", "blockllm"])
def test_resuming_at_another_stage_and_world_size(tmp_path, name):
    """1 rank -> 2 and 2 -> 1, with decisions still to come: those that the uninterrupted run took."""
    recipe = recipe_of(tmp_path, name, save_strategy="steps", save_steps=1)
    train(values(recipe, "local", tmp_path / "local", ranks=1))
    expected, made = losses(tmp_path / "local"), decisions(tmp_path / "local")
    source = tmp_path / "local"
    for number, (zero, ranks, step) in enumerate([("zero2", 2, 3), ("zero3", 1, 4), ("zero1", 2, 7), ("zero3", 2, 9)]):
        folder = tmp_path / f"{number}-{zero}"
        raw = values(recipe, zero, folder, ranks=ranks, resume_from_checkpoint=str(source / f"checkpoint-{step}"))
        run_ranks(train, raw, world_size=ranks, timeout=120)
        assert losses(folder) == pytest.approx(expected[step:], abs=1e-5), (zero, ranks, step)
        assert plain(folder) == [line for line in made if line[0] > step], (zero, ranks, step)
        source = folder


def test_the_record_tells_every_plan(tmp_path):
    """Oracle: the plans themselves: same past, the last one in force at the end."""
    recipe = recipe_of(tmp_path, "grass")
    summary = train(values(recipe, "local", tmp_path / "run", ranks=1))
    record = read_record(tmp_path / "run")
    plans = [record.plan, *(FreezePlan.from_json(json.dumps(r["plan"])) for r in record.revisions)]
    for before, after, line in zip(plans, plans[1:], record.revisions, strict=False):
        assert before.until(line["step"]).digest == after.until(line["step"]).digest
        assert before.decide_at == line["step"]
    assert plans[-1].digest == summary["plan_digest"]
    assert [e["step"] for e in record.events if e["event"] == "phase"] == [p.first_step for p in plans[-1].phases[1:]]


def test_another_rule_is_another_run(tmp_path):
    """The plan so far is the same; what is still to be decided would not be."""
    recipe = recipe_of(tmp_path, "autofreeze", save_strategy="steps", save_steps=4)
    raw = values(recipe, "local", tmp_path / "run", ranks=1)
    train(raw)
    raw["freeze"]["percentile"] = 75
    raw["train"] |= {
        "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-4"),
        "output_dir": str(tmp_path / "on"),
    }
    with pytest.raises(UserError, match=r"freeze.percentile 50.*says 75.*another rule"):
        train(raw)
