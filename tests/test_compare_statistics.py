"""What a comparison's numbers say. Oracles: scipy's own functions, brute force, published tables and worked examples, sums by hand."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import statistics

import numpy as np
import pytest
import scipy.stats
from compare_cells_kit import cell, cells_of, random_cells
from rich.console import Console

from dsfreeze.compare import rows
from dsfreeze.compare.blocks import paired, scores_of
from dsfreeze.compare.pairs import compare_pairs, holm, least_blocks
from dsfreeze.compare.pareto import pareto_fronts
from dsfreeze.compare.ranks import Missing, critical_difference, rank_methods
from dsfreeze.compare.resampling import (
    LEVEL,
    NUM_FLIPS,
    NUM_RESAMPLES,
    detectable_effect,
    intervals,
    least_p,
    sign_flips,
)
from dsfreeze.compare.statistics import SEED, summarise
from dsfreeze.compare.tables import comparison_tables
from dsfreeze.compare.verdicts import family_verdict, lost_verdict, pair_verdict, rank_verdict, rate_verdict

#: Ranks of table 6 of Demsar 2006: four trees (C4.5, +m, +cf, +m+cf) on 14 data sets.
DEMSAR = [
    (4, 3, 2, 1), (1, 2, 3, 4), (4, 1, 2, 3), (4, 1, 3, 2), (4, 2, 3, 1), (1, 2.5, 4, 2.5), (3, 2, 4, 1), (2.5, 2.5, 4, 1),
    (4, 3, 2, 1), (2.5, 2.5, 2.5, 2.5), (4, 2.5, 1, 2.5), (3, 2, 4, 1), (4, 1, 2, 3), (3, 1, 4, 2),
]  # fmt: skip
TREES = ("C4.5", "C4.5+m", "C4.5+cf", "C4.5+m+cf")


def demsar_cells():
    """Scores that have those ranks."""
    return {
        key: value
        for number, ranks in enumerate(DEMSAR)
        for name, rank in zip(TREES, ranks, strict=True)
        for key, value in cell(name, f"set{number:02}", 1, 50 - rank).items()
    }


# -- one method on one case ----------------------------------------------------------------------------------------


def test_mean_and_deviation_over_seeds():
    """70, 72, 77: mean 73, squares 9 + 1 + 16 over 2."""
    (score,) = summarise(cells_of({"full": {"rte": [70, 72, 77]}})).cases
    assert (score.mean, score.seeds, score.scores) == (73, (1, 2, 3), (70, 72, 77))
    assert score.deviation == pytest.approx(13**0.5)


def test_an_interval_is_scipys_of_that_sample_alone():
    """Oracle: scipy.stats.bootstrap, one sample at a time; so no interval depends on what else is summarised."""
    draw = np.random.default_rng(3)
    samples = [draw.normal(70, 2, size).tolist() for size in (3, 5, 3, 8)]
    for sample, found in zip(samples, intervals(samples, seed=7), strict=True):
        own = scipy.stats.bootstrap(
            (sample,), lambda x, axis: np.mean(x, axis=axis).round(9), vectorized=True, n_resamples=NUM_RESAMPLES, confidence_level=LEVEL, method="BCa",
            rng=np.random.default_rng(7),
        ).confidence_interval  # fmt: skip
        assert found.kind == "BCa"
        assert (found.low, found.high) == pytest.approx((own.low, own.high), rel=1e-12)


@pytest.mark.parametrize("sample", [[], [70.0], [70.0, 70.0, 70.0]])
def test_one_value_or_equal_ones_have_no_interval(sample):
    assert intervals([sample, [1.0, 2.0, 4.0]], seed=1)[0] is None


def test_what_bca_is_not_defined_for_has_the_percentile_interval(monkeypatch):
    """Oracle: scipy's percentile interval; BCa made to fail, as it does where no resample lies below the mean."""
    true = scipy.stats.bootstrap

    def failing(data, *args, method, **more):
        found = true(data, *args, method="percentile", **more)
        if method == "BCa":
            found.confidence_interval = found.confidence_interval._replace(low=np.full(1, np.nan))
        return found

    monkeypatch.setattr(scipy.stats, "bootstrap", failing)
    (found,) = intervals([[1.0, 2.0, 4.0]], seed=1)
    own = true(
        ([1.0, 2.0, 4.0],), np.mean, n_resamples=NUM_RESAMPLES, method="percentile", rng=np.random.default_rng(1)
    )
    assert found.kind == "percentile"
    assert (found.low, found.high) == pytest.approx(tuple(own.confidence_interval))


