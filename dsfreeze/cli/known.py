"""What is known of a recipe's model and run before data or weights are read."""

from __future__ import annotations

from typing import Any

from dsfreeze.recipe import BUILTIN_ROWS, Recipe

#: Number of classes of built-in data, known without importing what makes them.
BUILTIN_LABELS: dict[str | None, int] = {BUILTIN_ROWS: 3}


def anatomy_of(recipe: Recipe) -> tuple[Any, tuple[str, ...]]:
    """An anatomy that is shipped or was added (no torch), else read on the meta device; notes on guesses."""
    from dsfreeze.shapes import known_anatomy

    num_labels, notes = _num_labels(recipe)
    known = known_anatomy(recipe.model.name, recipe.task, num_labels)
    if known is not None:
        return known, notes
    from dsfreeze import model

    return model.anatomy_of(recipe.model, recipe.task, num_labels), notes


def num_steps_of(recipe: Recipe) -> int | None:
    """The run's length as far as it is known without reading the data."""
    return recipe.train.max_steps if recipe.train.max_steps > 0 else None


def _num_labels(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    """How many classes the head has, as far as is known without reading the data."""
    data = recipe.data
    known = len(data.labels or ()) or data.num_labels or BUILTIN_LABELS.get(data.train or data.eval)
    if known or recipe.task not in ("classification", "tokens"):
        return known or 2, ()
    return 2, ("the head is taken to have 2 labels, for the data are not read here; data.num_labels sets their number",)
