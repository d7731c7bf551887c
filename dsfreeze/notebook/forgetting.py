"""06, forgetting: a sequence of tasks, from its results file or from the benchmark's record of one. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from dsfreeze.continual.results import RESULTS, general_ability, read_results
from dsfreeze.errors import UserError
from dsfreeze.record import read_object

Row = dict[str, Any]
#: Names of files that hold a sequence, as `folders.find_file` looks for them.
PATTERNS = (RESULTS, "continual-*.json")
#: Points of a score by which a method must lie above WiSE-FT's line to be called so (ours).
CLEARLY = 0.5
#: What WiSE-FT's labels have before their alpha.
CURVE_MARK = "@"


@dataclass(frozen=True)
class Course:
    """What a sequence left. `scores`: of each run (METHOD/seed-S...) a row of scores by task and probe for each of its rounds, `rounds`
    their numbers; `summary`: of each method the mean of every number, and its deviation over seeds."""

    tasks: tuple[str, ...]
    probes: tuple[str, ...]
    start: Mapping[str, float]
    summary: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, list[Mapping[str, float]]]
    rounds: Mapping[str, list[int]]

    @property
    def retained(self) -> tuple[str, str]:
        """The number that says what is retained, and how an axis calls it."""
        if self.probes:
            return "general_ability", "mean score on the probes after the last round"
        return "op", "mean score on all tasks after the last round"

    @property
    def start_retained(self) -> float | None:
        """What the start model scores on the probes; None without any."""
        return general_ability({"probes": self.probes}, self.start) if self.probes else None


def read_course_of(path: Path) -> Course:
    """The sequence that a results.json or a continual-MODEL.json holds; UserError when it holds none, or no method has ended."""
    try:
        course = _of_results(read_results(path)) if path.name == RESULTS else _of_benchmark(read_object(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no results of a sequence: {error!r} is missing or wrong. `dsfreeze continual` writes them."
        ) from None
    if not point_rows(course):
        raise UserError(
            f"No method of {path} has ended all its rounds: `dsfreeze continual` goes on where it was stopped."
        )
    return course


def _of_results(state: Mapping[str, Any]) -> Course:
    runs = state["runs"]
    return Course(
        tuple(state["sequence"]), tuple(state["probes"]), (state["start"] or {"scores": {}})["scores"], state["summary"],
        {key: [row["scores"] for row in run["rounds"]] for key, run in runs.items()},
        {key: [row["round"] for row in run["rounds"]] for key, run in runs.items()},
    )  # fmt: skip


def _of_benchmark(record: Mapping[str, Any]) -> Course:
    """The benchmark's record names no probes: they are those whose metrics its summary has."""
    start, summary = record["start"]["scores"], record["summary"]
    numbers = {name for found in summary.values() for name in found}
    probes = tuple(name for name in start if any(number.startswith(f"{name}.") for number in numbers))
    tasks = tuple(name for name in start if name not in probes)
    # one row alone is that of a method that trains on all tasks at once
    rounds = {
        key: list(range(1, len(rows) + 1)) if len(rows) > 1 else [len(tasks)] for key, rows in record["scores"].items()
    }
    return Course(tasks, probes, start, summary, record["scores"], rounds)


def matrix_rows(course: Course, run: str) -> list[Row]:
    """Scores on each task and probe after each round of a run, the start model's before them."""
    rows = [{"after": "start", "on": name, "score": course.start.get(name)} for name in (*course.tasks, *course.probes)]
    for number, scores in zip(course.rounds[run], course.scores[run], strict=True):
        after = f"{number}: {course.tasks[number - 1]}" if len(course.rounds[run]) > 1 else "all"
        rows += [{"after": after, "on": name, "score": scores.get(name)} for name in (*course.tasks, *course.probes)]
    return rows


def whole_runs(course: Course) -> list[str]:
    """Runs that have a row of all tasks for every round, of each method the first."""
    found: dict[str, str] = {}
    for key, rows in course.scores.items():
        if len(rows) == len(course.tasks) and set(course.tasks) <= set(rows[0]):
            found.setdefault(key.partition("/")[0], key)
    return list(found.values())


