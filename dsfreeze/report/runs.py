"""Sections on runs: one by one, by setup, their figures, where they ran, their recipes. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsfreeze.recipe_yaml import dump_yaml
from dsfreeze.report import figures
from dsfreeze.report.reading import Gathered
from dsfreeze.report.row import DONE, Number, Run
from dsfreeze.report.sections import Cell, Figure, Folded, Section, Table, counted
from dsfreeze.report.setups import Setup, setups_of, spread, strategy_of
from dsfreeze.tables import gib, million

#: Recipes that are shown whole, one a setup.
MOST_RECIPES = 20
_EXPLAINED = (
    "Score: the run's first metric after training, 0 to 100, higher is better (perplexity as 100 / perplexity). Trained: share of the "
    "parameters. FLOPs: of a token, full tuning's = 100 %, by formula. Time: the steps' alone, without evaluations. Memory: the peak of "
    "one rank's device (on a CPU of the process)."
)


def run_sections(gathered: Gathered, *, with_figures: bool) -> Iterator[Section]:
    """The runs' sections, the overview first; none without runs."""
    if not gathered.runs:
        return
    setups = setups_of(gathered.runs)
    labels = {id(run): setup.label for setup in setups for run in setup.runs}
    if len(gathered.runs) > 1 and setups:
        yield _setups(setups)
    if with_figures and setups:
        yield Section("Figures", figures=list(_figures(setups)))
    runs = [_run_row(run, labels.get(id(run), "")) for run in gathered.runs]
    yield Section(
        "Runs", [_EXPLAINED], tables=[Table("A row for each run", _RUN_COLUMNS, runs), *_metrics(gathered.runs)]
    )
    yield from _environments(gathered.runs)
    if setups:
        yield _recipes(setups)


# -- runs and setups -----------------------------------------------------------------------------------------------

_RUN_COLUMNS = (
    "run", "state", "setup", "seed", "steps", "score", "metric", "loss", "trained", "FLOPs", "s/step", "time (s)", "peak memory",
)  # fmt: skip


def _run_row(run: Run, label: str) -> list[Cell]:
    return [
        run.name, run.state + (f": {run.reason}" if run.reason else ""), label or strategy_of(run), seed_of(run), run.steps,
        _fixed(run.score, 2), run.metric, _fixed(run.loss, 4), share(run.trainable, run.total), _percent(run.flops_ratio),
        _fixed(run.seconds_per_step, 3), _fixed(run.seconds, 1), bytes_of(run.peak_bytes),
    ]  # fmt: skip


def seed_of(run: Run) -> str:
    train = run.recipe.get("train")
    return str(train.get("seed", "")) if isinstance(train, Mapping) else ""


def _setups(setups: Sequence[Setup]) -> Section:
    columns = ("setup", "runs", "done", "score", "loss", "trainable", "FLOPs", "s/step", "time (s)", "peak memory")
    rows = [
        [
            setup.label, len(setup.runs), len(setup.done), around(setup.values("score"), "{:.2f}"), around(setup.values("loss"), "{:.4f}"),
            _mean(setup, "trainable", million), _mean(setup, "flops_ratio", _percent), around(setup.values("seconds_per_step"), "{:.3f}"),
            around(setup.values("seconds"), "{:.1f}"), _mean(setup, "peak_bytes", bytes_of),
        ]
        for setup in setups
    ]  # fmt: skip
    told = (
        "A setup is what runs have in common that differ in their seeds alone; its name is what tells the setups apart. Numbers are means "
        "of finished runs, ± their standard deviation (n - 1) where there are several. Nothing here tests whether a difference is one."
    )
    return Section("Setups", [told], tables=[Table("A row for each setup", columns, rows)])


def _mean(setup: Setup, name: str, form: Any) -> str | None:
    mean, _ = spread(setup.values(name))
    return None if mean is None else form(mean)


def around(values: Sequence[float], form: str) -> str | None:
    """Mean ± deviation, the same number of digits."""
    mean, deviation = spread(values)
    if mean is None:
        return None
    return form.format(mean) + ("" if deviation is None else " ± " + form.format(deviation))


