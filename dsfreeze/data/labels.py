"""Class labels: their names, their indices, and the mistakes in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsfreeze.data.sources import Table
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.recipe import DataOptions


def label_names(values: Sequence[Any], table: Table, column: str, options: DataOptions) -> tuple[str, ...]:
    """Class names in index order: the recipe's, the source's own, or read from the values.

    Strings are sorted, with `O` (no entity) first; integers count from 0 to `data.num_labels` or the largest one, and
    are named by a `<column>_text` column where the table has one.
    """
    named = options.labels or table.names_of(column)
    if named is None:
        named = _read_names(values, table, column, options.num_labels)
    if options.num_labels is not None and len(named) != options.num_labels:
        raise UserError(
            f"data.num_labels is {options.num_labels}, but there are {len(named)} labels in {table.name}: "
            f"{', '.join(named[:30])}. Leave data.num_labels out, or mend data.labels."
        )
    if len(set(named)) != len(named):
        raise UserError(f"data.labels names a class twice: {', '.join(named)}.")
    if len(named) < 2:
        raise UserError(_one_class(named, table, column, options))
    return tuple(named)


def _one_class(named: Sequence[str], table: Table, column: str, options: DataOptions) -> str:
    """One class leaves nothing to tell apart, and transformers reads a model with one label as a regression."""
    if options.labels is not None:
        return "data.labels names fewer than two classes. Name every class, in index order."
    found = f"one class alone, '{named[0]}'" if named else "no label at all"
    return (
        f"{table.name}: '{column}' holds {found}: there is nothing to tell apart. "
        "Mend the data, or name all classes in data.labels. (A regression's labels are numbers: data.num_labels: 1.)"
    )


def _read_names(values: Sequence[Any], table: Table, column: str, num_labels: int | None) -> list[str]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {str}:
        return sorted(set(values) - {None}, key=lambda name: (name != "O", name))
    if not kinds <= {int, bool}:
        # one fraction makes a whole column floats: it is the fraction that tells
        wrong = next((value for value in values if isinstance(value, float) and value % 1), values[0])
        raise UserError(
            f"{table.name}: '{column}' holds {wrong!r}, which is no class. Labels are names or whole numbers; "
            "for a regression write data.num_labels: 1."
        )
    size = num_labels or max((int(value) for value in values if value is not None), default=-1) + 1
    names = [str(index) for index in range(size)]
    if f"{column}_text" in table.columns:
        for index, text in zip(values, table.rows[f"{column}_text"], strict=False):
            if index is not None and 0 <= index < size and isinstance(text, str):
                names[index] = text
    return names if len(set(names)) == size else [str(index) for index in range(size)]


def index_of(value: Any, names: Sequence[str], where: str, column: str) -> int:
    """The class index of a label; `where` names its row in the error."""
    if isinstance(value, str):
        if value not in names:
            raise UserError(
                f"{where}: '{column}' is '{value}', which is no known label.{did_you_mean(value, names)} "
                "data.labels lists them all, in index order."
            )
        return names.index(value)
    if value is None:
        raise UserError(f"{where}: '{column}' is missing. Drop the rows without a label.")
    if not isinstance(value, int):
        raise UserError(
            f"{where}: '{column}' is {value!r}, which is no class. For a regression write data.num_labels: 1."
        )
    if not 0 <= value < len(names):
        hint = "Drop the rows without a label." if value < 0 else "Mend the row, or raise data.num_labels."
        raise UserError(f"{where}: '{column}' is {value}, out of the range 0..{len(names) - 1}. {hint}")
    return int(value)