@pytest.mark.parametrize(("number", "coverage"), [(3, 0.72), (5, 0.84)])
def test_how_often_an_interval_holds_the_mean(number, coverage):
    """The docstring's figures, on 3000 normal samples: deviation of the share below 0.01."""
    samples = np.random.default_rng(0).normal(0, 1, (3000, number)).tolist()
    held = [found.low <= 0 <= found.high for found in intervals(samples, seed=1)]
    assert statistics.fmean(held) == pytest.approx(coverage, abs=0.03)


# -- the paired test -----------------------------------------------------------------------------------------------


def brute_force_p(sample):
    sums = [
        abs(sum(s * v for s, v in zip(signs, sample, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sample))
    ]
    return sum(each >= abs(sum(sample)) - 1e-9 for each in sums) / len(sums)


@pytest.mark.parametrize("sample", [
    [3.0], [1.0, 2.0], [1.0, -2.0, 0.5], [0.0, 0.0, 1.0, 1.0, -1.0], [0.0] * 4, [0.1 * k for k in range(1, 11)], [0.25, 0.5, -0.75, 0.25, -0.25],
])  # fmt: skip
def test_few_differences_have_the_exact_p(sample):
    """Oracles: all sign flips by brute force, and scipy.stats.permutation_test over them."""
    (found,) = sign_flips([sample], seed=1)
    assert found == brute_force_p(sample)
    if len(sample) > 1:
        other = scipy.stats.permutation_test(
            (sample, [0.0] * len(sample)), lambda a, b, axis: np.mean(a - b, axis=axis), permutation_type="samples",
            vectorized=True, n_resamples=np.inf,
        )  # fmt: skip
        assert found == pytest.approx(other.pvalue)


def test_many_differences_have_a_p_from_drawn_flips():
    """Oracle: the exact distribution of the sum of 40 whole numbers, built one number after another. Four standard errors."""
    draw = random.Random(5)
    sample = [draw.randint(-6, 9) for _ in range(40)]
    chances = {0: 1.0}
    for value in sample:
        following: dict[int, float] = {}
        for total, chance in chances.items():
            for sign in (1, -1):
                following[total + sign * value] = following.get(total + sign * value, 0) + chance / 2
        chances = following
    exact = sum(chance for total, chance in chances.items() if abs(total) >= abs(sum(sample)))
    (found,) = sign_flips([list(map(float, sample))], seed=1)
    assert 0.001 < exact < 0.5
    assert found == pytest.approx(exact, abs=4 * (exact * (1 - exact) / NUM_FLIPS) ** 0.5)


def test_no_p_is_zero_and_the_least_is_known():
    """All of one sign is the most extreme outcome there is."""
    for number in (1, 2, 6, 14, 15, 40):
        assert sign_flips([[1.0] * number], seed=1) == [least_p(number)]
    assert least_p(6) == 1 / 32
    assert least_p(40) == 1 / NUM_FLIPS


def test_the_test_holds_its_level():
    """Of 1500 samples without a difference at most alpha are called one (binomial deviation 0.0056)."""
    for number in (8, 20):
        samples = np.random.default_rng(number).standard_t(3, (1500, number)).tolist()
        assert np.mean(np.asarray(sign_flips(samples, seed=1)) <= 0.05) < 0.05 + 3 * 0.0056


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, 0.03 x 2, 0.04 x 1 and not below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.7, 0.6, 0.9]) == [1, 1, 1]
    assert holm([]) == []


