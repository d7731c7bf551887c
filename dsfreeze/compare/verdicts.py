"""What the tests found, in sentences. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsfreeze.compare.blocks import Unit
from dsfreeze.compare.pairs import Pair, least_blocks
from dsfreeze.compare.ranks import FEW_BLOCKS, Missing
from dsfreeze.compare.resampling import LEVEL, NUM_FLIPS, POWER
from dsfreeze.compare.statistics import Family, Summary

_ASKS = {
    "case": "Over cases (model, task, size; the mean of its seeds each): would it show on further tasks like these?",
    "run": "Over runs (model, task, size, seed): is it more than the luck of the seed, on these tasks?",
}
#: Reasons shown of those that cells are lost for, and methods named of those that lack blocks.
_MOST = 4


def num_blocks(number: int, unit: Unit) -> str:
    return f"{number} {unit}{'s' * (number != 1)}"


def pair_verdict(pair: Pair, family: Family) -> str:
    """One sentence or two of two methods."""
    over = num_blocks(pair.num_blocks, family.unit)
    if pair.difference is None:
        return f"Nothing to compare: {pair.first} and {pair.second} have no {family.unit} in common."
    if pair.outcome in ("first", "second"):
        sign, better, worse = (1, pair.first, pair.second) if pair.outcome == "first" else (-1, pair.second, pair.first)
        points = f"{sign * pair.difference:.2f} points{_ends(pair, sign)}"
        return f"{better} is better than {worse} by {points} over {over} ({_chance(pair, family)})."
    points = f"{pair.difference:+.2f} points{_ends(pair)}"
    begin = f"No difference found between {pair.first} and {pair.second}: {points} over {over}"
    if pair.outcome == "too few":
        return f"{begin}, too few for any difference to be found ({_needed(family)})."
    return f"{begin} ({_chance(pair, family)}). {_seen(pair)}"


def short_verdict(pair: Pair) -> str:
    """Two or three words."""
    words = {
        "first": f"{pair.first} better",
        "second": f"{pair.second} better",
        "none": "no difference found",
        "too few": "too few blocks",
    }
    return words[pair.outcome]


def family_verdict(family: Family) -> list[str]:
    """The question, the answer over all pairs, and for every pair there is the ranks."""
    ranks = [] if family.against else rank_verdict(family)
    return [_ASKS[family.unit], _answer(family), *ranks]


def _answer(family: Family) -> str:
    if len(family.methods) < 2:
        return "Nothing to compare: fewer than two methods have a score."
    if not family.pairs:
        return f"Nothing to compare: {family.against} has no score."
    outcomes = Counter(pair.outcome for pair in family.pairs)
    pairs, found, few = _pairs(family), outcomes["first"] + outcomes["second"], outcomes["too few"]
    if few == len(family.pairs):
        return f"No difference found in any of {pairs}, nor could one have been: {_over(family)} are too few ({_needed(family)})."
    rule = f"over {_over(family)} each; Holm, alpha {family.alpha:g}"
    more = f" {few} of them have too few {family.unit}s to show one on their own ({_needed(family)})." if few else ""
    if found:
        rest = ", no difference found in the rest" if found < len(family.pairs) else ""
        return f"A difference found in {found} of {pairs} ({rule}){rest}.{more}"
    return f"No difference found in any of {pairs} ({rule}). {_seen_in(family.pairs)}{more}"


def _over(family: Family) -> str:
    """How many units the pairs have."""
    low, high = (choose(pair.num_blocks for pair in family.pairs) for choose in (min, max))
    return ("" if low == high else f"{low} to ") + num_blocks(high, family.unit)


def rank_verdict(family: Family) -> list[str]:
    """Whether ranks differ, over which blocks, and what is not among them."""
    return [*_friedman_verdict(family), *_left_out(family.ranks.missing)]


def _friedman_verdict(family: Family) -> list[str]:
    ranks = family.ranks
    over = num_blocks(ranks.num_blocks, family.unit)
    if not ranks.num_blocks:
        return [f"No average ranks: no {family.unit} has a score of every method."]
    if ranks.friedman is None:
        return [
            f"No Friedman test of the ranks over {over}: it needs three methods and two {family.unit}s that are not all ties."
        ]
    test = ranks.friedman
    numbers = f"Friedman chi-square {test.statistic:.2f}, p = {figure(test.p)}, over {over}"
    rough = f"; p is rough below {FEW_BLOCKS + 1} {family.unit}s" if ranks.num_blocks <= FEW_BLOCKS else ""
    if test.least_p > family.alpha:
        return [
            f"No difference found between the methods' average ranks, nor could one have been: too few {family.unit}s ({numbers})."
        ]
    if test.p > family.alpha:
        return [f"No difference found between the methods' average ranks ({numbers}{rough})."]
    return [
        f"The methods' average ranks differ ({numbers}{rough}); two of them, where they are more than "
        f"{ranks.critical_difference:.2f} apart (Nemenyi)."
    ]


def _left_out(missing: Missing) -> list[str]:
    lines = []
    if number := missing.num_blocks:
        lines.append(
            f"Ranks leave out {number} block{'s' * (number > 1)} (model, task, size, seed) that not every method has: "
            f"{_named(missing.lacking)}{_regained(missing.alone)}. None is filled in."
        )
    if missing.absent:
        lines.append(f"Not ranked, for want of any score: {', '.join(missing.absent)}.")
    return lines


def _named(counts: Mapping[str, int]) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{method} lacks {number}" for method, number in most[:_MOST])
    return named + (f" and {len(most) - _MOST} more methods some" if len(most) > _MOST else "")


def _regained(alone: Mapping[str, int]) -> str:
    if not alone:
        return ""
    method = max(alone, key=lambda each: alone[each])
    return f"; without {method} there would be {alone[method]} more"


def lost_verdict(summary: Summary) -> list[str]:
    """How many cells are not in the numbers, by status, and the commonest reasons."""
    if not summary.lost:
        return []
    total = sum(sum(counts.values()) for counts in summary.counts.values())
    kinds = Counter(
        lost.status if lost.status != "done" else "done without a score" for lost in summary.lost
    ).most_common()
    by_status = ", ".join(f"{number} {status}" for status, number in kinds)
    reasons = Counter(f"{lost.method}: {lost.reason}" for lost in summary.lost if lost.reason).most_common()
    lines = [f"{len(summary.lost)} of {total} cells have no score and are in no number here: {by_status}."]
    lines += [f"{text} ({number} cell{'s' * (number > 1)})" for text, number in reasons[:_MOST]]
    return lines + ([f"... and {len(reasons) - _MOST} more reasons"] if len(reasons) > _MOST else [])


def rate_verdict(tuning: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The methods whose best learning rate is the lowest or the highest that was tried, so that a better one may lie beyond; from
    `tuning` of the results."""
    found: dict[str, Counter[str]] = {}
    for group, tuned in tuning.items():
        rates = {trial["learning_rate"] for trial in tuned["trials"]}
        if tuned["learning_rate"] is not None and len(rates) > 1:
            method = group.split("/")[-2]
            found.setdefault(method, Counter())[_place(tuned["learning_rate"], rates)] += 1
    ends = [
        f"the {end} for {_listed([(method, places[end], places.total()) for method, places in found.items() if places[end]])}"
        for end in ("lowest", "highest")
        if any(places[end] for places in found.values())
    ]
    if not ends:
        return []
    return [
        f"The best learning rate is {'; '.join(ends)} of those tried: a better one may lie beyond. Widen tune.low and tune.high."
    ]


