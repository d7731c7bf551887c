"""The result matrix of a sequence, and the numbers read from it. No torch.

R[t][i] is the score on task i after round t, both counted from 1 here as in the papers; row 0 is the start model. All scores
run from 0 to 100, higher is better. T is the number of tasks.

    OP   = (1/T) sum_i R[T][i]                                overall performance      [Lopez-Paz & Ranzato, 1706.08840]
    BWT  = (1/(T-1)) sum_{i<T} (R[T][i] - R[i][i])            backward transfer, or with 1/T: name which
    FWT  = (1/(T-1)) sum_{i>1} (R[i-1][i] - R[0][i])          forward transfer: what round i-1 knew of task i
    F    = (1/(T-1)) sum_{i<T} (max_{i<=t<T} R[t][i] - R[T][i])   forgetting               [Chaudhry et al., 1801.10112]
    LA   = (1/T) sum_i R[i][i]                                learning accuracy

A number that needs an entry nobody measured is None, never a guess.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Score = float | None
#: What backward transfer is divided by.
Denominator = Literal["T-1", "T"]


@dataclass(frozen=True)
class Matrix:
    """`rows[t][i]` after round t + 1 on task i, in the order of training; `start` is row 0. None where not measured."""

    rows: Sequence[Sequence[Score]]
    start: Sequence[Score] = ()

    def __post_init__(self) -> None:
        widths = {len(row) for row in self.rows} | ({len(self.start)} if self.start else set())
        assert len(widths) <= 1, f"rows of different lengths: {widths}"

    @property
    def num_tasks(self) -> int:
        return len(self.rows[0]) if self.rows else len(self.start)

    @property
    def complete(self) -> bool:
        """Whether every task had its round."""
        return len(self.rows) == self.num_tasks > 0

    @property
    def diagonal(self) -> list[Score]:
        """What each task scored right after its own round."""
        return [self.rows[i][i] for i in range(min(len(self.rows), self.num_tasks))]

    @property
    def last(self) -> list[Score]:
        return list(self.rows[-1]) if self.complete else [None] * self.num_tasks

    def overall_performance(self) -> Score:
        return _mean(self.last)

    def backward_transfer(self, denominator: Denominator = "T-1") -> Score:
        """Negative where tasks were forgotten; None for a single task."""
        if not self.complete or self.num_tasks < 2:
            return None
        total = _sum(_minus(last, own) for last, own in zip(self.last[:-1], self.diagonal[:-1], strict=True))
        return None if total is None else total / (self.num_tasks - (denominator == "T-1"))

    def forgetting(self) -> Score:
        """Best score of rounds i .. T-1 less the last one, over the tasks before the last."""
        if not self.complete or self.num_tasks < 2:
            return None
        return _mean(_minus(_best(row[i] for row in self.rows[i:-1]), self.last[i]) for i in range(self.num_tasks - 1))

    def forward_transfer(self) -> Score:
        """Against the start model, whose row must have been measured."""
        if not self.complete or self.num_tasks < 2 or not self.start:
            return None
        return _mean(_minus(self.rows[i - 1][i], self.start[i]) for i in range(1, self.num_tasks))

    def learning_accuracy(self) -> Score:
        return _mean(self.diagonal) if self.complete else None

    def numbers(self) -> dict[str, Score]:
        """All of them by name; backward transfer with both denominators."""
        return {
            "op": self.overall_performance(),
            "bwt": self.backward_transfer("T-1"),
            "bwt_over_t": self.backward_transfer("T"),
            "forgetting": self.forgetting(),
            "fwt": self.forward_transfer(),
            "learning_accuracy": self.learning_accuracy(),
        }


def _minus(one: Score, other: Score) -> Score:
    return None if one is None or other is None else one - other


def _sum(values: Iterable[Score]) -> Score:
    known = list(values)
    return None if any(value is None for value in known) else math.fsum(v for v in known if v is not None)


def _mean(values: Iterable[Score]) -> Score:
    known = list(values)
    total = _sum(known)
    return None if total is None or not known else total / len(known)


def _best(values: Iterable[Score]) -> Score:
    known = list(values)
    return None if any(value is None for value in known) else max(v for v in known if v is not None)


# -- several seeds, several draws ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Of one number over runs. `over_seeds`: standard deviation (n - 1) of the seeds' means over their draws; `over_draws`:
    root of the mean variance (n - 1) of a seed's draws. None where there are fewer than two."""

    mean: float
    over_seeds: Score
    over_draws: Score
    num_seeds: int
    num_runs: int


def spread(values: Mapping[tuple[int, int | None], Score]) -> Spread | None:
    """Of values by (seed, draw); runs without the number are passed over, None when none has it."""
    by_seed: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        if value is not None:
            by_seed.setdefault(seed, []).append(value)
    if not by_seed:
        return None
    means = [math.fsum(draws) / len(draws) for draws in by_seed.values()]
    variances = [statistics.variance(draws) for draws in by_seed.values() if len(draws) > 1]
    return Spread(
        mean=math.fsum(means) / len(means),
        over_seeds=statistics.stdev(means) if len(means) > 1 else None,
        over_draws=math.sqrt(math.fsum(variances) / len(variances)) if variances else None,
        num_seeds=len(means),
        num_runs=sum(map(len, by_seed.values())),
    )


def spreads(numbers: Mapping[tuple[int, int | None], Mapping[str, Score]]) -> dict[str, dict[str, Any] | None]:
    """The spread of every number, as plain values."""
    names = dict.fromkeys(name for each in numbers.values() for name in each)
    found = {name: spread({key: each.get(name) for key, each in numbers.items()}) for name in names}
    return {name: asdict(each) if each else None for name, each in found.items()}