def test_the_detectable_effect_is_the_power_tables():
    """Oracle: the paired t-test's table (Cohen 1988; G*Power): at 0.05 and power 0.80, effect 0.5 needs 34 pairs, 0.8 needs 15, 0.2 needs 199."""
    for effect, pairs in ((0.5, 34), (0.8, 15), (0.2, 199)):
        assert detectable_effect(pairs, 0.05) <= effect < detectable_effect(pairs - 1, 0.05)


@pytest.mark.parametrize(("number", "alpha"), [(6, 0.05), (8, 0.05), (13, 0.05), (13, 0.05 / 190), (20, 0.01)])
def test_the_detectable_effect_is_found_four_times_in_five(number, alpha):
    """Oracle: the test itself on 2000 normal samples of that effect."""
    effect = detectable_effect(number, alpha)
    samples = np.random.default_rng(1).normal(effect, 1, (2000, number)).tolist()
    assert np.mean(np.asarray(sign_flips(samples, seed=1)) <= alpha) == pytest.approx(0.8, abs=0.06)


def test_five_blocks_can_show_nothing():
    assert detectable_effect(5, 0.05) == math.inf
    assert least_blocks(1, 0.05) == 6
    assert least_blocks(190, 0.05) == 13  # 190 x 2 / 2**13 = 0.046


# -- pairs ---------------------------------------------------------------------------------------------------------


def pair_of(cells, unit="run"):
    scores = scores_of(cells)
    return compare_pairs(scores, list(scores), unit, 0.05, SEED)[0]


def test_runs_are_paired_by_task_and_seed():
    """Differences 1, -2 | 3: the run that one method lacks pairs with nothing."""
    cells = cells_of({"a": {"x": [71, 60], "y": [83, 99]}, "b": {"x": [70, 62], "y": [80]}})
    pair = pair_of(cells)
    assert (pair.num_blocks, pair.wins, pair.ties, pair.losses) == (3, 2, 0, 1)
    assert pair.difference == pytest.approx(2 / 3)
    assert pair.p == brute_force_p([1, -2, 3])


def test_a_case_is_the_mean_over_the_seeds_that_both_have():
    cells = cells_of({"a": {"x": [71, 60], "y": [83, 99]}, "b": {"x": [70, 62], "y": [80]}})
    assert paired(scores_of(cells), ["a", "b"], "case") == [[65.5, 66], [83, 80]]


def test_sizes_and_models_are_cases_of_their_own():
    cells = (
        cells_of({"a": {"x": [1, 2]}})
        | cells_of({"a": {"x": [3, 4]}}, size=100)
        | cells_of({"a": {"x": [5, 6]}}, model="big")
    )
    assert paired(scores_of(cells), ["a"], "case") == [[5.5], [3.5], [1.5]]


def test_means_that_differ_in_their_last_bit_tie():
    """0.1 + 0.2 is not 0.3, though scores made of them are equal."""
    cells = cells_of({"a": {"x": [0.1 + 0.2]}, "b": {"x": [0.3]}})
    assert pair_of(cells).ties == 1


def test_a_planted_difference_is_found_and_no_other():
    """method0 is 3 points better on 14 cases, deviations 1."""
    family = summarise(random_cells(4, 14, 3, gain=3)).families[0]
    assert family.unit == "case"
    for pair in family.pairs:
        assert pair.outcome == ("first" if pair.first == "method0" else "none")
        assert pair.interval.low < pair.difference < pair.interval.high
        assert pair.p <= pair.holm <= 1
    assert "is better than method1 by" in pair_verdict(family.pairs[0], family)
    assert (
        "A difference found in 3 of 6 pairs (over 14 cases each; Holm, alpha 0.05), no difference found in the rest."
        in family_verdict(family)[1]
    )
    both = summarise(random_cells(2, 14, 3, gain=3)).families[0]
    assert "A difference found in 1 of 1 pair (over 14 cases each; Holm, alpha 0.05)." in family_verdict(both)[1]


