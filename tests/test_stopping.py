"""Rows set aside, and early stopping by them. Oracles: a run by hand without stopping, its evaluations; the rows themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import tiny_recipe

from dsfreeze.commands import evaluate_recipe, recipe_of_run
from dsfreeze.data import prepare, set_aside
from dsfreeze.data.sources import load
from dsfreeze.errors import UserError
from dsfreeze.loop import Run, train
from dsfreeze.model import load_tokenizer
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record
from dsfreeze.stopping import BEST

QUIET = Console(quiet=True)


def recipe(folder: Path, *, data: Any = None, **options: Any) -> Any:
    """Ends at the second evaluation in a row that is no better, of one every second step."""
    values = {
        "eval_strategy": "steps", "eval_steps": 2, "max_steps": 40, "early_stopping_patience": 2, "learning_rate": 3e-2,
        "lr_scheduler_type": "constant", "save_strategy": "no", **options,
    }  # fmt: skip
    return tiny_recipe(folder, data={"held_out": 0.2, "metrics": ["accuracy"], **(data or {})}, train=values)


def scores(folder: Path) -> dict[int, float]:
    events = read_record(folder).events
    found = [event for event in events if event["event"] == "evaluation" and event["when"].startswith("step ")]
    return {event["step"]: event["metrics"]["accuracy"] for event in found}


def test_rows_are_set_aside_and_nothing_is_lost(tmp_path: Path) -> None:
    """Each row is on one side; the same ones with the same seed, whatever train.seed; a share or a number."""
    one = recipe(tmp_path)
    table = load(one.data.train, "train", role="train")
    rest, aside = set_aside(table, 0.2, 0)
    assert (len(rest.rows), len(aside.rows)) == (36, 9)
    assert sorted([*rest.numbers, *aside.numbers]) == list(range(1, 46))
    assert list(aside.numbers) == sorted(aside.numbers)
    assert list(set_aside(table, 9, 0)[1].numbers) == list(aside.numbers)
    assert list(set_aside(table, 9, 1)[1].numbers) != list(aside.numbers)
    tokenizer = load_tokenizer(one.model)
    found = [prepare(recipe(tmp_path, seed=seed), tokenizer) for seed in (1, 2)]
    held = [np.concatenate([row["input_ids"] for row in each.held_out.eval.rows]).tolist() for each in found]
    assert held[0] == held[1]
    assert len(found[0].train) == 36
    assert found[0].held_out.labels == found[0].labels


@pytest.mark.parametrize("amount", [0.001, 45, 100])
def test_too_little_or_too_much(tmp_path: Path, amount: float) -> None:
    with pytest.raises(UserError, match=r"data.held_out: .* of the 45 rows"):
        train(recipe(tmp_path, data={"held_out": amount}), QUIET)


def test_a_run_ends_with_its_best_evaluation(tmp_path: Path) -> None:
    """By hand: the same run without stopping, its accuracies, and the rule applied to them; then the exported model measured anew."""
    whole = recipe(tmp_path, early_stopping_patience=None, output_dir=str(tmp_path / "whole"))
    train(whole, QUIET)
    best, worse, stop = (-1.0, 0), 0, 40
    for step, value in scores(tmp_path / "whole").items():
        best, worse = ((value, step), 0) if value > best[0] else (best, worse + 1)
        if worse == 2:
            stop = step
            break
    assert best[1] < stop < 40  # or the test says nothing
    summary = train(recipe(tmp_path), QUIET)
    assert summary["steps"] == stop
    assert summary["early_stopping"] == {"metric": "accuracy", "score": 100 * best[0], "step": best[1], "stopped": True}
    assert not (tmp_path / "run" / BEST).exists()
    run = tmp_path / "run"
    assert evaluate_recipe(recipe_of_run(run)) == summary["metrics"]["after"]
    short = recipe(
        tmp_path, early_stopping_patience=None, max_steps=best[1], output_dir=str(tmp_path / "short"), eval_steps=100
    )  # fmt: skip
    train(short, QUIET)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (run, tmp_path / "short"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(BaseException):
    """Nobody catches it."""


def test_a_killed_run_finds_the_same_end(tmp_path: Path, monkeypatch: Any) -> None:
    expected = train(recipe(tmp_path, output_dir=str(tmp_path / "whole"), save_strategy="steps", save_steps=3), QUIET)
    one_step, last = Run._one_step, expected["steps"] - 1

    def step(self: Any, *rest: Any) -> None:
        if self.step == last:
            raise Killed
        one_step(self, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_one_step", step)
        with pytest.raises(Killed):
            train(recipe(tmp_path, save_strategy="steps", save_steps=3), QUIET)
    resumed = recipe(tmp_path, save_strategy="steps", save_steps=3, resume_from_checkpoint=True)
    summary = train(resumed, QUIET)
    for key in ("steps", "early_stopping", "metrics", "loss"):
        assert summary[key] == expected[key]


def test_what_trained_after_the_best_goes_back_too(tmp_path: Path) -> None:
    """LISA thaws other layers every step: the exported model is that of a run that ends with the best step, to the last bit."""
    options = {"learning_rate": 1e-1, "max_steps": 12}
    whole = recipe(tmp_path, **options)
    lisa = {"strategy": "lisa", "switch_every": 1, "active_layers": 1, "fraction": None}
    freeze = whole.freeze.model_copy(update=lisa)
    summary = train(whole.model_copy(update={"freeze": freeze}), QUIET)
    best = summary["early_stopping"]["step"]
    assert best < summary["steps"]
    assert evaluate_recipe(recipe_of_run(tmp_path / "run")) == summary["metrics"]["after"]
    short = recipe(tmp_path, learning_rate=1e-1, max_steps=best, output_dir=str(tmp_path / "short"))
    train(short.model_copy(update={"freeze": freeze}), QUIET)
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("run", "short"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_prefix_cache_changes_nothing(tmp_path: Path) -> None:
    """Held-out rows pass the whole model, and so do the evaluation's once other weights are back."""
    plain = train(recipe(tmp_path, per_device_train_batch_size=12, output_dir=str(tmp_path / "plain")), QUIET)
    cached = recipe(tmp_path, per_device_train_batch_size=12)
    freeze = cached.freeze.model_copy(update={"prefix_cache": "memory"})
    summary = train(cached.model_copy(update={"freeze": freeze}), QUIET)
    assert summary["prefix_cache"]["hits"]
    assert summary["early_stopping"] == plain["early_stopping"]
    assert summary["metrics"]["after"] == pytest.approx(plain["metrics"]["after"], rel=1e-4)


@pytest.mark.parametrize(("changes", "message"), [
    ({"data": {"held_out": None}}, "needs data.held_out"), ({"eval_strategy": "end"}, "needs train.eval_strategy steps or epoch"),
])  # fmt: skip
def test_what_does_not_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, **changes)


def test_preferences_set_no_rows_aside() -> None:
    """Their references are measured before the run, for the rows that train and those that evaluate."""
    with pytest.raises(UserError, match=r"data.held_out: .*preference"):
        load_recipe(None, ["model=m", "task=preference", "data.held_out=0.1"])
