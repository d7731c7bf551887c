"""Learning rates looked for. Oracles: the trials' own records, the grid by hand, a search that was never stopped."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from compare_kit import compare, grid_file, run_here, without_times

from dsfreeze.compare.queue import Result, Work
from dsfreeze.compare.spec import TuneOptions
from dsfreeze.compare.tuning import rates, search
from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record

RECIPE = Recipe.model_validate({"model": "m"})


class Record:
    """Of a run whose best evaluation had this score."""

    def __init__(self, score: float | None) -> None:
        self.summary = {"early_stopping": {"score": score}}


def sought(options: TuneOptions, score: Any) -> tuple[Any, list[int]]:
    """What a search finds where a rate has the score that a function gives, and how many trials it asked for at once."""
    source = search(
        options,
        lambda number, rate: Work(
            f"{number}", RECIPE.model_copy(update={"train": RECIPE.train.model_copy(update={"learning_rate": rate})})
        ),
    )
    sizes, results = [], None
    try:
        while True:
            works = next(source) if results is None else source.send(results)
            sizes.append(len(works))
            results = [score(work.recipe.train.learning_rate) for work in works]
    except StopIteration as end:
        return end.value, sizes


def done(value: float | None) -> Result:
    return Result("done", record=Record(value))  # type: ignore[arg-type]


def near(rate: float) -> Result:
    return done(-abs(math.log(rate / 2e-4)))


def test_the_grid() -> None:
    assert rates(TuneOptions(trials=3, low=1e-5, high=1e-3)) == pytest.approx([1e-5, 1e-4, 1e-3])
    assert rates(TuneOptions(trials=1, low=1e-5, high=1e-3)) == pytest.approx([1e-4])


@pytest.mark.parametrize(("sampler", "at_once"), [("grid", [5]), ("random", [5]), ("tpe", [1] * 5)])
def test_a_search(sampler: Any, at_once: list[int]) -> None:
    """As many trials as asked for, within the range, the best of them taken; twice the same."""
    pytest.importorskip("optuna")
    options = TuneOptions(trials=5, sampler=sampler)
    found, sizes = sought(options, near)
    assert sizes == at_once
    tried = [each["learning_rate"] for each in found["trials"]]
    assert all(options.low <= rate <= options.high for rate in tried)
    assert found["learning_rate"] == min(tried, key=lambda rate: abs(math.log(rate / 2e-4)))
    assert sought(options, near)[0] == found
    if sampler == "grid":
        assert tried == rates(options)


def test_failed_trials_count_and_are_kept() -> None:
    pytest.importorskip("optuna")
    found, _ = sought(TuneOptions(trials=3), lambda rate: Result("failed", "burst") if rate > 1e-4 else near(rate))
    assert [each["status"] for each in found["trials"]] == ["done", "failed", "failed"]
    assert found["learning_rate"] == 1e-5
    found, _ = sought(TuneOptions(trials=2), lambda rate: Result("failed", "burst"))
    assert found["learning_rate"] is None


def test_equals_take_the_lowest_rate_and_an_interruption_ends_it() -> None:
    pytest.importorskip("optuna")
    assert sought(TuneOptions(trials=4), lambda rate: done(5.0))[0]["learning_rate"] == 1e-5
    assert sought(TuneOptions(trials=4, sampler="tpe"), lambda rate: Result("interrupted")) == (None, [1])


def converged(folder: Path, **changes: Any) -> Path:
    values = {
        "protocol": "converged", "seeds": [7, 8], "methods": ["full"], "tune": {"trials": 3, "low": 1e-4, "high": 1e-1},
        "train": {"num_train_epochs": 2.0, "per_device_train_batch_size": 8, "adam_epsilon": 1e-3, "max_steps": -1},
    }  # fmt: skip
    return grid_file(folder, **{**values, **changes})


def test_a_converged_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three trials on the first seed, judged by rows set aside, never by the evaluation's; then both seeds at the best rate."""
    pytest.importorskip("optuna")
    seen = run_here(monkeypatch)
    state = compare(converged(tmp_path))
    assert len(seen) == 3 + 2
    (tuned,) = state["tuning"].values()
    folders = sorted((tmp_path / "out/tuning/tiny/letters/full/size-all").iterdir())
    records = [read_record(folder) for folder in folders]
    assert [each["learning_rate"] for each in tuned["trials"]] == [r.recipe["train"]["learning_rate"] for r in records]
    assert [each["score"] for each in tuned["trials"]] == [r.summary["early_stopping"]["score"] for r in records]
    assert {(r.recipe["data"]["eval"], r.recipe["train"]["seed"]) for r in records} == {(None, 7)}
    best = max(tuned["trials"], key=lambda each: each["score"])
    assert {cell["learning_rate"] for cell in state["cells"].values()} == {best["learning_rate"]}
    assert all(cell["status"] == "done" and "accuracy" in cell["metrics"] for cell in state["cells"].values())
    assert compare(converged(tmp_path)) == state
    assert len(seen) == 5


class Killed(BaseException):
    """Nobody catches it."""


def test_a_search_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    path = converged(tmp_path, tune={"trials": 3, "sampler": "tpe", "low": 1e-4, "high": 1e-1})
    with monkeypatch.context() as patch:
        run_here(patch)
        expected = compare(path, f"output_dir={tmp_path / 'whole'}")

    def stop(words: Any) -> int:
        if "trial-1" in words[1]:
            raise Killed
        return 0

    with monkeypatch.context() as patch:
        run_here(patch, stop)
        with pytest.raises(Killed):
            compare(path)
    seen = run_here(monkeypatch)
    state = compare(path)
    assert len(seen) == 2 + 2
    assert state["tuning"] == expected["tuning"]
    assert without_times(state)["cells"] == without_times(expected)["cells"]


def test_without_optuna_it_is_said_before_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    seen = run_here(monkeypatch)
    with pytest.raises(UserError, match=r"pip install 'dsfreeze\[tune\]'"):
        compare(converged(tmp_path))
    assert not seen
    state = compare(converged(tmp_path, tune={"trials": 0}))
    assert {cell["status"] for cell in state["cells"].values()} == {"done"}