def test_the_sign_says_who_is_better():
    worse = cells_of({"a": {"x": [60.0 + k / 9 for k in range(8)]}, "b": {"x": [70.0] * 8}})
    family = summarise(worse).families[0]
    pair = family.pairs[0]
    assert pair.outcome == "second"
    low, high = -pair.interval.high, -pair.interval.low
    assert (
        f"b is better than a by {-pair.difference:.2f} points [{low:+.2f}, {high:+.2f}; BCa 95%] over 8 runs"
        in pair_verdict(pair, family)
    )


def test_no_difference_is_said_with_what_could_have_been_seen():
    """Oracle: 0.8 power at alpha / 3 by the noncentral t, times the deviation seen."""
    family = summarise(random_cells(3, 14, 1)).families[0]
    pair = family.pairs[0]
    deviation = statistics.stdev(
        a - b for a, b in paired(scores_of(random_cells(3, 14, 1)), ["method0", "method1"], "case")
    )
    edge = scipy.stats.t.isf(0.05 / 6, 13)
    assert scipy.stats.nct.sf(edge, 13, pair.detectable / deviation * 14**0.5) == pytest.approx(0.8)
    told = pair_verdict(pair, family)
    assert told.startswith("No difference found between method0 and method1: ")
    assert f"over 14 cases (p = {pair.p:.2g}" in told
    assert f"One of {pair.detectable:.2f} points would have been found with a chance of about 80%." in told
    assert family_verdict(family)[1].startswith(
        "No difference found in any of 3 pairs (over 14 cases each; Holm, alpha 0.05). Differences of "
    )


def test_too_few_blocks_are_said_to_be_too_few():
    family = summarise(cells_of({"a": {"x": [50, 51, 52]}, "b": {"x": [90, 91, 92.5]}})).families[0]
    assert (family.unit, family.pairs[0].outcome, family.pairs[0].detectable) == ("run", "too few", None)
    assert "over 3 runs, too few for any difference to be found (for 1 pair at alpha 0.05 it takes 6)" in pair_verdict(
        family.pairs[0], family
    )
    assert "nor could one have been: 3 runs are too few" in family_verdict(family)[1]


def test_against_one_method_fewer_pairs_are_corrected_for():
    """Oracle: Holm by hand over the two pairs that hold the method; ranks are the same."""
    every, _, one, _ = summarise(random_cells(3, 8, 2, gain=1), against="method0").families
    assert (every.against, one.against) == (None, "method0")
    assert [(pair.first, pair.second) for pair in one.pairs] == [("method0", "method1"), ("method0", "method2")]
    assert [pair.holm for pair in one.pairs] == holm([pair.p for pair in every.pairs[:2]])
    assert one.ranks == every.ranks
    assert "of 2 pairs with method0 (over 8 cases each" in family_verdict(one)[1]


def tuned(best: float | None, *rates: float) -> dict:
    return {"trials": [{"learning_rate": rate, "score": 1.0} for rate in rates], "learning_rate": best}


def test_rates_at_the_end_of_their_range_are_told():
    """Oracle: by eye. One rate has no range, and a search whose trials all failed has no best."""
    tuning = {
        "m/rte/full/size-all": tuned(1e-5, 1e-5, 1e-4, 1e-3), "m/cola/full/size-all": tuned(1e-4, 1e-5, 1e-4, 1e-3),
        "m/rte/lora/size-all": tuned(1e-3, 1e-5, 1e-4, 1e-3), "m/rte/head/size-all": tuned(None, 1e-5, 1e-3), "m/rte/half/size-all": tuned(1e-4, 1e-4),
    }  # fmt: skip
    (line,) = rate_verdict(tuning)
    assert line.startswith(
        "The best learning rate is the lowest for full (1 of 2); the highest for lora (1 of 1) of those tried"
    )
    assert rate_verdict({"m/rte/full/size-all": tuned(1e-4, 1e-5, 1e-4, 1e-3)}) == []


