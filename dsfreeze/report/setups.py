"""Runs that differ in their seeds alone, as one setup; its name is what varies between the setups of a report. No torch."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsfreeze.report.row import DONE, Number, Run

#: Keys that say which run it is, where it lies and what it logs: runs that differ in these alone are the same setup.
SAME_SETUP = (
    "train.seed", "freeze.seed", "train.output_dir", "train.run_name", "train.report_to", "train.logging_steps", "train.save_",
    "train.export", "train.resume_from_checkpoint", "analyze.",
)  # fmt: skip
#: Keys by which setups are told apart before any others.
_FIRST = ("model.name", "task", "data.train", "freeze.strategy", "freeze.fraction", "freeze.count")


@dataclass(frozen=True)
class Setup:
    """`varied`: values of the keys that tell the setups apart; `runs` in the order they were found."""

    label: str
    varied: Mapping[str, Any]
    runs: tuple[Run, ...]

    @property
    def done(self) -> list[Run]:
        return [run for run in self.runs if run.state == DONE]

    def values(self, name: str) -> list[float]:
        """A number of the finished runs, where they have it."""
        return [value for run in self.done if (value := getattr(run, name)) is not None]


def setups_of(runs: Sequence[Run]) -> list[Setup]:
    """The setups, in natural order of their labels; runs whose recipe is not known are in none."""
    groups: dict[str, list[Run]] = {}
    flats: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.recipe:
            flat = {key: value for key, value in flatten(run.recipe) if not key.startswith(SAME_SETUP)}
            key = json.dumps(flat, sort_keys=True, default=str)
            flats[key] = flat
            groups.setdefault(key, []).append(run)
    keys = _telling(list(flats.values()))
    setups = []
    for key, members in groups.items():
        varied = {name: flats[key].get(name) for name in keys}
        setups.append(Setup(_label(varied) or strategy_of(members[0]), varied, tuple(members)))
    return sorted(setups, key=lambda setup: natural(setup.label))


def strategy_of(run: Run) -> str:
    freeze = run.recipe.get("freeze")
    return str(freeze.get("strategy", "")) if isinstance(freeze, Mapping) else ""


def natural(text: str) -> list[tuple[float, str]]:
    """A key that sorts run-2 before run-10, and 0.25 before 0.5."""
    parts = re.split(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)", text)
    return [(float(part), "") if index % 2 else (math.inf, part) for index, part in enumerate(parts)]


def flatten(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; a list is one."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from flatten(inner, f"{above}{key}.")
        else:
            yield f"{above}{key}", inner


def _telling(flats: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that tell the setups apart: one is taken where it parts what those before it leave together."""
    names = dict.fromkeys((*_FIRST, *(name for flat in flats for name in flat)))
    parts: list[tuple[str, ...]] = [()] * len(flats)
    chosen = []
    for name in names:
        finer = [(*part, repr(flat.get(name))) for part, flat in zip(parts, flats, strict=True)]
        if len(set(finer)) > len(set(parts)):
            parts = finer
            chosen.append(name)
    return chosen


def _label(varied: Mapping[str, Any]) -> str:
    return " · ".join(_shown(key, value) for key, value in varied.items() if value is not None)


def _shown(key: str, value: Any) -> str:
    """Short: of a path its end (of rte/train.jsonl.gz, rte), of a strategy and a task the name alone."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if key in ("freeze.strategy", "task"):
        return text
    if key == "model.name":
        return text.rstrip("/").rpartition("/")[2] or text
    if key == "data.train":
        *above, file = text.rstrip("/").split("/")[-2:]
        stem = file.partition(".")[0] or file
        return "/".join(above if above and stem == "train" else [*above, stem])
    return f"{key.rpartition('.')[2]}={text}"


def spread(values: Sequence[float]) -> tuple[Number, Number]:
    """Mean, and deviation (n - 1); None of too few values."""
    if not values:
        return None, None
    return math.fsum(values) / len(values), statistics.stdev(values) if len(values) > 1 else None
