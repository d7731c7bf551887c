"""Whether another half of the calibration data would give the same ranking, and whether an earlier analysis did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from dsfreeze.errors import UserError
from dsfreeze.ranking import examples_needed, spearman
from dsfreeze.scores import SCORES, Observations, Scores

#: Sources of which there are two runs, one for each half, and so one comparison.
_ONCE = ("probe", "gates")


@dataclass(frozen=True)
class Stability:
    """Mean Spearman correlation of the layers' ranks between halves of the data; None for a score that needs no data.
    `needed`: examples that would make it `ranking.STABLE`, by the Spearman-Brown formula; None where none would."""

    spearman: float | None
    needed: int | None


def stability_of(name: str, seen: Observations, examples: int, *, splits: int, seed: int) -> Stability:
    """Over `splits` random halvings of the rows that the score is made of; `examples` is how many there are in all."""
    score = SCORES[name]
    if score.source == "spectra":
        return Stability(None, None)
    random = np.random.default_rng(seed)
    found = []
    for _ in range(1 if score.source in _ONCE else splits):
        one, other = (layer_scores(score.compute(half), seen) for half in seen.halves(random))
        found.append(spearman(one, other))
    agreement = fmean(found)
    return Stability(agreement, examples_needed(agreement, examples))


def layer_scores(scores: Scores, seen: Observations) -> list[float]:
    return [scores[name] for name in seen.blocks]


def drift_between(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """How far an earlier analysis of this model was from this one: `spearman` of each score's layers, for scores that both
    took, and `ends`, the median ends of freezing (before, now) by gain."""
    found = {}
    for name in set(now["all"]) & set(before["all"]):
        sides = [content["all"][name]["scores"] for content in (now, before)]
        layers = [key for key in sides[0] if key.startswith("layers.")]
        found[name] = spearman(*([side[key] for key in layers] for side in sides))
    ends = {
        gain: (before["cuts"][gain]["dataset"]["median"], cuts["dataset"]["median"])
        for gain, cuts in now["cuts"].items()
        if gain in before["cuts"]
    }
    return {"spearman": found, "ends": ends}


def read_analysis(path: Path) -> dict[str, Any]:
    """What an analysis wrote; UserError when the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content["model"]["digest"], str) and isinstance(content["all"], dict):
            return content
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no analysis ({error!r}). Name a scores.json that `dsfreeze analyze` wrote."
        ) from None
    raise UserError(f"{path} is no analysis. Name a scores.json that `dsfreeze analyze` wrote.")
