"""What is computed by resampling: intervals of means, and the sign-flip test. numpy and scipy, imported when used.

Everything is seeded, and drawn anew for each sample size: the numbers of one sample depend on that sample alone, whatever else is
summarised beside it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

#: Coverage that an interval aims at.
LEVEL = 0.95
#: Resamples of a bootstrap: from one seed of theirs to the next an interval's ends move by 0.01 to 0.03 deviations of the sample.
NUM_RESAMPLES = 4000
#: Up to this many sign flips all are counted, above it as many are drawn.
NUM_FLIPS = 2**14
#: Chance with which a detectable difference is found.
POWER = 0.8

Result = TypeVar("Result")
Kind = Literal["BCa", "percentile"]


@dataclass(frozen=True)
class Interval:
    """Of a mean. `kind`: BCa (bias-corrected and accelerated; Efron 1987), or percentile where BCa is not defined."""

    low: float
    high: float
    kind: Kind


def intervals(samples: Sequence[Sequence[float]], seed: int) -> list[Interval | None]:
    """Bootstrap intervals of the samples' means; None where a sample has fewer than two values or all are equal.

    Of few values a bootstrap knows little: simulated on normal values, an interval of 95 % holds the mean in 72 % of cases for 3 values,
    84 % for 5, 90 % for 10 (tests/test_compare_statistics.py has the first two).
    """
    return _by_length(samples, lambda alike: _bootstrap(alike, seed))


def _bootstrap(samples: Sequence[Sequence[float]], seed: int) -> list[Interval | None]:
    """Of samples of one length."""
    found: list[Interval | None] = [None] * len(samples)
    kinds: tuple[Kind, ...] = ("BCa", "percentile")
    for kind in kinds:
        rows = [row for row, sample in enumerate(samples) if found[row] is None and len(set(sample)) > 1]
        for row, (low, high) in zip(rows, _ends([samples[row] for row in rows], kind, seed), strict=True):
            found[row] = Interval(low, high, kind) if math.isfinite(low) and math.isfinite(high) else None
    return found


def _ends(samples: list[Sequence[float]], kind: Kind, seed: int) -> list[tuple[float, float]]:
    """Low and high of each; NaN where not defined. The places of the values are resampled once for all samples, and a resample's mean is the
    product of the values and how often each place was drawn, which takes a tenth of the time. Rounded to 1e-9: BCa counts the resamples whose mean
    is the sample's own, and the last bits of a product depend on where in the matrix it stands."""
    import numpy as np
    from scipy.stats import bootstrap

    if not samples:
        return []
    values = np.asarray(samples, dtype=float)
    number = values.shape[1]

    def means(places: Any, axis: int) -> Any:
        drawn = np.atleast_2d(places)
        cells = drawn + number * np.arange(len(drawn))[:, None]
        counts = np.bincount(cells.ravel(), minlength=number * len(drawn)).reshape(len(drawn), number)
        return (values @ counts.T / drawn.shape[1]).round(9).reshape(len(values), *places.shape[:-1])

    with warnings.catch_warnings():  # where BCa is not defined it warns and gives NaN
        warnings.simplefilter("ignore")
        ends = bootstrap(
            (np.arange(number),), means, axis=-1, vectorized=True, n_resamples=NUM_RESAMPLES, method=kind, confidence_level=LEVEL,
            rng=np.random.default_rng(seed),
        ).confidence_interval  # fmt: skip
    return list(zip(map(float, ends.low), map(float, ends.high), strict=True))


def sign_flips(samples: Sequence[Sequence[float]], seed: int) -> list[float]:
    """Two-sided p of each sample of paired differences: how often random signs give a mean as far from 0 as the one found.

    If two methods do the same, each difference has either sign with equal chance (Fisher 1935). Exact up to NUM_FLIPS flips, ties and zeros
    included; above that from NUM_FLIPS - 1 draws and the flip found itself, (1 + hits) / NUM_FLIPS, which is valid too (Phipson & Smyth
    2010). An empty sample has p = 1.
    """
    return _by_length(samples, lambda alike: _flipped(alike, seed))


def _flipped(samples: Sequence[Sequence[float]], seed: int) -> list[float]:
    import numpy as np

    values = np.asarray(samples, dtype=float)
    signs = _signs(values.shape[1], seed)
    sums, found = np.abs(signs @ values.T), np.abs(values.sum(1))
    reached = sums >= found - 1e-9 * np.abs(values).sum(1)
    return [float(share) for share in reached.mean(0)]


@functools.lru_cache(maxsize=8)
def _signs(number: int, seed: int) -> Any:
    """Rows of +1 and -1, the first row all +1. The first column stays +1: turning a whole row round changes no distance from 0."""
    import numpy as np

    if exact(number):
        bits = np.arange(2 ** max(0, number - 1))[:, None] >> np.arange(number)[None, ::-1] & 1
    else:
        bits = np.random.default_rng(seed).integers(0, 2, (NUM_FLIPS, number), dtype=np.int8)
        bits[0] = 0
    return 1.0 - 2.0 * bits


def exact(number: int) -> bool:
    """Whether all sign flips of so many differences are counted."""
    return number <= math.log2(NUM_FLIPS)


def least_p(number: int) -> float:
    """The smallest p that so many differences can have: all of one sign."""
    return min(1.0, 2.0 / 2**number) if exact(number) else 1.0 / NUM_FLIPS


@functools.cache
def detectable_effect(number: int, alpha: float) -> float:
    """The mean of so many normal differences, in their deviations, that is found at `alpha` with chance POWER; infinite where none is.

    The larger of two: the paired t-test's (noncentral t; the sign-flip test has the same power in large samples), and, where p reaches
    alpha only when all signs agree, that of POWER for all signs to agree. Where p reaches alpha in a few outcomes only it is a little too small:
    simulated, the test finds it with a chance of 0.77 to 0.81 at 0.05, 0.66 at worst (14 differences at 0.05 / 190).
    """
    if least_p(number) > alpha or number < 2:
        return math.inf
    from scipy.optimize import brentq
    from scipy.stats import nct, norm, t

    edge, root = t.isf(alpha / 2, number - 1), math.sqrt(number)
    effect = float(brentq(lambda d: nct.sf(edge, number - 1, d * root) - POWER, 0, 4 * (edge + 2) / root))
    agreeing = float(norm.ppf(POWER ** (1 / number))) if least_p(number) * 2 > alpha else 0.0
    return max(effect, agreeing)


def _by_length(
    samples: Sequence[Sequence[float]], compute: Callable[[list[Sequence[float]]], list[Result]]
) -> list[Any]:
    """`compute` on the samples of each length at once, its results in the order of the samples."""
    found: list[Any] = [None] * len(samples)
    for length in sorted(set(map(len, samples))):
        rows = [row for row, sample in enumerate(samples) if len(sample) == length]
        for row, result in zip(rows, compute([samples[row] for row in rows]), strict=True):
            found[row] = result
    return found
