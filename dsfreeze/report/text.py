"""A page as Markdown (GitHub's), and its rows as CSV. No torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from html import escape

from dsfreeze.report.sections import Cell, Folded, Page, Section, Table, is_numeric, shown

#: What a spreadsheet takes for a formula, at the start of a text.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_markdown(page: Page) -> str:
    """Headings, paragraphs, tables, recipes folded; the figures are in the page as .html."""
    parts = [f"# {_inline(page.title)}", *map(_inline, page.paragraphs)]
    for section in page.sections:
        parts += _section(section)
    parts.append("Figures are in the report as .html.")
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_inline(section.title)}"
    yield from map(_inline, section.paragraphs)
    for table in section.tables:
        yield f"**{_inline(table.caption)}**"
        yield _table(table)
    yield from map(_folded, section.folded)


def _table(table: Table) -> str:
    numeric = [is_numeric(table, column) for column in range(len(table.columns))]
    head, rule = map(_inline, table.columns), ["---:" if right else "---" for right in numeric]
    body = ([_inline(shown(cell)) for cell in row] for row in table.rows)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *body))


def _folded(folded: Folded) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", folded.text)), default=0))
    title = escape(" ".join(folded.title.split()))  # inside of a tag nothing else is markup
    return f"<details><summary>{title}</summary>\n\n{fence}yaml\n{folded.text.rstrip()}\n{fence}\n\n</details>"


def _inline(text: str) -> str:
    """Text in which nothing is markup: a line, and what Markdown or HTML would read behind a backslash or as an entity."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def to_csv(page: Page) -> str:
    """A row for each run, cell of a comparison and run of a sequence (`kind`), numbers in full; no value reads as a formula."""
    columns = list(dict.fromkeys(name for row in page.rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writerow({name: _safe(name) for name in columns})
    writer.writerows([{name: _safe(value) for name, value in row.items()} for row in page.rows])
    return out.getvalue()


def _safe(value: Cell) -> Cell:
    """A text that a spreadsheet would run begins with an apostrophe, which it hides."""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