def _place(rate: float, rates: set[float]) -> str:
    return {min(rates): "lowest", max(rates): "highest"}.get(rate, "within")


def _listed(counts: Iterable[tuple[str, int, int]]) -> str:
    return ", ".join(f"{method} ({number} of {total})" for method, number, total in counts)


def _ends(pair: Pair, sign: int = 1) -> str:
    """The interval in brackets, turned round for the second method's sake."""
    if pair.interval is None:
        return ""
    low, high = sorted((sign * pair.interval.low, sign * pair.interval.high))
    return f" [{low:+.2f}, {high:+.2f}; {pair.interval.kind} {LEVEL:.0%}]"


def _chance(pair: Pair, family: Family) -> str:
    return f"p = {figure(pair.p)}, {figure(pair.holm)} after Holm over {_pairs(family)}"


def _seen(pair: Pair) -> str:
    if not pair.detectable:
        return "The scores are the same everywhere." if not pair.difference else ""
    return f"One of {pair.detectable:.2f} points would have been found with a chance of about {POWER:.0%}."


def _seen_in(pairs: Iterable[Pair]) -> str:
    sizes = [pair.detectable for pair in pairs if pair.detectable]
    if not sizes:
        return "The scores are the same everywhere."
    low, high = min(sizes), max(sizes)
    size = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} (by the pair)"
    return f"Differences of {size} points would have been found with a chance of about {POWER:.0%}."


def _needed(family: Family) -> str:
    least = least_blocks(len(family.pairs), family.alpha)
    takes = (
        f"it takes {least}"
        if least
        else f"{NUM_FLIPS:,} sign flips show nothing: compare fewer methods, or all against one"
    )
    return f"for {_pairs(family)} at alpha {family.alpha:g} {takes}"


def _pairs(family: Family) -> str:
    number = len(family.pairs)
    return f"{number} pair{'s' * (number > 1)}" + (f" with {family.against}" if family.against else "")


def figure(p: float) -> str:
    """A p as people write it."""
    return f"{p:.2g}"
