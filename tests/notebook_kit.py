"""Records of runs that never were, written as a run would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import Record, RecordData, read_record

PLAN = FreezePlan("toy", (Phase(0, 2, ("a", "b")), Phase(2, None, ("b",))))
ENVIRONMENT = {"device": "cpu", "cores": 2, "versions": {"torch": "2.13.0"}}


def summary_of(**changes: Any) -> dict[str, Any]:
    """A summary's keys, as far as notebooks read them."""
    return {
        "steps": 4, "strategy": "toy", "trainable": 50, "total": 200, "flops_vs_full": 0.5, "full_flops_per_token": 1000,
        "seconds_per_step": 0.2, "memory": {"weights": 800, "gradients": 200, "peak": 1500}, "metrics": {"after": {"loss": 0.6, "accuracy": 0.75}},
        "predicted": {"weights": 800, "gradients": 200, "peak": 1200}, "prefix_cache": None, **changes,
    }  # fmt: skip


def run_record(
    folder: Path, *, losses: tuple[float, ...] = (4.0, 3.0, 2.0, 1.0), summary: dict[str, Any] | None = None
) -> RecordData:
    """The record of a run of four steps whose second half is its plan's second phase; without a summary it was killed."""
    recipe = load_recipe(None, ["model=smollm2-135m", "train.max_steps=4"])
    record = Record.create(folder, recipe, PLAN, ENVIRONMENT)
    for step, loss in enumerate(losses, start=1):
        phase = PLAN.phase_at(step - 1).first_step
        record.step({"step": step, "loss": loss, "learning_rate": 0.1, "grad_norm": 2.0 * loss, "seconds": 0.1 * step, "phase": phase})  # fmt: skip
    record.event("evaluation", when="after", step=len(losses), metrics={"loss": 0.6, "accuracy": 0.75})
    if summary is not None:
        record.summary(summary)
    return read_record(folder)
