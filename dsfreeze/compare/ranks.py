"""Average ranks, as in paper 1 (docs/methods.md): Friedman's test, Nemenyi's critical difference (Demsar 2006, JMLR 7:1-30). No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsfreeze.compare.blocks import Scores, Unit, mean, paired

#: Up to so many blocks Friedman's p by the chi-square distribution is rough (scipy's documentation).
FEW_BLOCKS = 10


@dataclass(frozen=True)
class Friedman:
    """Do the methods' ranks differ at all? Corrected for ties; p by the chi-square distribution with k - 1 degrees of freedom.
    `least_p`: of methods that have the same order in all N blocks, where the statistic is N (k - 1)."""

    statistic: float
    p: float
    least_p: float


@dataclass(frozen=True)
class Missing:
    """What ranks are without. `absent`: methods without any score. `num_blocks`: blocks that some ranked method has and another lacks;
    `lacking`: how many of them each lacks, `alone`: how many it is the only one to lack."""

    absent: tuple[str, ...]
    num_blocks: int
    lacking: Mapping[str, int]
    alone: Mapping[str, int]


@dataclass(frozen=True)
class Ranks:
    """Over the `num_blocks` units that all `methods` have; best first, 1 is best, ties share their mean rank.

    `scores`: each method's mean over the same units. `friedman` is None for fewer than three methods or two units, or where all tie
    everywhere; `critical_difference` (at the family's alpha) where there is nothing to rank. `groups`: largest sets of methods no two of which
    differ by more than it.
    """

    methods: tuple[str, ...]
    average: Mapping[str, float]
    scores: Mapping[str, float]
    num_blocks: int
    missing: Missing
    friedman: Friedman | None
    critical_difference: float | None
    groups: tuple[tuple[str, ...], ...]


def rank_methods(scores: Scores, unit: Unit, alpha: float) -> Ranks:
    """Of all methods that have any score."""
    present = [method for method, own in scores.items() if own]
    rows = paired(scores, present, unit) if present else []
    columns = dict(zip(present, zip(*_ranked(rows), strict=True), strict=True)) if rows else {}
    average = {method: mean(column) for method, column in columns.items()}
    order = tuple(sorted(average, key=lambda method: average[method]))
    difference = critical_difference(len(order), len(rows), alpha) if len(order) > 1 else None
    return Ranks(
        methods=order,
        average={method: average[method] for method in order},
        scores={method: mean(row[present.index(method)] for row in rows) for method in order},
        num_blocks=len(rows),
        missing=_missing(scores, present),
        friedman=_friedman(rows),
        critical_difference=difference,
        groups=_groups(average, order, difference) if difference is not None else (),
    )


def _ranked(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    if not rows:
        return []
    from scipy.stats import rankdata

    return [list(map(float, row)) for row in rankdata([[-score for score in row] for row in rows], axis=1)]


def _friedman(rows: Sequence[Sequence[float]]) -> Friedman | None:
    if len(rows) < 2 or len(rows[0]) < 3 or all(len(set(row)) == 1 for row in rows):
        return None
    from scipy.stats import chi2, friedmanchisquare

    found, freedom = friedmanchisquare(*zip(*rows, strict=True)), len(rows[0]) - 1
    return Friedman(float(found.statistic), float(found.pvalue), float(chi2.sf(len(rows) * freedom, freedom)))


def critical_difference(num_methods: int, num_blocks: int, alpha: float) -> float:
    """Average ranks further apart than this differ (Nemenyi): q sqrt(k (k + 1) / 6N), q the studentized range over sqrt 2."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - alpha, num_methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(num_methods * (num_methods + 1) / (6 * num_blocks))


def _groups(average: Mapping[str, float], order: Sequence[str], difference: float) -> tuple[tuple[str, ...], ...]:
    """Runs of neighbours within the difference that no longer run holds; two methods at least."""
    groups: list[tuple[str, ...]] = []
    for start, method in enumerate(order):
        group = tuple(other for other in order[start:] if average[other] - average[method] <= difference)
        if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
            groups.append(group)
    return tuple(groups)


def _missing(scores: Scores, present: Sequence[str]) -> Missing:
    every = {block for method in present for block in scores[method]}
    without = [[m for m in present if block not in scores[m]] for block in every]
    without = [methods for methods in without if methods]
    return Missing(
        absent=tuple(method for method in scores if method not in present),
        num_blocks=len(without),
        lacking={m: number for m in present if (number := sum(m in methods for methods in without))},
        alone={m: number for m in present if (number := without.count([m]))},
    )
