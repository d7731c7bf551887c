"""What can be said of a comparison: scores of each method, tests between them, ranks, and which runs are not in it. No torch.

The same cells give the same numbers to the last bit, in whatever order they come: sums are exact, resampling is seeded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dsfreeze.compare.blocks import Case, Cells, Scores, Unit, by_case, deviation, has_score, mean, scores_of
from dsfreeze.compare.pairs import ALPHA, Pair, compare_pairs
from dsfreeze.compare.ranks import Ranks, rank_methods
from dsfreeze.compare.resampling import Interval, intervals

#: Of resampling; any would do, and it must not change.
SEED = 20061
#: Tested against every other method where a comparison has it.
BASELINE = "full"


@dataclass(frozen=True)
class CaseScore:
    """A method on a case: mean over seeds, deviation (n - 1; None for one seed), bootstrap interval (None for one seed, or equal scores)."""

    method: str
    case: Case
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    mean: float
    deviation: float | None
    interval: Interval | None


@dataclass(frozen=True)
class Lost:
    """A cell without a score: failed, impossible, interrupted, waiting, or done without a number; and why, where that is known."""

    key: str
    method: str
    status: str
    reason: str | None


@dataclass(frozen=True)
class Family:
    """Pairs of the methods that have scores, tested together over one unit, and the methods' ranks over it. `against`: the method that all
    pairs hold; None for every pair there is."""

    unit: Unit
    alpha: float
    against: str | None
    methods: tuple[str, ...]
    pairs: tuple[Pair, ...]
    ranks: Ranks


@dataclass(frozen=True)
class Summary:
    """`counts`: of each method its cells by status. `families`: the one over cases first, where there are several."""

    methods: tuple[str, ...]
    cases: tuple[CaseScore, ...]
    families: tuple[Family, ...]
    counts: Mapping[str, Mapping[str, int]]
    lost: tuple[Lost, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def baseline(cells: Cells) -> str | None:
    """The method that every other is tested against beside the tests of all pairs; None where it is not compared."""
    return BASELINE if any(cell["method"] == BASELINE for cell in cells.values()) else None


def summarise(cells: Cells, alpha: float = ALPHA, seed: int = SEED, against: str | None = None) -> Summary:
    """Everything, from the cells of a results file. `against`: a method, chosen before the scores are seen, that every other is tested against
    in families of their own, after those of all pairs: fewer questions, so smaller differences are found."""
    scores = scores_of(cells)
    asked = [(unit, other) for other in dict.fromkeys((None, against)) for unit in _units(scores)]
    return Summary(
        methods=tuple(scores),
        cases=tuple(_case_scores(scores, seed)),
        families=tuple(compare_methods(scores, unit, alpha, seed, other) for unit, other in asked),
        counts={
            method: dict(sorted(Counter(c["status"] for c in cells.values() if c["method"] == method).items()))
            for method in scores
        },
        lost=tuple(_lost(cells)),
    )


def compare_methods(
    scores: Scores, unit: Unit, alpha: float = ALPHA, seed: int = SEED, against: str | None = None
) -> Family:
    """One family: every pair tested, and all ranked. To leave methods or tasks out, leave them out of the scores."""
    methods = tuple(method for method, own in scores.items() if own)
    pairs = compare_pairs(scores, methods, unit, alpha, seed, against)
    return Family(unit, alpha, against, methods, tuple(pairs), rank_methods(scores, unit, alpha))


def _units(scores: Scores) -> list[Unit]:
    """Cases where there are several; runs where a case has several, or there is nothing else."""
    blocks = {block for own in scores.values() for block in own}
    cases = {case for case, _ in blocks}
    units: list[Unit] = ["case"] if len(cases) > 1 else []
    if len(blocks) > len(cases) or not units:
        units.append("run")
    return units


def _case_scores(scores: Scores, seed: int) -> list[CaseScore]:
    groups = [(method, case, blocks) for method, own in scores.items() for case, blocks in by_case(own).items()]
    groups.sort(key=lambda group: group[1].order)  # stable: methods keep their order
    samples = [tuple(scores[method][block] for block in blocks) for method, _, blocks in groups]
    return [
        CaseScore(
            method, case, tuple(number for _, number in blocks), sample, mean(sample),
            deviation(sample) if len(sample) > 1 else None, interval,
        )
        for (method, case, blocks), sample, interval in zip(groups, samples, intervals(samples, seed), strict=True)
    ]  # fmt: skip


def _lost(cells: Cells) -> list[Lost]:
    return [
        Lost(key, cell["method"], cell["status"], cell.get("reason") or _unsaid(cell))
        for key, cell in cells.items()
        if not has_score(cell)
    ]


def _unsaid(cell: Mapping[str, Any]) -> str | None:
    return "ended without a score" if cell["status"] == "done" else None