def test_more_pairs_than_the_flips_can_tell_are_said_to_be():
    """42 methods: 861 pairs / 2**14 is above 0.05 whatever the blocks."""
    family = summarise(random_cells(42, 20, 1)).families[0]
    assert {pair.outcome for pair in family.pairs} == {"too few"}
    assert (
        "for 861 pairs at alpha 0.05 16,384 sign flips show nothing: compare fewer methods" in family_verdict(family)[1]
    )


def test_equal_scores_are_no_difference():
    family = summarise(cells_of({"a": {"x": [50.0] * 8}, "b": {"x": [50.0] * 8}})).families[0]
    pair = family.pairs[0]
    assert (pair.p, pair.ties, pair.interval, pair.outcome) == (1, 8, None, "none")
    assert pair_verdict(pair, family).endswith("The scores are the same everywhere.")


def test_methods_that_share_nothing():
    family = summarise(cells_of({"a": {"x": [50, 60]}, "b": {"y": [50, 60]}})).families[0]
    assert family.pairs[0].difference is None
    assert pair_verdict(family.pairs[0], family) == "Nothing to compare: a and b have no case in common."
    assert "No average ranks: no case has a score of every method." in family_verdict(family)


# -- ranks ---------------------------------------------------------------------------------------------------------


def test_demsars_example():
    """Table 6 and section 3.2.2: average ranks 3.143, 2.000, 2.893, 1.964; chi-square 9.28 before ties; CD 1.25 (0.05), 1.12 (0.10)."""
    ranks = rank_methods(scores_of(demsar_cells()), "case", 0.05)
    assert ranks.methods == ("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5")
    assert [round(ranks.average[name], 3) for name in TREES] == [3.143, 2.0, 2.893, 1.964]
    plain = 12 * 14 / (4 * 5) * (sum(rank**2 for rank in ranks.average.values()) - 4 * 25 / 4)
    assert plain == pytest.approx(9.28, abs=0.01)
    ties = sum(n**3 - n for row in DEMSAR for n in (row.count(value) for value in set(row)))
    assert ranks.friedman.statistic == pytest.approx(plain / (1 - ties / (14 * (4**3 - 4))))
    assert ranks.friedman.p == pytest.approx(scipy.stats.chi2.sf(ranks.friedman.statistic, 3))
    assert ranks.critical_difference == pytest.approx(1.25, abs=0.005)
    assert critical_difference(4, 14, 0.10) == pytest.approx(1.12, abs=0.01)
    assert ranks.groups == (ranks.methods,)  # "not powerful enough" at 0.05
    weaker = rank_methods(scores_of(demsar_cells()), "case", 0.10)
    assert weaker.groups == (ranks.methods[:3], ranks.methods[2:])  # "C4.5 is worse than C4.5+m and C4.5+m+cf"


@pytest.mark.parametrize(("alpha", "table"), [
    (0.05, [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]),
    (0.10, [1.645, 2.052, 2.291, 2.459, 2.589, 2.693, 2.780, 2.855, 2.920]),
])  # fmt: skip
def test_critical_values_are_the_papers(alpha, table):
    """Table 5(a) of Demsar 2006, for 2 to 10 methods."""
    for methods, value in enumerate(table, start=2):
        found = critical_difference(methods, 6, alpha) / (methods * (methods + 1) / 36) ** 0.5
        assert found == pytest.approx(value, abs=0.0011)


