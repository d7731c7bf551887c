"""What a report is made of, whatever it is written as. No torch.

A page is a title and sections. A section has paragraphs, tables, figures and folded text, each shown where it is given; a new kind of
result becomes a report by a function that returns sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: None is shown as a dash; numbers by `shown`.
Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """`caption` says what the rows are, and units; the first column names its row."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Figure:
    """`svg` is inline SVG of `figures.inline_svg`, and nothing else: it is the one text that a page takes as it is. `description` says in
    words what the picture shows, for those who do not see it; `note` stands below it. `wide` ones take the page's whole width."""

    title: str
    svg: str
    description: str
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Folded:
    """Text as it stands, shown on demand."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in the order of the fields."""

    title: str
    paragraphs: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Folded] = ()


@dataclass(frozen=True)
class Page:
    """`rows`: the same results as records with whole numbers, for CSV."""

    title: str
    paragraphs: Sequence[str]
    sections: Sequence[Section]
    rows: Sequence[dict[str, Cell]] = field(default=())


def shown(cell: Cell) -> str:
    """A cell for people."""
    if cell is None or cell == "":
        return "–"
    if isinstance(cell, str):
        return cell
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"


def is_numeric(table: Table, column: int) -> bool:
    """Whether a column's cells are numbers, or texts that begin as one (`84.2 ± 0.3`, `1.20 GiB`)."""
    cells = [row[column] for row in table.rows if row[column] not in (None, "")]
    return bool(cells) and all(not isinstance(cell, str) or cell.lstrip("+-−")[:1].isdecimal() for cell in cells)


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
