"""The scores file that `ranked`, `owlore`, `budget`, `salf` and `half` read: `{"scores": {"layers.0": 0.12, ...}}`, one number per
layer or tensor. `dsfreeze analyze` writes more into it: every score it took (`all`), traces, and which model it is about."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import parse_json
from dsfreeze.recipe import SCORES_FORM
from dsfreeze.strategies.selection import Unit


def read_scores(path: Path, score: str | None = None, anatomy: Anatomy | None = None) -> dict[str, float]:
    """Scores by name: those of the score named, else the file's own choice. UserError when the file is missing, is no such
    JSON, was made for another model than `anatomy`, lacks the score, or holds something that has no order."""
    raw = _read(path, anatomy)
    if score is None:
        return _checked(path, raw.get("scores"))
    known = raw.get("all")
    own = known.get(score) if isinstance(known, dict) else None
    if not isinstance(own, dict):
        names = known if isinstance(known, dict) else ()
        raise UserError(
            f"freeze.score: '{path}' has no score '{score}'.{did_you_mean(score, names)} Leave freeze.score out to take "
            "the file's own choice, or take the score: `dsfreeze analyze RECIPE`."
        )
    return _checked(path, own.get("scores"))


def read_traces(path: Path, trace: str, anatomy: Anatomy) -> list[list[float]]:
    """Of each calibration example the deviations d_0 .. d_L; UserError as above, and when they are no such lists."""
    known = _read(path, anatomy).get("traces")
    if not isinstance(known, dict) or trace not in known:
        names = known if isinstance(known, dict) else ()
        raise UserError(
            f"freeze.scores: '{path}' holds no traces '{trace}'.{did_you_mean(trace, names)} "
            "Measure them: `dsfreeze analyze RECIPE analyze.scores=deviation`."
        )
    rows, length = known[trace], len(anatomy.blocks) + 1
    right = isinstance(rows, list) and rows and all(isinstance(row, list) and len(row) == length for row in rows)
    if not right:
        raise UserError(
            f"freeze.scores: the traces of '{path}' must be lists of {length} numbers, one for the embedding and each layer."
        )
    for number, row in enumerate(rows):
        _checked(path, {f"traces.{trace}[{number}][{k}]": value for k, value in enumerate(row)})
    return [[float(value) for value in row] for row in rows]


def read_analysis(path: Path) -> dict[str, Any]:
    """What an analysis wrote; UserError when the file is none."""
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(content["model"]["digest"], str) and isinstance(content["all"], dict):
            return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no analysis ({error!r}). Name a scores.json that `dsfreeze analyze` wrote."
        ) from None
    raise UserError(f"{path} is no analysis. Name a scores.json that `dsfreeze analyze` wrote.")


def model_digest(anatomy: Anatomy) -> str:
    """SHA-256 over names and shapes of the transformer layers' tensors: what scores are about, whatever the head."""
    rows = [(layer.name, t.name, t.shape) for layer in anatomy.blocks for t in layer.tensors]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read(path: Path, anatomy: Anatomy | None) -> dict[str, Any]:
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"freeze.scores: there is no file '{path}'. It holds JSON: {SCORES_FORM}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"freeze.scores: '{path}' cannot be read as JSON: {error}. It holds {SCORES_FORM}.") from None
    if not isinstance(raw, dict):
        raise UserError(f"freeze.scores: '{path}' has no \"scores\"; write {SCORES_FORM}.")
    model = raw.get("model")
    model = model if isinstance(model, dict) else {}
    digest = model.get("digest")  # a file written by hand need have none
    if anatomy is not None and digest is not None and digest != model_digest(anatomy):
        raise UserError(
            f"freeze.scores: '{path}' was made for {model.get('name')} with {model.get('layers')} layers, and its tensors "
            f"are not those of {anatomy.name} ({len(anatomy.blocks)} layers). Analyze this model: `dsfreeze analyze RECIPE`."
        )
    return raw


def _checked(path: Path, scores: Any) -> dict[str, float]:
    if not isinstance(scores, dict):
        raise UserError(f"freeze.scores: '{path}' has no \"scores\"; write {SCORES_FORM}.")
    for name, value in scores.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(
                f"freeze.scores: '{path}' gives {name} the score {value!r}, which is not a number. Write one."
            )
        if not abs(value) <= sys.float_info.max:  # NaN, infinity, or an integer beyond every float
            raise UserError(
                f"freeze.scores: '{path}' gives {name} the score {value}, which cannot be ranked. Write a finite number."
            )
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
            "where freeze.granularity (of half, freeze.level) is layer, by tensor elsewhere."
        )
    return [scores[unit.name] for unit in units]