def _fixed(value: Number, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _percent(value: Number) -> str | None:
    return None if value is None else f"{100 * value:.0f} %"


def share(part: Number, whole: Number) -> str | None:
    return None if part is None or not whole else f"{100 * part / whole:.2f} %"


def bytes_of(value: Number) -> str | None:
    return None if value is None else gib(value)


def _metrics(runs: Sequence[Run]) -> Iterator[Table]:
    """Every number of every evaluation, a row for each run."""
    names = dict.fromkeys((when, name) for run in runs for when, numbers in run.metrics.items() for name in numbers)
    if names:
        columns = ("run", *(f"{name} ({when})" for when, name in names))
        rows: list[list[Cell]] = [
            [run.name, *(_fixed(run.metrics.get(when, {}).get(name), 4) for when, name in names)]
            for run in runs
            if run.metrics
        ]
        yield Table("Evaluations", columns, rows)


# -- figures -------------------------------------------------------------------------------------------------------


def _figures(setups: Sequence[Setup]) -> Iterator[Figure]:
    ordered, drawn = _ordered(setups), [figures.loss_curves(setups)]
    for title, unit, name, scale in (
        ("Score", "score, 0 to 100", "score", 1.0),
        ("Time of a step", "seconds", "seconds_per_step", 1.0),
        ("Peak memory", "GiB of one rank", "peak_bytes", 2**30),
        ("Trainable parameters", "millions", "trainable", 1e6),
    ):
        drawn.append(figures.bars(title, unit, [(s.label, s.values(name)) for s in ordered], scale=scale))
    yield from (figure for figure in drawn if figure)


def _ordered(setups: Sequence[Setup]) -> list[Setup]:
    """Those that are drawn first, the others, which only count as left out, behind them."""
    first = figures.leading(setups, figures.MOST_BARS)
    chosen = set(map(id, first))
    return [*first, *(setup for setup in setups if id(setup) not in chosen)]


# -- environments and recipes --------------------------------------------------------------------------------------


def _environments(runs: Sequence[Run]) -> Iterator[Section]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.environment:
            groups.setdefault(json.dumps(run.environment, sort_keys=True, default=str), []).append(run)
    if not groups:
        return
    rows = [_environment_row(members) for members in groups.values()]
    columns = ("runs", "device", "ranks", "cores", "threads", "python", "platform", "versions", "first", "started")
    told = "As each run wrote it at its start; no environment variable is in a record."
    yield Section("Environment", [told], tables=[Table("A row for each surroundings that runs had", columns, rows)])


def _environment_row(members: Sequence[Run]) -> list[Cell]:
    found = members[0].environment
    versions = found.get("versions")
    pairs = versions.items() if isinstance(versions, Mapping) else ()
    started = sorted(run.started for run in members if run.started)
    plain = [_text(found.get(key)) for key in ("device", "world_size", "cores", "threads", "python", "platform")]
    named = ", ".join(f"{name} {version}" for name, version in pairs)
    when = " to ".join(dict.fromkeys((started[0], started[-1]))) if started else ""
    return [len(members), *plain, named, members[0].name, when]


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _recipes(setups: Sequence[Setup]) -> Section:
    shown = figures.leading(setups, MOST_RECIPES)
    told = ["The resolved recipe of each setup's first run: every key. `dsfreeze train FILE` runs it again."]
    if len(setups) > len(shown):
        told.append(f"{len(setups) - len(shown)} more are left out here; each run's folder holds its recipe.yaml.")
    told.append("What tells the setups apart:")
    keys = list(dict.fromkeys(key for setup in setups for key in setup.varied))
    rows = [[setup.label, *(_key_text(setup.varied.get(key)) for key in keys)] for setup in setups]
    tables = [Table("What varies between setups", ("setup", *keys), rows)] if keys else []
    folded = [Folded(f"{setup.label} ({setup.runs[0].name})", dump_yaml(dict(setup.runs[0].recipe))) for setup in shown]
    return Section("Recipes", told if keys else told[:-1], tables=tables, folded=folded)


def _key_text(value: Any) -> Cell:
    return value if isinstance(value, str) or value is None else json.dumps(value, default=str)


def run_records(runs: Sequence[Run]) -> Iterator[dict[str, Cell]]:
    """Runs for CSV: whole numbers, bytes and seconds."""
    labels = {id(run): setup.label for setup in setups_of(runs) for run in setup.runs}
    for run in runs:
        yield {
            "kind": "run", "name": run.name, "state": run.state, "reason": run.reason, "setup": labels.get(id(run), ""),
            "model": _at(run, "model", "name"), "task": _text(run.recipe.get("task")), "data": _at(run, "data", "train"),
            "method": strategy_of(run), "seed": seed_of(run), "learning_rate": _at(run, "train", "learning_rate"), "steps": run.steps,
            "loss": run.loss, "metric": run.metric, "score": run.score, "seconds": run.seconds, "seconds_per_step": run.seconds_per_step,
            "peak_bytes": run.peak_bytes, "trainable": run.trainable, "total": run.total, "flops_ratio": run.flops_ratio,
            "started": run.started,
            **{f"{when}.{name}": value for when, numbers in run.metrics.items() for name, value in numbers.items()},
        }  # fmt: skip


def _at(run: Run, section: str, key: str) -> str:
    inner = run.recipe.get(section)
    return _text(inner.get(key)) if isinstance(inner, Mapping) else ""


def counts_of(runs: Sequence[Run]) -> str:
    """One sentence on how many there are."""
    done = sum(run.state == DONE for run in runs)
    left = len(runs) - done
    return f"{counted(len(runs), 'run')}: {done} done" + (f", {left} interrupted (or still going on)." if left else ".")