def test_ranks_of_full_data_are_scipys():
    """Oracles: scipy.stats.rankdata and friedmanchisquare on the whole matrix."""
    cells = random_cells(6, 9, 2)
    for unit in ("case", "run"):
        matrix = np.asarray(paired(scores_of(cells), [f"method{k}" for k in range(6)], unit))
        ranks = rank_methods(scores_of(cells), unit, 0.05)
        expected = scipy.stats.rankdata(-matrix, axis=1).mean(0)
        assert [ranks.average[f"method{k}"] for k in range(6)] == pytest.approx(list(expected))
        assert ranks.friedman.p == pytest.approx(scipy.stats.friedmanchisquare(*matrix.T).pvalue)


def test_blocks_that_not_all_have_are_left_out_and_said():
    """c lacks task y, d has nothing: ranks over x alone."""
    cells = cells_of({"a": {"x": [70], "y": [70]}, "b": {"x": [60], "y": [90]}, "c": {"x": [65]}})
    cells |= cell("c", "y", 1, None, status="failed", reason="out of memory")
    cells |= cell("d", "x", 1, None, status="impossible", reason="no biases")
    summary = summarise(cells)
    ranks = summary.families[0].ranks
    assert ranks.average == {"a": 1, "c": 2, "b": 3}
    assert ranks.num_blocks == 1
    assert ranks.missing == Missing(absent=("d",), num_blocks=1, lacking={"c": 1}, alone={"c": 1})
    told = family_verdict(summary.families[0])
    assert (
        "Ranks leave out 1 block (model, task, size, seed) that not every method has: c lacks 1; without c there would be 1 more. None is filled in."
        in told
    )
    assert "Not ranked, for want of any score: d." in told


def test_friedmans_least_p_is_that_of_one_order_everywhere():
    """Oracle: scipy's test of such ranks. With two blocks of four methods it is 0.11: nothing could be found, and that is said."""
    levels = {"a": 90, "b": 80, "c": 70, "d": 60}
    family = summarise(cells_of({m: {f"t{k}": [v] for k in range(2)} for m, v in levels.items()})).families[0]
    friedman = family.ranks.friedman
    assert friedman.p == pytest.approx(friedman.least_p)
    assert friedman.least_p == pytest.approx(scipy.stats.friedmanchisquare([4, 4], [3, 3], [2, 2], [1, 1]).pvalue)
    assert (
        "average ranks, nor could one have been: too few cases (Friedman chi-square 6.00, p = 0.11"
        in rank_verdict(family)[0]
    )


def test_groups_are_the_largest_sets_within_the_critical_difference():
    """Four methods always in the same order on 9 cases: ranks 1 to 4, CD 2.569 sqrt(20/54) = 1.56; neighbours alone are joined."""
    levels = {"a": 90, "b": 80, "c": 70, "d": 60}
    ranks = summarise(cells_of({m: {f"t{k}": [v] for k in range(9)} for m, v in levels.items()})).families[0].ranks
    assert ranks.critical_difference == pytest.approx(1.563, abs=0.001)
    assert ranks.groups == (("a", "b"), ("b", "c"), ("c", "d"))


# -- the whole -----------------------------------------------------------------------------------------------------


def test_lost_cells_are_counted_and_listed():
    cells = cells_of({"a": {"x": [70, 71]}}) | cell("a", "x", 3, None, status="interrupted") | cell("a", "x", 4, None)
    cells |= cell("b", "x", 1, None, status="impossible", reason="no biases") | cell(
        "b", "x", 2, 70.0, status="failed", reason="no biases"
    )
    summary = summarise(cells)
    assert summary.counts == {"a": {"done": 3, "interrupted": 1}, "b": {"failed": 1, "impossible": 1}}
    assert [(lost.method, lost.status, lost.reason) for lost in summary.lost] == [
        ("a", "interrupted", None), ("a", "done", "ended without a score"), ("b", "impossible", "no biases"), ("b", "failed", "no biases"),
    ]  # fmt: skip
    assert lost_verdict(summary)[0] == (
        "4 of 6 cells have no score and are in no number here: 1 interrupted, 1 done without a score, 1 impossible, 1 failed."
    )
    assert "b: no biases (2 cells)" in lost_verdict(summary)


