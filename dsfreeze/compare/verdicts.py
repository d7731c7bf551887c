"""What the tests found, in sentences. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from dsfreeze.compare.blocks import Unit
from dsfreeze.compare.pairs import Pair, least_blocks
from dsfreeze.compare.ranks import FEW_BLOCKS, Ranks
from dsfreeze.compare.resampling import LEVEL, POWER
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
        better, worse = (pair.first, pair.second) if pair.outcome == "first" else (pair.second, pair.first)
        return f"{better} is better than {worse} by {abs(pair.difference):.2f} points{_ends(pair)} over {over} ({_chance(pair, family)})."
    begin = f"No difference found between {pair.first} and {pair.second}: {pair.difference:+.2f} points{_ends(pair)} over {over}"
    if pair.outcome == "too few":
        return f"{begin}, too few for any difference to be found ({_needed(family)})."
    return f"{begin} ({_chance(pair, family)}). {_seen(pair)}"


def family_verdict(family: Family) -> list[str]:
    """The question, the answer over all pairs, and the ranks."""
    return [_ASKS[family.unit], _answer(family), *rank_verdict(family)]


def _answer(family: Family) -> str:
    number = len(family.pairs)
    if not number:
        return "Nothing to compare: fewer than two methods have a score."
    blocks = [pair.num_blocks for pair in family.pairs]
    over = num_blocks(max(blocks), family.unit)
    if min(blocks) < max(blocks):
        over = f"{min(blocks)} to {over}"
    found = [pair for pair in family.pairs if pair.outcome in ("first", "second")]
    if found:
        return f"A difference found in {len(found)} of {_pairs(number)} (over {over} each; {_rule(family)}); none in the rest."
    if all(pair.outcome == "too few" for pair in family.pairs):
        return f"No difference found in any of {_pairs(number)}, nor could one have been: {over} are too few ({_needed(family)})."
    return (
        f"No difference found in any of {_pairs(number)} (over {over} each; {_rule(family)}). {_seen_in(family.pairs)}"
    )


def rank_verdict(family: Family) -> list[str]:
    """Whether ranks differ, over which blocks, and what is not among them."""
    ranks = family.ranks
    return [*_friedman_verdict(family), *_left_out(ranks, family.unit)]


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
    if test.p > family.alpha:
        return [f"No difference found between the methods' average ranks ({numbers}{rough})."]
    return [
        f"The methods' average ranks differ ({numbers}{rough}); two of them, where they are more than "
        f"{ranks.critical_difference:.2f} apart (Nemenyi)."
    ]


def _left_out(ranks: Ranks, unit: Unit) -> list[str]:
    lines = []
    if ranks.left_out:
        lines.append(
            f"Ranks leave out {num_blocks(ranks.left_out, 'run')}' block{'s' * (ranks.left_out > 1)} that not every method has: "
            f"{_named(ranks.lacking, 'lacks')}{_regained(ranks.alone)}. None is filled in."
        )
    if ranks.absent:
        lines.append(f"Not ranked, for want of any score: {', '.join(ranks.absent)}.")
    return lines


def _named(counts: Mapping[str, int], verb: str) -> str:
    most = sorted(counts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{method} {verb} {number}" for method, number in most[:_MOST])
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
    kinds = _counted(lost.status if lost.status != "done" else "done without a score" for lost in summary.lost)
    by_status = ", ".join(f"{number} {status}" for status, number in kinds)
    reasons = _counted(f"{lost.method}: {lost.reason}" for lost in summary.lost if lost.reason)
    lines = [f"{len(summary.lost)} of {total} cells have no score and are in no number here: {by_status}."]
    lines += [f"{text} ({number} cell{'s' * (number > 1)})" for text, number in reasons[:_MOST]]
    return lines + ([f"... and {len(reasons) - _MOST} more reasons"] if len(reasons) > _MOST else [])


def _counted(texts: Iterable[str]) -> list[tuple[str, int]]:
    """The commonest first."""
    counts: dict[str, int] = {}
    for text in texts:
        counts[text] = counts.get(text, 0) + 1
    return sorted(counts.items(), key=lambda item: -item[1])


def _ends(pair: Pair) -> str:
    if pair.interval is None:
        return ""
    return f" [{pair.interval.low:+.2f}, {pair.interval.high:+.2f}; {pair.interval.kind} {LEVEL:.0%}]"


def _chance(pair: Pair, family: Family) -> str:
    return f"p = {figure(pair.p)}, {figure(pair.holm)} after Holm over {_pairs(len(family.pairs))}"


def _seen(pair: Pair) -> str:
    if not pair.detectable:
        return "The scores are the same everywhere." if not pair.difference else ""
    return f"One of {pair.detectable:.2f} points would have been found with a chance of {POWER:.0%}."


def _seen_in(pairs: Iterable[Pair]) -> str:
    sizes = [pair.detectable for pair in pairs if pair.detectable]
    if not sizes:
        return "The scores are the same everywhere."
    low, high = min(sizes), max(sizes)
    size = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} (by the pair)"
    return f"Differences of {size} points would have been found with a chance of {POWER:.0%}."


def _rule(family: Family) -> str:
    return f"Holm, alpha {family.alpha:g}"


def _needed(family: Family) -> str:
    return f"at alpha {family.alpha:g} {_pairs(len(family.pairs))} need {least_blocks(len(family.pairs), family.alpha)}"


def _pairs(number: int) -> str:
    return f"{number} pair{'s' * (number > 1)}"


def figure(p: float) -> str:
    """A p as people write it."""
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}"
