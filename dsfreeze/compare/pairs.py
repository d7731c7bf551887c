"""Every pair of methods: the difference, its interval, a paired test, Holm's correction. No torch.

The test is a sign-flip permutation test of the mean difference, not Wilcoxon's: its statistic is the number that the table shows, it is
exact for few blocks and stays so with ties and zeros (frequent, where two methods get the same examples right), for which the exact
Wilcoxon test is not defined. Both need six blocks before any p can fall below 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from dsfreeze.compare.blocks import Scores, Unit, deviation, mean, paired
from dsfreeze.compare.resampling import Interval, detectable_effect, intervals, least_p, sign_flips

#: Chance of calling a difference where there is none, for all pairs of a family together.
ALPHA = 0.05
#: What a pair's test found. `too few`: the smallest p that so many blocks can give would be no difference, were it the smallest of the family.
Outcome = Literal["first", "second", "none", "too few"]


@dataclass(frozen=True)
class Pair:
    """Two methods over the `num_blocks` units that both have. `difference`: mean of first - second, in points of score, None without blocks.

    `interval`: bootstrap, of this pair alone, not corrected. `holm`: p corrected over all pairs of the family. `detectable`: the
    difference that would have been found with chance POWER, for the deviation seen; None where no difference would have been.
    """

    first: str
    second: str
    num_blocks: int
    difference: float | None
    interval: Interval | None
    wins: int
    ties: int
    p: float
    holm: float
    detectable: float | None
    outcome: Outcome

    @property
    def losses(self) -> int:
        return self.num_blocks - self.wins - self.ties


def compare_pairs(
    scores: Scores, methods: Sequence[str], unit: Unit, alpha: float, seed: int, against: str | None = None
) -> list[Pair]:
    """All pairs of the methods, in their order; or, asking fewer questions, each with one of them."""
    names = [pair for pair in combinations(methods, 2) if against is None or against in pair]
    samples = [[a - b for a, b in paired(scores, pair, unit)] for pair in names]
    found = sign_flips(samples, seed)
    return [
        _pair(*each, alpha, len(names))
        for each in zip(names, samples, intervals(samples, seed), found, holm(found), strict=True)
    ]


def _pair(
    names: tuple[str, str], sample: list[float], interval: Interval | None, p: float, corrected: float, alpha: float, num_pairs: int
) -> Pair:  # fmt: skip
    difference = mean(sample) if sample else None
    effect = detectable_effect(len(sample), alpha / num_pairs)
    return Pair(
        *names,
        num_blocks=len(sample),
        difference=difference,
        interval=interval,
        wins=sum(each > 0 for each in sample),
        ties=sum(each == 0 for each in sample),
        p=p,
        holm=corrected,
        detectable=effect * deviation(sample) if math.isfinite(effect) else None,
        outcome=_outcome(difference, corrected, alpha, least_p(len(sample)) * num_pairs),
    )


def _outcome(difference: float | None, corrected: float, alpha: float, least: float) -> Outcome:
    if difference is not None and corrected <= alpha:
        return "first" if difference > 0 else "second"
    return "too few" if least > alpha else "none"


def holm(ps: Sequence[float]) -> list[float]:
    """The p of each test corrected for all of them (Holm 1979): the k-th smallest times what is left, never below an earlier one."""
    corrected, largest = [1.0] * len(ps), 0.0
    for done, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, ps[index] * (len(ps) - done)))
        corrected[index] = largest
    return corrected


def least_blocks(num_pairs: int, alpha: float) -> int | None:
    """The fewest blocks with which a p can reach `alpha` after Holm's correction over so many pairs; None where the flips drawn are too few."""
    return next((number for number in range(1, 64) if least_p(number) * num_pairs <= alpha), None)
