"""Sections on results files: comparisons (a grid of cells) and sequences of tasks. No torch."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsfreeze.compare.figures import critical_difference_figure, pareto_figure, score_figure
from dsfreeze.compare.pareto import pareto_fronts
from dsfreeze.compare.rows import Rows, as_text, rows_fronts, rows_pairs, rows_ranks
from dsfreeze.compare.statistics import Summary, baseline, summarise
from dsfreeze.compare.verdicts import family_verdict, lost_verdict, rate_verdict
from dsfreeze.continual.results import matrix_of, numbers_of
from dsfreeze.continual.tables import COLUMNS
from dsfreeze.report import figures
from dsfreeze.report.reading import Results
from dsfreeze.report.row import DONE, number
from dsfreeze.report.runs import around, bytes_of
from dsfreeze.report.sections import Cell, Figure, Section, Table, counted
from dsfreeze.report.setups import natural, spread
from dsfreeze.tables import million

Cells = Mapping[str, Mapping[str, Any]]


def comparison_section(results: Results, *, with_figures: bool) -> Section:
    """A comparison's cells: counts, scores by method and task, costs, and each cell without a result with its reason."""
    cells: Cells = results.state["cells"]
    counts = Counter(str(cell["status"]) for cell in cells.values())
    told = [
        f"{counted(len(cells), 'cell')}: {', '.join(f'{count} {status}' for status, count in counts.most_common())}."
    ]
    summary = summarise(cells, against=baseline(cells))
    for family in summary.families:
        told += family_verdict(family)
    return Section(
        f"Comparison {results.name}",
        [*told, *rate_verdict(results.state["tuning"]), *lost_verdict(summary)],
        figures=[*_statistics_figures(cells, summary), *_cell_figures(cells)] if with_figures else (),
        tables=[*_scores(cells), *_costs(cells), *_statistics(cells, summary), *_without(cells)],
    )


def _statistics(cells: Cells, summary: Summary) -> Iterator[Table]:
    for family in summary.families:
        unit = f"{family.unit}s" + (f", against {family.against}" if family.against else "")
        yield _table(f"Pairs of methods over {unit}: sign-flip tests, Holm's correction", rows_pairs(family))
        if family.against is None:
            yield _table(f"Average ranks over {unit}; a letter in common: no difference found", rows_ranks(family))
    yield _table(
        "Score against cost: mean of each method, and where it is on the front", rows_fronts(pareto_fronts(cells))
    )


def _table(caption: str, found: Rows) -> Table:
    columns, rows = found
    kept = [number for number, column in enumerate(columns) if column != "verdict"]
    texts = [[as_text(columns[number], row[number]) for number in kept] for row in rows]
    return Table(caption, [columns[number] for number in kept], texts)


def _statistics_figures(cells: Cells, summary: Summary) -> Iterator[Figure]:
    drawn = [
        (score_figure(summary), "Scores by task", "Mean over seeds of each method on each task, with its interval."),
        (
            pareto_figure(pareto_fronts(cells), summary.methods),
            "Score against cost",
            "Methods on the staircase are beaten by none in both.",
        ),
        *(
            (
                critical_difference_figure(family),
                f"Average ranks over {family.unit}s",
                "Methods that a bar joins are within the critical difference.",
            )
            for family in summary.families
            if family.against is None
        ),
    ]
    for figure, title, told in drawn:
        yield replace(figures.inline_svg(figure, title, told, told), wide=True)


def _by_method(cells: Cells) -> dict[str, list[Mapping[str, Any]]]:
    """The finished cells of each method, in the order of the file; a method without any is there too."""
    methods: dict[str, list[Mapping[str, Any]]] = {str(cell["method"]): [] for cell in cells.values()}
    for cell in cells.values():
        if cell["status"] == DONE:
            methods[str(cell["method"])].append(cell)
    return methods


def _values(cells: list[Mapping[str, Any]], name: str) -> list[float]:
    return [value for cell in cells if (value := number(cell.get(name))) is not None]


def _place(cell: Mapping[str, Any]) -> tuple[str, str, str]:
    """Model, task and size: where methods are compared."""
    size = cell.get("size")
    return str(cell["model"]), str(cell["task"]), "" if size is None else f"{size} examples"


def _scores(cells: Cells) -> Iterator[Table]:
    """A row for each method, a column for each place; without what all places have in common."""
    methods = _by_method(cells)
    places = sorted({_place(cell) for cell in cells.values()}, key=lambda place: [natural(part) for part in place])
    if not places:
        return
    telling = [part for part in range(3) if len({place[part] for place in places}) > 1] or [1]
    names = [" · ".join(place[part] for part in telling if place[part]) or "all examples" for place in places]
    rows: list[list[Cell]] = []
    for method, done in methods.items():
        scores = [_values([cell for cell in done if _place(cell) == place], "score") for place in places]
        rows.append([method, *(around(values, "{:.2f}") for values in scores)])
    yield Table("Scores, 0 to 100: means over seeds ± their deviation (n - 1)", ("method", *names), rows)


