"""A run's record as a plain row. No torch.

What a record says is not trusted to have the types that it should: a number that is none reads as absent. A run that was stopped at any
moment, half a file included, is a row in state "interrupted".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.files import parse_json
from dsfreeze.metrics import METRICS, score
from dsfreeze.recipe_yaml import parse_yaml, read_file
from dsfreeze.record import ENVIRONMENT, PLAN, RECIPE, SUMMARY, RecordData, read_record
from dsfreeze.report.redact import redact, redacted

DONE, INTERRUPTED = "done", "interrupted"
#: Keys of an environment that are the run's, not its surroundings'.
_OF_THE_RUN = ("format_version", "started")
Number = float | None


@dataclass(frozen=True)
class Run:
    """A run as a row. A number that its record does not have is None.

    score          of `metric` after training, 0 to 100, higher is better
    seconds        the steps' wall time (evaluations and set-up apart); seconds_per_step their median
    peak_bytes     of one rank's device (of the process on a CPU)
    flops_ratio    FLOPs per token, full tuning's = 1
    losses         (step, loss) of every step
    """

    name: str
    state: str
    reason: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    steps: int | None = None
    loss: Number = None
    metric: str = ""
    score: Number = None
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    seconds: Number = None
    seconds_per_step: Number = None
    peak_bytes: Number = None
    trainable: Number = None
    total: Number = None
    flops_ratio: Number = None
    losses: tuple[tuple[int, float], ...] = ()


def read_run(folder: Path, name: str) -> Run:
    """A record as a row; UserError when it is of another version or was damaged."""
    try:
        return _row(read_record(folder), name)
    except UserError:
        cut = _cut_short(folder)
        if cut is None:
            raise
    return Run(name, INTERRUPTED, reason=cut, recipe=redacted(_recipe_of(folder)))


def _cut_short(folder: Path) -> str | None:
    """What a run that was stopped while it wrote has left half done; None where that is not what is wrong."""
    for file in (RECIPE, PLAN):
        if not (folder / file).is_file():
            return f"stopped before {file} was written"
    for file in (PLAN, ENVIRONMENT, SUMMARY):
        try:
            parse_json((folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError:
            return f"{file} is half written"
        except OSError:
            return None
    return None


def _recipe_of(folder: Path) -> Mapping[str, Any]:
    try:
        return parse_yaml(read_file(folder / RECIPE, "recipe"), str(folder / RECIPE)).values
    except UserError:
        return {}


def _row(data: RecordData, name: str) -> Run:
    summary = data.summary or {}
    seconds = [line for line in (number(step.get("seconds")) for step in data.steps) if line is not None]
    peaks = [peak for peak in (number(step.get("memory_peak")) for step in data.steps) if peak is not None]
    losses = [(step["step"], loss) for step in data.steps if (loss := number(step.get("loss"))) is not None]
    metrics = _metrics(redacted(summary.get("metrics")))
    metric, points = headline(data.recipe, metrics.get("after", {}))
    done = data.steps[-1]["step"] if data.steps else 0
    memory = summary.get("memory")
    peak = number(memory.get("peak")) if isinstance(memory, Mapping) else None
    return Run(
        name,
        DONE if data.summary is not None else INTERRUPTED,
        reason="" if data.summary is not None else _stopped(data.recipe, done),
        recipe=redacted(data.recipe),
        environment=redacted({key: data.environment[key] for key in data.environment if key not in _OF_THE_RUN}),
        started=redact(str(data.environment.get("started", ""))),
        steps=done,
        loss=losses[-1][1] if losses else None,
        metric=metric,
        score=points,
        metrics=metrics,
        seconds=math.fsum(seconds) if seconds else None,
        seconds_per_step=number(summary.get("seconds_per_step")),
        peak_bytes=peak if peak is not None else max(peaks, default=None),
        trainable=number(summary.get("trainable")),
        total=number(summary.get("total")),
        flops_ratio=number(summary.get("flops_vs_full")),
        losses=tuple(losses),
    )


def _stopped(recipe: Mapping[str, Any], done: int) -> str:
    options = recipe.get("train")
    planned = options.get("max_steps") if isinstance(options, Mapping) else None
    of = f" of {planned}" if isinstance(planned, int) and planned > 0 else ""
    return f"no {SUMMARY}; {done}{of} steps done"


def number(value: Any) -> Number:
    """A finite number, or None: what a record says is not trusted to be one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # an int beyond every float
        return None


def _metrics(found: Any) -> dict[str, dict[str, float]]:
    if not isinstance(found, Mapping):
        return {}
    return {
        str(when): {str(key): known for key, value in values.items() if (known := number(value)) is not None}
        for when, values in found.items()
        if isinstance(values, Mapping)
    }


def headline(recipe: Mapping[str, Any], numbers: Mapping[str, float]) -> tuple[str, Number]:
    """The metric that a run is judged by and its score: the first that the recipe names, or else the task's first, of those that
    were measured."""
    data = recipe.get("data")
    named = data.get("metrics") if isinstance(data, Mapping) else None
    for name in (*(named if isinstance(named, list) else ()), *METRICS):
        if isinstance(name, str) and name in METRICS:
            try:
                return name, score(name, numbers)
            except (KeyError, ZeroDivisionError):  # it was not measured
                continue
    return "", None
