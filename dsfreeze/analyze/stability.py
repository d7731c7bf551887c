"""Whether another half of the calibration data would give the same ranking, and whether an earlier analysis did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from dsfreeze.ranking import examples_needed, spearman
from dsfreeze.scores import DATA_FREE, SCORES, Observations, Scores


@dataclass(frozen=True)
class Stability:
    """Mean Spearman correlation of the layers' ranks between halves of the data; None for a score that needs no data.
    `needed`: examples that would make it `ranking.STABLE`, by the Spearman-Brown formula; None where none would."""

    spearman: float | None
    needed: int | None


def stabilities_of(
    names: Iterable[str], seen: Observations, examples: int, *, splits: int, seed: int
) -> dict[str, Stability]:
    """Of each score, over `splits` random halvings of the rows that it is made of; `examples` is how many there are in all.
    Of a probe or a fit there is one run for each half, and so one comparison, whatever the halving."""
    random = np.random.default_rng(seed)
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(splits):
        halves = seen.halves(random)
        for name in (name for name in found if SCORES[name].source not in DATA_FREE):
            found[name].append(spearman(*(_of_layers(SCORES[name].compute(half), half) for half in halves)))
    return {name: _stability(agreements, examples) for name, agreements in found.items()}


def _stability(agreements: Sequence[float], examples: int) -> Stability:
    if not agreements:
        return Stability(None, None)
    agreement = fmean(agreements)
    return Stability(agreement, examples_needed(agreement, examples))


def _of_layers(scores: Scores, seen: Observations) -> list[float]:
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