def point_rows(course: Course) -> list[Row]:
    """Of each method what it learnt and what it retained, with deviations over seeds; `alpha` of WiSE-FT's points. Methods without rounds of their own
    (bounds) have no learning accuracy."""
    key, _ = course.retained
    rows = []
    for label, found in course.summary.items():
        learnt, kept = found.get("learning_accuracy"), found.get(key)
        if learnt is None or kept is None:
            continue
        method, mark, alpha = label.partition(CURVE_MARK)
        moved, trained = found.get("update_norm"), found.get("trainable_share")
        rows.append({
            "label": label, "method": method, "alpha": _alpha(alpha) if mark else None,
            "learnt": learnt["mean"], "learnt_deviation": learnt["over_seeds"],
            "retained": kept["mean"], "retained_deviation": kept["over_seeds"],
            "moved": moved and moved["mean"], "trained_percent": 100 * trained["mean"] if trained else None,
            "forgetting": (found.get("forgetting") or {}).get("mean"), "op": (found.get("op") or {}).get("mean"),
        })  # fmt: skip
    return rows


def _alpha(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # a method of that name
        return None


def curve_rows(rows: Sequence[Row]) -> list[Row]:
    """WiSE-FT's points, from the start model on."""
    return sorted((row for row in rows if row["alpha"] is not None), key=lambda row: row["alpha"])


def above_curve(row: Row, curve: Sequence[Row]) -> float | None:
    """How much more a method retains than WiSE-FT does where it learnt as much (between its points: straight lines); None outside them."""
    spans = [
        (one, other)
        for one, other in pairwise(curve)
        if min(one["learnt"], other["learnt"]) <= row["learnt"] <= max(one["learnt"], other["learnt"])
    ]
    return min((row["retained"] - _between(row["learnt"], *span) for span in spans), default=None)


def _between(learnt: float, one: Row, other: Row) -> float:
    width = other["learnt"] - one["learnt"]
    share = (learnt - one["learnt"]) / width if width else 1.0
    return float(one["retained"] + share * (other["retained"] - one["retained"]))


def forgetting_finding(rows: Sequence[Row]) -> str:
    """Which methods keep more than an interpolation of weights that learnt as much."""
    methods, curve = [row for row in rows if row["alpha"] is None], curve_rows(rows)
    if not methods:
        return "No method has finished all its rounds."
    most = max(methods, key=lambda row: row["learnt"])
    kept = max(methods, key=lambda row: row["retained"])
    sentence = (
        f"{most['label']} learnt most ({most['learnt']:.1f}) and {kept['label']} retained most ({kept['retained']:.1f})"
    )
    if len(curve) < 2:
        return f"{sentence}; without a WiSE-FT curve nothing says whether that is more than a smaller step would give."
    gaps = {row["label"]: gap for row in methods if (gap := above_curve(row, curve)) is not None}
    better = sorted((label for label, gap in gaps.items() if gap > CLEARLY), key=lambda label: -gaps[label])
    left = len(methods) - len(gaps)
    outside = f"; {left} learnt more or less than any of its points" if left else ""
    if not better:
        return f"{sentence}; none of {len(gaps)} methods lies clearly above WiSE-FT's line between start and tuned model{outside}."
    return (
        f"{sentence}; {len(better)} of {len(gaps)} methods lie clearly above WiSE-FT's line, the farthest {better[0]} "
        f"(+{gaps[better[0]]:.1f}){outside}."
    )


def matrix_finding(course: Course, run: str) -> str:
    """What of the first task is left at the end."""
    first, rounds = course.tasks[0], course.scores[run]
    own, last = rounds[0][first], rounds[-1][first]
    method = run.partition("/")[0]
    change = last - own
    word = "lost" if change < 0 else "gained"
    return (
        f"Under {method}, {first} scored {course.start.get(first, float('nan')):.1f} before, {own:.1f} right after its own round and {last:.1f} after "
        f"{len(rounds)} rounds: it {word} {abs(change):.1f} points to what was learnt later."
    )
