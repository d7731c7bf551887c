"""Which column means what: the recipe's names, or the usual ones."""

from __future__ import annotations

from collections.abc import Sequence

from dsfreeze.data.sources import Table
from dsfreeze.errors import UserError

PAIRS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text_a", "text_b"),
)
TEXTS = (("text",), ("sentence",), ("content",), ("review",))
LABELS = (("label",), ("labels",), ("score",), ("target",))
WORDS = (("tokens",), ("words",))
TAGS = (("tags",), ("ner_tags",), ("labels",))
TRANSLATIONS = (
    ("source", "target"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "highlights"),
    ("text", "summary"),
    ("input", "output"),
)


def find(table: Table, named: Sequence[str] | None, usual: Sequence[Sequence[str]], key: str) -> list[str]:
    """The columns named under `key`, or the first usual ones that the table has."""
    if named is not None:
        return table.require(named, key)
    for columns in usual:
        if all(column in table.columns for column in columns):
            return list(columns)
    shapes = " or ".join("+".join(columns) for columns in usual)
    raise UserError(
        f"{key}: {table.name} has none of the usual columns ({shapes}); write {key}. "
        f"Its columns: {', '.join(table.columns)}."
    )


def require_filled(table: Table, columns: Sequence[str]) -> None:
    """Refuses a table in which one of these columns is missing from a row."""
    for column in columns:
        values = table.rows.with_format("arrow")[column][:]
        if values.null_count:
            row = values.is_null().to_pylist().index(True)
            raise UserError(f"{table.where(row)}: '{column}' is missing. Fill it in, or drop the row.")
