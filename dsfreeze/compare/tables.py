"""The comparison in the terminal: scores, ranks, pairs, costs, and what is missing. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dsfreeze.compare import rows
from dsfreeze.compare.pareto import Front
from dsfreeze.compare.resampling import LEVEL
from dsfreeze.compare.statistics import Family, Summary
from dsfreeze.compare.verdicts import family_verdict, lost_verdict, num_blocks

#: Pairs, and lost cells, that a table shows; all are in the rows.
MOST = 15
_PAIR_COLUMNS = ("first", "second", "difference", "low", "high", "p", "p (Holm)", "found")


def comparison_tables(summary: Summary, fronts: Sequence[Front]) -> Group:
    """All of them, one below the other; ranks once for each unit. Before the first score, what is missing alone."""
    if not summary.cases:
        return Group(*lost_verdict(summary), lost_table(summary))
    parts = [scores_table(summary)]
    for family in summary.families:
        parts += [pairs_table(family)] if family.against else [ranks_table(family), pairs_table(family)]
    return Group(*parts, fronts_table(fronts), lost_table(summary))


def scores_table(summary: Summary) -> Group:
    """A row for each method, a column for each case."""
    return _section("Score, 0 to 100: mean ±deviation over seeds", rows.rows_scores(summary), lost_verdict(summary))


def ranks_table(family: Family) -> Group:
    """The best first, with the critical difference."""
    difference = family.ranks.critical_difference
    lines = [] if difference is None else [
        f"Critical difference {difference:.2f} (Nemenyi, alpha {family.alpha:g}); methods that share a letter are within it."
    ]  # fmt: skip
    over = num_blocks(family.ranks.num_blocks, family.unit)
    return _section(f"Average rank over {over} (1 is best)", rows.rows_ranks(family), lines)


def pairs_table(family: Family) -> Group:
    """The pairs of smallest p, and the verdict on all."""
    columns, values = rows.rows_pairs(family)
    places = [columns.index(name) for name in _PAIR_COLUMNS]
    shown = [[row[place] for place in places] for row in values[:MOST]]
    beside = f" with {family.against}" if family.against else ""
    title = (
        f"Pairs{beside} over {family.unit}s: points by which the first is better, {LEVEL:.0%} interval, sign-flip test"
    )
    lines = [f"and {len(values) - MOST} pairs of larger p"] if len(values) > MOST else []
    return _section(title, (list(_PAIR_COLUMNS), shown), lines + family_verdict(family))


def fronts_table(fronts: Sequence[Front]) -> Group:
    """Scores beside costs."""
    line = "On the front: no other method scores as high for as little, and better in one of them."
    return _section("Score against cost, means over what all methods have", rows.rows_fronts(fronts), [line])


def lost_table(summary: Summary) -> Group:
    """Cells that came to an end without a score, or were stopped; those that have not begun are counted elsewhere."""
    columns, values = rows.rows_lost(summary)
    begun = [row for row in values if row[columns.index("status")] != "waiting"]
    if not begun:
        return Group()
    lines = [f"and {len(begun) - MOST} more"] if len(begun) > MOST else []
    return _section("Cells without a score", (columns, begun[:MOST]), lines)


def _section(title: str, of: rows.Rows, lines: Sequence[str]) -> Group:
    """A heading, the table, and sentences on it, as wide as the terminal."""
    columns, values = of
    table = Table(box=SIMPLE, pad_edge=False, collapse_padding=True)
    for place, name in enumerate(columns):
        numeric = any(isinstance(row[place], int | float) for row in values)
        table.add_column(
            escape(name),
            justify="right" if numeric else "left",
            overflow="fold",
            no_wrap=place == 0 and len(columns) > 3,
        )
    for row in values:
        table.add_row(*(escape(rows.as_text(name, value)) for name, value in zip(columns, row, strict=True)))
    return Group(Text(title, style="bold"), table, Text("\n".join(lines) + "\n" * bool(lines), style="italic"))