def test_the_same_cells_twice_and_in_any_order_give_the_same_numbers():
    """Bit-identity, of JSON texts; methods named in the order of the grid."""
    cells = random_cells(5, 6, 3)
    text = json.dumps(summarise(cells).as_dict(), allow_nan=False)
    assert json.dumps(summarise(json.loads(json.dumps(cells))).as_dict()) == text
    keys = sorted(cells, key=lambda key: (cells[key]["method"], random.Random(key).random()))
    assert json.dumps(summarise({key: cells[key] for key in keys}).as_dict()) == text


@pytest.mark.parametrize("cells", [{}, cell("a", "x", 1, None, status="waiting"), cell("a", "x", 1, 70.0)])
def test_next_to_nothing_is_summarised_too(cells):
    summary = summarise(cells)
    assert "Nothing to compare: fewer than two methods have a score." in family_verdict(summary.families[0])
    shown(summary, cells)


@pytest.mark.slow
def test_a_large_study_is_summarised():
    """500 blocks of 20 methods: every pair over 100 cases and over 500 runs."""
    summary = summarise(random_cells(20, 100, 5, gain=2))
    assert [len(family.pairs) for family in summary.families] == [190, 190]
    assert {pair.num_blocks for pair in summary.families[1].pairs} == {500}


# -- rows and tables -----------------------------------------------------------------------------------------------


def shown(summary, cells):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_tables(summary, pareto_fronts(cells)))
    return console.export_text()


def test_before_the_first_score_only_what_is_missing_is_shown():
    """A row for what came to an end, a number for what has not begun."""
    cells = cell("a", "x", 1, None, status="waiting") | cell("b", "x", 1, None, status="impossible", reason="no biases")
    text = shown(summarise(cells), cells)
    assert "2 of 2 cells have no score" in text
    assert "no biases" in text.partition("Cells without a score")[2]
    assert "waiting" not in text.partition("Cells without a score")[2]
    assert "Average rank" not in text


def test_rows_hold_the_summarys_numbers():
    cells = random_cells(3, 7, 2, gain=3)
    summary = summarise(cells)
    family = summary.families[0]
    columns, found = rows.rows_cases(summary)
    first = dict(zip(columns, found[0], strict=True))
    assert (first["method"], first["task"], first["size"], first["seeds"]) == ("method0", "task00", "all", 2)
    assert first["mean"] == summary.cases[0].mean
    columns, found = rows.rows_pairs(family)
    assert [row[columns.index("p")] for row in found] == sorted(pair.p for pair in family.pairs)
    columns, found = rows.rows_ranks(family)
    assert found[0][:2] == ["method0", 1.0]
    columns, found = rows.rows_fronts(pareto_fronts(cells))
    assert found[0][-1] == "time, memory, parameters, FLOPs"
    assert all(len(row) == len(columns) for row in found)
    assert rows.rows_counts(summary)[1][0] == ["method0", 14, 0, 0, 0, 0]


def test_tables_show_scores_verdicts_and_what_is_missing():
    cells = random_cells(3, 7, 2, gain=3) | cell(
        "bit[fit]", "task00", 1, None, status="impossible", reason="no [bold]biases"
    )
    text = shown(summarise(cells), cells)
    for piece in (
        "Average rank over 7 cases",
        "Pairs over runs",
        "Friedman chi-square",
        "Critical difference",
        "bit[fit]: no [bold]biases",
    ):
        assert piece in text
    assert re.search(r"impossible +no \[bold\]biases", text)
    assert re.search(r"^ bit\[fit\] ", text, re.MULTILINE)
