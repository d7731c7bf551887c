"""Score against cost: which methods no other beats on both. No torch.

A model at a time, since seconds of different models do not compare. A method's score and costs are means over the cases, and within a case over
the seeds, that all methods of the model have: a method measured on the easy tasks alone would look better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsfreeze.compare.blocks import Block, Cells, by_case, case_of, common_blocks, mean, scores_of


@dataclass(frozen=True)
class Cost:
    """A number of a cell that is better low. `label`: what an axis says, with its unit; `scale`: what one of those units is."""

    key: str
    name: str
    label: str
    scale: float


COSTS = (
    Cost("seconds", "time", "run time (s)", 1),
    Cost("peak_bytes", "memory", "peak memory (GiB)", 2**30),
    Cost("trainable", "parameters", "trains (M)", 1e6),
    Cost("flops", "FLOPs", "compute (TFLOP)", 1e12),
)


@dataclass(frozen=True)
class Point:
    """A method: its mean score, and its mean cost in the label's unit. `on_front`: no other has both as good and one better."""

    method: str
    score: float
    cost: float
    on_front: bool


@dataclass(frozen=True)
class Front:
    """Of one model and cost, over `num_cases` cases of `num_runs` runs each method. `left_out`: methods without that cost, or any score."""

    model: str
    cost: Cost
    points: tuple[Point, ...]
    num_cases: int
    num_runs: int
    left_out: tuple[str, ...]

    @property
    def edge(self) -> list[Point]:
        """The points of the front, by cost."""
        return sorted((point for point in self.points if point.on_front), key=lambda point: (point.cost, point.score))


def pareto_fronts(cells: Cells) -> list[Front]:
    """The four fronts of each model, in the order of the grid."""
    models = dict.fromkeys(cell["model"] for cell in cells.values())
    return [front for model in models for front in _of_model(model, cells)]


def _of_model(model: str, cells: Cells) -> list[Front]:
    own = {key: cell for key, cell in cells.items() if cell["model"] == model}
    scores = scores_of(own)
    present = [method for method, found in scores.items() if found]
    blocks = common_blocks(scores, present) if present else []
    by_block = {(cell["method"], (case_of(cell), cell["seed"])): cell for cell in own.values()}
    numbers = {
        method: {key: _mean([by_block[method, block].get(key) for block in blocks], blocks) for key in _keys()}
        for method in present
    }
    return [_front(model, cost, numbers, scores.keys(), blocks) for cost in COSTS]


def _front(
    model: str, cost: Cost, numbers: Mapping[str, Mapping[str, float | None]], methods: Any, blocks: Sequence[Block]
) -> Front:
    values = {
        method: (score, spent / cost.scale)
        for method, own in numbers.items()
        if (score := own["score"]) is not None and (spent := own[cost.key]) is not None
    }
    on_front = pareto_front(list(values.values()))
    points = tuple(Point(m, *pair, best) for (m, pair), best in zip(values.items(), on_front, strict=True))
    left_out = tuple(method for method in methods if method not in values)
    return Front(model, cost, points, len(by_case(blocks)), len(blocks), left_out)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (score, cost) pairs: which no other dominates, that is has a score as high and a cost as low, and one of them better."""
    return [not any(_dominates(other, point) for other in points) for point in points]


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] >= other[0] and one[1] <= other[1] and one != other


def _mean(values: Sequence[float | None], blocks: Sequence[Block]) -> float | None:
    """Over cases of the mean over seeds; None where a run has not the number."""
    known = {
        block: v for block, v in zip(blocks, values, strict=True) if isinstance(v, int | float) and math.isfinite(v)
    }
    if not blocks or len(known) < len(blocks):
        return None
    return mean(mean(known[block] for block in group) for group in by_case(blocks).values())


def _keys() -> tuple[str, ...]:
    return ("score", *(cost.key for cost in COSTS))
