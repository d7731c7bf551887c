"""The comparison as plain rows: what tables, pages and CSV files are written from. No torch.

Each function gives (columns, rows). Values are strings, whole numbers, floats in full, or None where there is nothing; `as_text` writes one for
people. Names are data from the user: whoever writes HTML or rich markup escapes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from string import ascii_lowercase

from dsfreeze.compare.blocks import Case
from dsfreeze.compare.pareto import COSTS, Front
from dsfreeze.compare.ranks import Ranks
from dsfreeze.compare.statistics import CaseScore, Family, Summary
from dsfreeze.compare.verdicts import figure, pair_verdict, short_verdict

Value = str | int | float | None
Rows = tuple[list[str], list[list[Value]]]

#: Statuses in the order of their columns.
STATUSES = ("done", "failed", "impossible", "interrupted", "waiting")
_CHANCES = ("p", "p (Holm)")


def rows_cases(summary: Summary) -> Rows:
    """A row for each method on each case; seeds are counted, the interval is of the mean over them."""
    columns = ["model", "task", "size", "method", "seeds", "mean", "deviation", "low", "high", "interval"]
    return columns, [
        [s.case.model, s.case.task, _size(s.case), s.method, len(s.seeds), s.mean, s.deviation, *_ends(s)]
        for s in summary.cases
    ]


def rows_scores(summary: Summary) -> Rows:
    """A row for each method, a column for each case: "mean ±deviation" over seeds."""
    names = case_names(s.case for s in summary.cases)
    by_place = {(s.method, s.case): s for s in summary.cases}
    rows: list[list[Value]] = [
        [method, *(_spread(by_place.get((method, case))) for case in names)] for method in summary.methods
    ]
    return ["method", *names.values()], rows


def rows_pairs(family: Family) -> Rows:
    """A row for each pair, the smallest p first, and of equal ones the largest difference."""
    columns = [
        "first", "second", f"{family.unit}s", "difference", "low", "high", "wins", "ties", "losses", *_CHANCES, "detectable", "found", "verdict",
    ]  # fmt: skip
    ordered = sorted(family.pairs, key=lambda pair: (pair.p, -abs(pair.difference or 0)))
    return columns, [
        [
            pair.first, pair.second, pair.num_blocks, pair.difference, *_ends(pair)[:2], pair.wins, pair.ties, pair.losses,
            pair.p, pair.holm, pair.detectable, short_verdict(pair), pair_verdict(pair, family),
        ]
        for pair in ordered
    ]  # fmt: skip


def rows_ranks(family: Family) -> Rows:
    """The best first. `group`: methods that share a letter are within the critical difference of each other."""
    ranks, letters = family.ranks, group_letters(family.ranks)
    rows: list[list[Value]] = [
        [method, ranks.average[method], ranks.scores[method], letters[method]] for method in ranks.methods
    ]
    rows += [[method, None, None, ""] for method in ranks.missing.absent]
    return ["method", "average rank", "mean score", "group"], rows


def rows_fronts(fronts: Sequence[Front]) -> Rows:
    """A row for each model and method: mean score, the costs, and the costs on whose front it is."""
    columns = ["model", "method", "score", *(cost.label for cost in COSTS), "on the front of"]
    rows: list[list[Value]] = []
    for model in dict.fromkeys(front.model for front in fronts):
        own = {
            front.cost.key: {point.method: point for point in front.points} for front in fronts if front.model == model
        }
        for method in dict.fromkeys(method for points in own.values() for method in points):
            found = {key: points[method] for key, points in own.items() if method in points}
            costs = [found[cost.key].cost if cost.key in found else None for cost in COSTS]
            best = ", ".join(cost.name for cost in COSTS if cost.key in found and found[cost.key].on_front)
            rows.append([model, method, next(iter(found.values())).score, *costs, best])
    return columns, rows


def rows_counts(summary: Summary) -> Rows:
    """How each method's cells ended."""
    return ["method", *STATUSES], [
        [method, *(summary.counts[method].get(status, 0) for status in STATUSES)] for method in summary.methods
    ]


def rows_lost(summary: Summary) -> Rows:
    """Every cell without a score, and why."""
    return ["cell", "status", "reason"], [[lost.key, lost.status, lost.reason] for lost in summary.lost]


def as_text(column: str, value: Value) -> str:
    """A value as people read it: two digits behind the point, chances of p with two that count."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    if column in _CHANCES:
        return figure(value)
    if column == "difference":
        return f"{value:+.2f}"
    return f"{value:.3g}" if column in {cost.label for cost in COSTS} and abs(value) < 1000 else f"{value:,.2f}"


def case_names(cases: Iterable[Case]) -> dict[Case, str]:
    """Short names: the task, and what else tells the cases apart."""
    known = list(dict.fromkeys(cases))
    models, sizes = {case.model for case in known}, {case.size for case in known}
    return {
        case: case.task
        + (f", {case.model}" if len(models) > 1 else "")
        + (f", {_size(case)} examples" if len(sizes) > 1 else "")
        for case in known
    }


def group_letters(ranks: Ranks) -> dict[str, str]:
    """Of each ranked method the letters of its groups; the empty text where it differs from all."""
    return {
        method: " ".join(_letter(i) for i, group in enumerate(ranks.groups) if method in group)
        for method in ranks.methods
    }


def _letter(index: int) -> str:
    return ascii_lowercase[index % 26] * (1 + index // 26)


def _size(case: Case) -> int | str:
    return "all" if case.size is None else case.size


def _spread(score: CaseScore | None) -> str:
    if score is None:
        return "-"
    return f"{score.mean:.1f}" + ("" if score.deviation is None else f" ±{score.deviation:.1f}")


def _ends(of: object) -> list[Value]:
    """Low, high and kind of what has an interval."""
    interval = getattr(of, "interval", None)
    return [None, None, "none"] if interval is None else [interval.low, interval.high, interval.kind]
