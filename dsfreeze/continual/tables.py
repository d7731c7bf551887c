"""The results as a table: a row for each method, numbers over seeds. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from dsfreeze.continual.results import general_ability, matrix_of

#: Columns, and the numbers they show.
COLUMNS = {
    "OP": "op", "BWT": "bwt", "forgot": "forgetting", "FWT": "fwt", "learnt": "learning_accuracy", "general": "general_ability",
}  # fmt: skip
_EXPLAINED = (
    "OP mean score after the last round; BWT change of earlier tasks since their own round, over {bwt}; FWT change of a task up to its "
    "round, since the start; learnt: mean score right after each task's round; general: mean score of the probes ({before} before); "
    "trained: share of the weights; moved: L2 norm of the change; ± deviation over seeds, in brackets over draws"
)


def continual_table(state: Mapping[str, Any]) -> Group:
    """The comparison, and the matrix of each method's first run."""
    spec = state["spec"]
    title = f"{len(state['sequence'])} tasks in sequence: {', '.join(state['sequence'])}; scores 0 to 100"
    table = Table(title=escape(title), title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    for name in (*COLUMNS, "trained", "moved"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, numbers in _shown(state).items():
        key = {"bwt": "bwt" if spec["bwt"] == "T-1" else "bwt_over_t"}
        figures = [_figure(numbers.get(key.get(name, name))) for name in COLUMNS.values()]
        table.add_row(
            escape(label),
            *figures,
            _mean(numbers.get("trainable_share"), "{:.1%}"),
            _mean(numbers.get("update_norm"), "{:.3g}"),
        )
    before = general_ability(state, state["start"]["scores"])
    table.caption = _EXPLAINED.format(bwt=spec["bwt"], before="none" if before is None else f"{before:.1f}")
    table.caption_justify = "left"
    return Group(table, matrices_table(state))


def _shown(state: Mapping[str, Any]) -> dict[str, Any]:
    """The methods' numbers; of a WiSE-FT curve its middle alone, where it was measured."""
    curves = {run["label"]: run for run in state["runs"].values() if run["alpha"] is not None}
    halves = {run["method"] for run in curves.values() if run["alpha"] == 0.5}
    left_out = {label for label, run in curves.items() if run["method"] in halves and run["alpha"] != 0.5}
    return {label: numbers for label, numbers in state["summary"].items() if label not in left_out}


def matrices_table(state: Mapping[str, Any]) -> Table:
    """R[t][i] of the first seed (and draw) of each method, below the start model's row."""
    table = Table(
        title="R: score on each task after each round, first seed", title_justify="left", box=SIMPLE, pad_edge=False
    )
    table.add_column("method", no_wrap=True)
    table.add_column("after", no_wrap=True)
    for name in state["sequence"]:
        table.add_column(escape(name), justify="right")
    table.add_row("start model", "", *(_score(state["start"]["scores"].get(name)) for name in state["sequence"]))
    seen = set()
    for run in state["runs"].values():
        if run["label"] in seen or run["alpha"] is not None:
            continue
        seen.add(run["label"])
        rows = matrix_of(state, run).rows[-len(run["rounds"]) :]
        for number, (row, kept) in enumerate(zip(rows, run["rounds"], strict=True)):
            table.add_row(escape(run["label"]) if number == 0 else "", escape(kept["task"]), *map(_score, row))
    return table


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _figure(spread: Mapping[str, Any] | None) -> str:
    """The mean; below it the deviation over seeds, and below that, where there are several draws, the one over draws."""
    if spread is None:
        return "-"
    seeds, draws = spread["over_seeds"], spread["over_draws"]
    deviations = ("" if seeds is None else f"\n±{seeds:.1f}") + ("" if draws is None else f"\n({draws:.1f})")
    return f"{spread['mean']:.1f}{deviations}"


def _mean(spread: Mapping[str, Any] | None, form: str) -> str:
    return "-" if spread is None else form.format(spread["mean"])
