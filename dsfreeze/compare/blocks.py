"""Cells as scores in blocks: what methods are paired over. No torch.

A **block** is (model, task, size, seed): the runs of one block differ in their method alone. A **case** is (model, task, size): a
method's score on a case is its mean over seeds. Both serve as the unit of a test, and answer different questions. Over runs: is the
difference more than the luck of the seed, on these tasks? Over cases: would it show on further tasks like these? The seeds of one task
share that task, so counting them as independent tasks would claim too much (Demsar 2006, section 3.1.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

#: What a test counts: cases, each the mean over its seeds, or runs.
Unit = Literal["case", "run"]
Cells = Mapping[str, Mapping[str, Any]]


class Case(NamedTuple):
    """`size`: training examples, None for all there are."""

    model: str
    task: str
    size: int | None

    @property
    def order(self) -> tuple[str, str, float]:
        """Sorts all examples after any number of them."""
        return self.model, self.task, math.inf if self.size is None else self.size


Block = tuple[Case, int]
#: Of each method in the order of the grid: its score in each block where it has one, blocks in order.
Scores = dict[str, dict[Block, float]]


def scores_of(cells: Cells) -> Scores:
    """The scores of the finished cells, 0 to 100; a method without any keeps its place."""
    found: Scores = {}
    for cell in cells.values():
        own = found.setdefault(cell["method"], {})
        if has_score(cell):
            own[case_of(cell), cell["seed"]] = float(cell["score"])
    return {method: dict(sorted(own.items(), key=lambda item: _order(item[0]))) for method, own in found.items()}


def has_score(cell: Mapping[str, Any]) -> bool:
    """Whether the run ended with a number."""
    return cell["status"] == "done" and cell.get("score") is not None and math.isfinite(cell["score"])


def case_of(cell: Mapping[str, Any]) -> Case:
    return Case(cell["model"], cell["task"], cell["size"])


def common_blocks(scores: Scores, methods: Iterable[str]) -> list[Block]:
    """The blocks that every one of the methods has, in order."""
    first, *others = (scores[method] for method in methods)
    return [block for block in first if all(block in other for other in others)]


def paired(scores: Scores, methods: Sequence[str], unit: Unit) -> list[list[float]]:
    """A row for each unit that all the methods have, a column for each method. A case's mean is over the seeds they share.

    Rounded to 1e-9, so that means equal but for their last bits are ties.
    """
    groups: dict[Any, list[Block]] = {}
    for block in common_blocks(scores, methods):
        groups.setdefault(block if unit == "run" else block[0], []).append(block)
    return [[round(mean(scores[m][b] for b in group), 9) for m in methods] for group in groups.values()]


def by_case(blocks: Iterable[Block]) -> dict[Case, list[Block]]:
    """Blocks that are in order, case by case."""
    grouped: dict[Case, list[Block]] = {}
    for block in blocks:
        grouped.setdefault(block[0], []).append(block)
    return grouped


def mean(values: Iterable[float]) -> float:
    """Summed exactly, so that no order of the values matters."""
    known = list(values)
    return math.fsum(known) / len(known)


def deviation(values: Sequence[float]) -> float:
    """With n - 1, of two values or more."""
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def _order(block: Block) -> Any:
    return block[0].order, block[1]
