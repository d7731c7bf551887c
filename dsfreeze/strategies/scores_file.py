"""The scores file that `ranked` and `owlore` read: `{"scores": {"layers.0": 0.12, ...}}`, one number per layer or tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.recipe import SCORES_FORM
from dsfreeze.strategies.selection import Unit


def read_scores(path: Path) -> dict[str, float]:
    """Scores by name; UserError when the file is missing, is no such JSON, or holds something that has no order."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"freeze.scores: there is no file '{path}'. It holds JSON: {SCORES_FORM}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"freeze.scores: '{path}' cannot be read as JSON: {error}.") from None
    scores = raw.get("scores") if isinstance(raw, dict) else None
    if not isinstance(scores, dict):
        raise UserError(f"freeze.scores: '{path}' has no \"scores\"; write {SCORES_FORM}.")
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"freeze.scores: '{path}' gives {name} the score {value!r}, which is not a number.")
        if not isfinite(value):
            raise UserError(f"freeze.scores: '{path}' gives {name} the score {value}, which cannot be ranked.")
    return scores


def lowest(scores: dict[str, float], units: Sequence[Unit], number: int, path: Path) -> list[int]:
    """Indices of the `number` lowest-scored units, equals from the bottom; UserError when one has no score."""
    values = scores_of(scores, units, path)
    return sorted(range(len(units)), key=lambda index: (values[index], index))[:number]


def weights_of(scores: dict[str, float], units: Sequence[Unit], number: int, path: Path) -> list[float]:
    """Scores as weights of a draw of `number` units; UserError when one is negative, or too few can be drawn."""
    values = scores_of(scores, units, path)
    for unit, value in zip(units, values, strict=True):
        if value < 0:
            raise UserError(
                f"freeze.scores: '{path}' gives {unit.name} the score {value}, but a score here is the weight of a "
                "draw. Write 0 for what shall never train, and a positive number for the rest."
            )
    positive = sum(value > 0 for value in values)
    if positive < number:
        raise UserError(
            f"freeze.scores: '{path}' gives only {positive} of {len(units)} units a score above 0, and {number} train "
            f"at once. Score more of them, or lower freeze.active_layers."
        )
    return values


def scores_of(scores: dict[str, float], units: Sequence[Unit], path: Path) -> list[float]:
    """The score of each unit; UserError when one has none."""
    missing = [unit.name for unit in units if unit.name not in scores]
    if missing:
        raise UserError(
            f"freeze.scores: '{path}' has no score for {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f".{did_you_mean(missing[0], scores, how_many_listed=0)} Scores must be those of this model, by layer "
            "for freeze.granularity layer, by tensor for matrix or category."
        )
    return [scores[unit.name] for unit in units]
