"""The comparison in the terminal: scores, ranks, pairs, costs, and what is missing. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from dsfreeze.compare import rows
from dsfreeze.compare.pareto import Front
from dsfreeze.compare.resampling import LEVEL
from dsfreeze.compare.statistics import Family, Summary
from dsfreeze.compare.verdicts import family_verdict, lost_verdict, num_blocks

#: Pairs, and lost cells, that a table shows; all are in the rows.
MOST = 15
_PAIR_COLUMNS = ("first", "second", "difference", "low", "high", "p", "p (Holm)", "found")


def comparison_tables(summary: Summary, fronts: Sequence[Front]) -> RenderableType:
    """All of them, one below the other."""
    parts: list[RenderableType] = [scores_table(summary)]
    for family in summary.families:
        parts += [pairs_table(family)] if family.against else [ranks_table(family), pairs_table(family)]
    parts.append(fronts_table(fronts))
    return Group(*parts, *([lost_table(summary)] if summary.lost else []))


def scores_table(summary: Summary) -> Table:
    table = _table("score, 0 to 100: mean ± deviation over seeds", rows.rows_scores(summary))
    return _captioned(table, lost_verdict(summary))


def ranks_table(family: Family) -> Table:
    over = num_blocks(family.ranks.num_blocks, family.unit)
    table = _table(f"average rank over {over} (1 is best)", rows.rows_ranks(family))
    difference = family.ranks.critical_difference
    lines = [] if difference is None else [
        f"critical difference {difference:.2f} (Nemenyi, alpha {family.alpha:g}); methods that share a letter are within it"
    ]  # fmt: skip
    return _captioned(table, lines)


def pairs_table(family: Family) -> Table:
    """The pairs of smallest p, and the verdict on all."""
    columns, values = rows.rows_pairs(family)
    places = [columns.index(name) for name in _PAIR_COLUMNS]
    shown = [[row[place] for place in places] for row in values[:MOST]]
    title = (
        f"pairs over {family.unit}s: difference in points (first - second), its {LEVEL:.0%} interval, sign-flip test"
    )
    more = len(values) - len(shown)
    lines = [f"and {more} pairs of larger p"] if more > 0 else []
    return _captioned(_table(title, (list(_PAIR_COLUMNS), shown)), lines + family_verdict(family))


def fronts_table(fronts: Sequence[Front]) -> Table:
    table = _table("score against cost, means over the cases and seeds that all methods have", rows.rows_fronts(fronts))
    return _captioned(table, ["on the front: no other method scores as high for as little, and better in one of them"])


def lost_table(summary: Summary) -> Table:
    columns, values = rows.rows_lost(summary)
    table = _table("cells without a score", (columns, values[:MOST]))
    return _captioned(table, [f"and {len(values) - MOST} more"] if len(values) > MOST else [])


def _table(title: str, of: rows.Rows) -> Table:
    columns, values = of
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, collapse_padding=True)
    for place, name in enumerate(columns):
        numeric = any(isinstance(row[place], int | float) for row in values)
        table.add_column(escape(name), justify="right" if numeric else "left", no_wrap=place == 0 and len(columns) > 3)
    for row in values:
        table.add_row(*(escape(rows.as_text(name, value)) for name, value in zip(columns, row, strict=True)))
    return table


def _captioned(table: Table, lines: Sequence[str]) -> Table:
    table.caption, table.caption_justify = escape("\n".join(lines)) or None, "left"
    return table