def _costs(cells: Cells) -> Iterator[Table]:
    rows: list[list[Cell]] = []
    for method, done in _by_method(cells).items():
        means = {
            name: spread(_values(done, name))[0] for name in ("seconds", "peak_bytes", "trainable", "flops", "steps")
        }
        trainable, flops = means["trainable"], means["flops"]
        rows.append([
            method, len(done), None if means["steps"] is None else f"{means['steps']:.0f}", None if means["seconds"] is None else f"{means['seconds']:.1f}",
            bytes_of(means["peak_bytes"]), None if trainable is None else million(trainable), None if flops is None else f"{flops / 1e12:.4g}",
        ])  # fmt: skip
    if rows:
        columns = ("method", "cells done", "steps", "time (s)", "peak memory", "trainable", "TFLOPs of the run")
        yield Table("Costs, means over a method's finished cells", columns, rows)


def _without(cells: Cells) -> Iterator[Table]:
    rows: list[list[Cell]] = [
        [key, str(cell["status"]), str(cell.get("reason") or "")]
        for key, cell in cells.items()
        if cell["status"] != DONE
    ]
    if rows:
        yield Table("Cells without a result", ("cell", "state", "reason"), rows)


def _cell_figures(cells: Cells) -> Iterator[Figure]:
    methods = _by_method(cells)
    for title, unit, name, scale in (
        ("Score by method", "score, 0 to 100, over all cells", "score", 1.0),
        ("Time by method", "seconds of a run", "seconds", 1.0),
        ("Peak memory by method", "GiB of one rank", "peak_bytes", 2**30),
        ("Trainable parameters by method", "millions", "trainable", 1e6),
    ):
        figure = figures.bars(
            title, unit, [(method, _values(done, name)) for method, done in methods.items()], scale=scale
        )
        if figure:
            yield figure


def cell_records(results: Results) -> Iterator[dict[str, Cell]]:
    """Cells for CSV."""
    for key, cell in results.state["cells"].items():
        metrics = cell.get("metrics")
        pairs = metrics.items() if isinstance(metrics, Mapping) else ()
        numbers = (
            "size",
            "seed",
            "learning_rate",
            "steps",
            "score",
            "seconds",
            "peak_bytes",
            "trainable",
            "total",
            "flops",
        )
        yield {
            "kind": "cell", "source": results.name, "name": key, "state": str(cell["status"]), "reason": str(cell.get("reason") or ""),
            "model": str(cell["model"]), "task": str(cell["task"]), "method": str(cell["method"]),
            **{name: number(cell.get(name)) for name in numbers},
            **{f"after.{name}": number(value) for name, value in pairs},
        }  # fmt: skip


# -- sequences -----------------------------------------------------------------------------------------------------


def sequence_section(results: Results, *, with_figures: bool) -> Section:
    """A sequence's numbers by method, and each run's matrix."""
    state = results.state
    names = {**COLUMNS, "BWT": "bwt" if state["spec"]["bwt"] == "T-1" else "bwt_over_t"}
    columns = ("method", *names, "trained share", "moved (L2)")
    rows = [
        [label, *(_spread(numbers.get(key)) for key in (*names.values(), "trainable_share", "update_norm"))]
        for label, numbers in state["summary"].items()
    ]
    told = (
        f"{len(state['sequence'])} tasks in sequence: {', '.join(state['sequence'])}. Scores 0 to 100; OP: mean after the last round; BWT: "
        f"change since each task's own round, over {state['spec']['bwt']}; learnt: right after its round; general: mean of the probes. "
        "± deviation over seeds."
    )
    tables = [Table("Numbers by method", columns, rows), _matrices(state)]
    return Section(
        f"Sequence {results.name}", [told], figures=list(_sequence_figure(state)) if with_figures else (), tables=tables
    )


def _spread(found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return None
    deviation = found["over_seeds"]
    return f"{found['mean']:.4g}" + ("" if deviation is None else f" ± {deviation:.2g}")


def _matrices(state: Mapping[str, Any]) -> Table:
    rows: list[list[Cell]] = []
    if state["start"]:
        rows.append(["start model", "", *(number(state["start"]["scores"].get(name)) for name in state["sequence"])])
    for name, run in state["runs"].items():
        matrix = matrix_of(state, run).rows[-len(run["rounds"]) :] if run["rounds"] else []
        rows += [[name, kept["task"], *scores] for scores, kept in zip(matrix, run["rounds"], strict=True)]
    return Table("R: score on each task after each round", ("run", "after", *state["sequence"]), rows)


def _sequence_figure(state: Mapping[str, Any]) -> Iterator[Figure]:
    from dsfreeze.continual.figure import draw_figure

    told = "Left: learnt against retained, a point for each method. Right: retained against the size of the update."
    with tempfile.TemporaryDirectory() as folder, figures.inline_style("Learnt against retained"):
        path = Path(folder, "figure.svg")
        if draw_figure(state, path) == "":
            figure = figures.adapted(path.read_text(encoding="utf-8"), "Learnt against retained", told, told)
            yield replace(figure, wide=True)


def sequence_records(results: Results) -> Iterator[dict[str, Cell]]:
    """A sequence's runs for CSV; OP is the score, further numbers by their names."""
    for key, run in results.state["runs"].items():
        numbers = {name: number(value) for name, value in numbers_of(results.state, run).items()}
        yield {
            "kind": "sequence", "source": results.name, "name": key, "method": str(run["label"]), "seed": str(run["seed"]),
            "metric": "op", "score": numbers.pop("op"), "seconds": numbers.pop("seconds"),
            **{f"sequence.{name}": value for name, value in numbers.items()},
        }  # fmt: skip
