"""Rankings: how far two of them agree, and how many examples make one stable. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import correlation

#: Below this rank correlation of two halves, or of two moments of a run, a ranking is called unstable (ours).
STABLE = 0.8


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; where one ranking is all ties: 1 if both are, else 0."""
    ranks = _ranks(first), _ranks(second)
    if any(len(set(own)) == 1 for own in ranks):
        return float(ranks[0] == ranks[1])
    return correlation(*ranks)


def examples_needed(half: float, examples: int) -> int | None:
    """How many examples would make two halves agree by STABLE, when `examples` of them, halved, agree by `half`.

    The Spearman-Brown formula: k times as many examples a half raise the agreement r to k r / (1 + (k - 1) r). None when
    the halves do not agree at all, since then no number follows from them.
    """
    if half <= 0:
        return None
    if half >= 1:
        return 2
    needed = examples * STABLE * (1 - half) / (half * (1 - STABLE))
    return max(2, math.ceil(needed - 1e-9 * needed))  # a whole number stays one when rounding puts it just above


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    return [order.index(value) + (order.count(value) - 1) / 2 for value in values]
