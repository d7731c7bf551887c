"""Rankings. Oracles: scipy.stats.spearmanr, and the Spearman-Brown formula, into which the result is put back."""

from __future__ import annotations

from fractions import Fraction
from random import Random

import pytest
from scipy.stats import spearmanr

from dsfreeze.ranking import STABLE, examples_needed, spearman


@pytest.mark.parametrize("kinds", [2, 3, 7, None], ids=lambda kinds: f"kinds-{kinds}")
def test_spearman_is_scipys(kinds):
    """Oracle: scipy, without ties (kinds None) and with many."""
    random = Random(kinds or 0)
    for _ in range(60):
        size = random.randint(3, 40)
        first, second = (
            [random.random() if kinds is None else float(random.randrange(kinds)) for _ in range(size)] for _ in "ab"
        )
        if len(set(first)) > 1 and len(set(second)) > 1:
            assert spearman(first, second) == pytest.approx(float(spearmanr(first, second).statistic), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "agreement"),
    [
        ([1, 1, 1], [2, 2, 2], 1), ([1, 1, 1], [1, 2, 3], 0), ([1, 2, 3], [5, 5, 5], 0), ([4], [-7], 1),
        ([1, 2], [3, 4], 1), ([1, 2], [4, 3], -1), ([-1e300, 0, 1e300], [1, 2, 3], 1),
    ],
)  # fmt: skip
def test_degenerate_rankings(first, second, agreement):
    """Oracle: two rankings without any order agree, one without and one with an order do not, and one place is one order."""
    assert spearman(first, second) == pytest.approx(agreement)
    assert spearman(second, first) == pytest.approx(agreement)


def test_only_the_order_counts():
    """Oracle: ranks do not change under a rising function, and turn round under a falling one."""
    random = Random(3)
    first, second = ([random.random() for _ in range(20)] for _ in "ab")
    agreement = spearman(first, second)
    assert spearman([value**3 - 5 for value in first], second) == pytest.approx(agreement)
    assert spearman([-value for value in first], second) == pytest.approx(-agreement)


def brown(half: float, times: Fraction) -> Fraction:
    """The agreement of halves of `times` as many examples, exactly."""
    r = Fraction(half)
    return times * r / (1 + (times - 1) * r)


@pytest.mark.parametrize("examples", [2, 16, 64, 1000])
def test_examples_needed_are_enough_and_one_fewer_are_not(examples):
    """Oracle: the closed form in exact arithmetic."""
    random = Random(examples)
    for half in [*(random.uniform(0.02, 0.99) for _ in range(200)), 0.79, 0.81, 0.95]:
        needed = examples_needed(half, examples)
        assert needed is not None
        assert brown(half, Fraction(needed, examples)) >= STABLE - 1e-9
        assert needed == 2 or brown(half, Fraction(needed - 1, examples)) < STABLE


@pytest.mark.parametrize(
    ("half", "examples", "needed"),
    [(0.5, 64, 256), (0.8, 64, 64), (0.2, 64, 1024), (0.4, 10, 60), (1.0, 64, 2), (1.2, 64, 2), (0.9999, 4, 2)],
)
def test_whole_numbers_and_bounds(half, examples, needed):
    """Oracle: k = 4 (1 - r) / r by hand; two halves hold one example each at least."""
    assert examples_needed(half, examples) == needed


@pytest.mark.parametrize("half", [0.0, -0.3, -1.0])
def test_no_number_follows_from_halves_that_do_not_agree(half):
    assert examples_needed(half, 64) is None
