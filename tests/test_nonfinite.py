"""Losses that are no finite number. Oracles: the examples of the poisoned batch, weights to the bit, a run that never met it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import tiny_recipe

from dsfreeze import loop
from dsfreeze.engine.local import LocalEngine
from dsfreeze.errors import UserError
from dsfreeze.loop import train
from dsfreeze.objectives import Objective
from dsfreeze.record import read_record
from dsfreeze.tables import summary_table

QUIET = Console(quiet=True)


class Poisoned(Objective):
    """The model's own loss, times a number that stands for each call."""

    def __init__(self, factors: list[float]) -> None:
        self.factors = iter(factors)

    def loss(self, outputs: Any, batch: Any) -> Any:
        return outputs.loss * next(self.factors)


def poison(monkeypatch: pytest.MonkeyPatch, *factors: float) -> None:
    monkeypatch.setattr(loop, "objective_of", lambda recipe: Poisoned([*factors, *[1.0] * 100]))


def recipe(folder: Path, **options: Any) -> Any:
    return tiny_recipe(folder, train={"max_steps": 4, "save_strategy": "no", **options})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_step_and_its_examples_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    poison(monkeypatch, 1.0, 1.0, 1.0, value)
    asked = recipe(tmp_path, gradient_accumulation_steps=2)
    chosen = next(iter_steps(asked, skip=1)).chosen[1].tolist()
    with pytest.raises(UserError) as error:
        train(asked, QUIET)
    told = str(error.value)
    assert told.startswith(f"The loss of step 2 is {value}")
    assert f"rank 0 in micro-batch 2, examples {', '.join(map(str, chosen))} of {asked.data.train}" in told
    assert "train.max_skipped_steps" in told
    assert len(read_record(asked.train.output_dir).steps) == 1


def iter_steps(asked: Any, skip: int) -> Any:
    from dsfreeze.engine.ranks import read_ranks
    from dsfreeze.job import prepare_job

    steps = iter(loop.Run(prepare_job(asked), QUIET, read_ranks()).loader)
    for _ in range(skip):
        next(steps)
    return steps


def test_a_few_are_left_out_by_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that is left out changes no weight by a bit; the others do."""
    poison(monkeypatch, 1.0, float("nan"), 1.0, 1.0)
    moved, step = [], LocalEngine.step

    def watched(engine: Any, *rates: Any) -> float:
        before = [p.detach().clone() for p in engine.module.parameters()]
        norm = step(engine, *rates)
        moved.append(not all(map(torch.equal, before, engine.module.parameters())))
        return norm

    monkeypatch.setattr(LocalEngine, "step", watched)
    asked = recipe(tmp_path, max_skipped_steps=1, export=True, warmup_steps=0)
    summary = train(asked, QUIET)
    assert (summary["steps"], summary["skipped_steps"]) == (4, 1)
    lines = read_record(asked.train.output_dir).steps
    assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is None
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(summary))
    assert "4 (1 left out, not finite)" in console.export_text()
    found = load_file(asked.train.output_dir / "model/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in found.values())
    assert moved == [True, False, True, True]


def test_one_more_than_allowed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, float("nan"), float("nan"))
    with pytest.raises(UserError, match=r"The loss of step 2 is nan.* 1 such steps were left out before it"):
        train(recipe(tmp_path, max_skipped_steps=1), QUIET)


def test_a_resumed_run_goes_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, float("nan"))
    options = {"max_skipped_steps": 1, "save_strategy": "steps", "save_steps": 2}
    assert train(recipe(tmp_path, **options), QUIET)["skipped_steps"] == 1
    poison(monkeypatch, float("nan"))
    with pytest.raises(UserError, match="The loss of step 5 is nan"):
        train(recipe(tmp_path, **{**options, "max_steps": 6, "resume_from_checkpoint": True}), QUIET)
