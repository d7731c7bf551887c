"""The results of a comparison: one file, rewritten after every run, that a stopped comparison goes on from. No torch.

    output_dir/results.json
      spec      the resolved file                  data      of each task's files: sha256
      cells     KEY -> outcome, one for each run    tuning    GROUP -> {trials, learning_rate}, where rates are looked for
An outcome: model, task, method, size, seed; status and reason; run, its record's folder below output_dir; score (0 to 100), metrics; what
the run took. KEY is "MODEL/TASK/METHOD/size-N/seed-S".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsfreeze import __version__
from dsfreeze.compare.reading import Cell, Grid
from dsfreeze.errors import UserError
from dsfreeze.files import sha256_of
from dsfreeze.metrics import METRICS, score
from dsfreeze.record import RecordData
from dsfreeze.state_file import State, differences, read_state, write_state

FORMAT_VERSION = 1
RESULTS = "results.json"
#: Keys that may change between one call and the next: they add runs, or say how they are run.
FREE_KEYS = ("models", "tasks", "methods", "seeds", "sizes", "memory", "jobs", "keep_models", "output_dir")
NAMED = ("models", "tasks", "methods")


def open_results(grid: Grid) -> State:
    """What earlier calls left, or a beginning. UserError where the folder holds the results of another comparison: says what differs."""
    path, resolved = grid.spec.output_dir / RESULTS, grid.spec.model_dump(mode="json")
    data = dict(_digests(grid))
    fresh: State = {
        "format_version": FORMAT_VERSION, "version": __version__, "spec": resolved, "data": data,
        "cells": {cell.key: waiting(cell) for cell in grid.cells}, "tuning": {},
    }  # fmt: skip
    if not path.exists():
        return fresh
    found = read_results(path)
    changed = list(differences(found["spec"], resolved, FREE_KEYS, NAMED))
    changed += [f"the file {name}" for name, digest in data.items() if found["data"].get(name, digest) != digest]
    if changed:
        raise UserError(
            f"{path} holds the results of another comparison. What differs: {'; '.join(changed)}. Go on with the one it was begun "
            "with, or name another output_dir."
        )
    cells = {**fresh["cells"], **found["cells"]}
    return {**fresh, "data": {**found["data"], **data}, "cells": cells, "tuning": found["tuning"]}


def read_results(path: Path) -> State:
    """The results file; UserError when there is none, or it is no such file."""
    return read_state(path, FORMAT_VERSION, "dsfreeze compare")


def write_results(folder: Path, state: Mapping[str, Any]) -> None:
    """Aside, then renamed; UserError when the disk refuses."""
    write_state(folder / RESULTS, state)


def _digests(grid: Grid) -> Iterator[tuple[str, str]]:
    """SHA-256 of the tasks' files, by task and role, where they are files."""
    for task in grid.spec.tasks:
        for role in ("train", "eval"):
            path = Path(grid.located(str({**grid.spec.data, **task.data}.get(role))))
            if path.is_file():
                yield f"{task.name}.{role}", sha256_of(path)


# -- outcomes ----------------------------------------------------------------------------------------------------------


def waiting(cell: Cell) -> State:
    """The outcome of a run that has not begun."""
    group = cell.group
    return {
        "model": group.model.name, "task": group.task.name, "method": group.method.name, "size": group.size, "seed": cell.seed,
        "status": "waiting", "reason": None, "run": None, "score": None, "metrics": {}, "seconds": None, "peak_bytes": None,
        "trainable": None, "total": None, "flops": None, "learning_rate": None, "steps": None,
    }  # fmt: skip


def measured(record: RecordData, metric: str) -> State:
    """What a finished run's record says: the rest of a done outcome.

    `seconds`: of the loop: its steps, and what waited for states or decided what trains; evaluations are left out. `flops`: of all
    its tokens, by formula, whatever a prefix cache spared.
    """
    summary = record.summary or {}
    numbers = summary["metrics"].get("after", {})
    tokens = sum(line["tokens"] for line in record.steps)
    per_token = summary["flops_vs_full"] * summary["full_flops_per_token"]
    return {
        "score": _score(metric, numbers), "metrics": numbers, "seconds": _loop_seconds(record),
        "peak_bytes": summary["memory"]["peak"], "trainable": summary["trainable"], "total": summary["total"],
        "flops": per_token * tokens, "learning_rate": record.recipe["train"]["learning_rate"], "steps": summary["steps"],
    }  # fmt: skip


def held_out_score(record: RecordData) -> float | None:
    """Of the best evaluation of what is set aside, 0 to 100; None where none was a number."""
    best = (record.summary or {}).get("early_stopping") or {}
    found: float | None = best.get("score")
    return found


def _score(metric: str, numbers: Mapping[str, float | None]) -> float | None:
    """None where the metric came out as no number, which a record has as null."""
    known = {name: value for name, value in numbers.items() if value is not None}
    return score(metric, known) if (METRICS[metric].headline or metric) in known else None


def _loop_seconds(record: RecordData) -> float:
    summary = record.summary or {}
    waited = (summary.get("prefix_cache") or {}).get("seconds_waited", 0.0)
    deciding = (summary.get("selection") or {}).get("seconds", 0.0)
    return float(sum(line["seconds"] for line in record.steps) + waited + deciding)
