"""Cells of a comparison's results, by hand."""

from __future__ import annotations

import random
from typing import Any

Cells = dict[str, dict[str, Any]]


def cell(method: str, task: str, seed: int, score: float | None, **more: Any) -> Cells:
    """One cell under its key; finished, and with costs, unless told otherwise."""
    values: dict[str, Any] = {
        "model": "small", "task": task, "method": method, "size": None, "seed": seed, "status": "done", "reason": None, "run": "runs/x",
        "score": score, "metrics": {}, "seconds": 60.0, "peak_bytes": 2**30, "trainable": 10_000_000, "total": 20_000_000, "flops": 1e15,
        "learning_rate": 5e-5, "steps": 100, **more,
    }  # fmt: skip
    key = f"{values['model']}/{task}/{method}/size-{values['size'] or 'all'}/seed-{seed}"
    return {key: values}


def cells_of(scores: dict[str, dict[str, list[float]]], **more: Any) -> Cells:
    """Of {method: {task: scores by seed 1, 2, ...}}."""
    found: Cells = {}
    for method, tasks in scores.items():
        for task, values in tasks.items():
            for seed, score in enumerate(values, start=1):
                found |= cell(method, task, seed, score, **more)
    return found


def random_cells(num_methods: int, num_tasks: int, num_seeds: int, gain: float = 0.0, draw_seed: int = 0) -> Cells:
    """Normal scores around each task's level; the first method is `gain` points better everywhere, and methods cost more in order."""
    draw = random.Random(draw_seed)
    found: Cells = {}
    for t in range(num_tasks):
        level = draw.uniform(50, 90)
        for m in range(num_methods):
            for seed in range(1, num_seeds + 1):
                score = level + gain * (m == 0) + draw.gauss(0, 1)
                cost = 1 + m / 4
                found |= cell(
                    f"method{m}", f"task{t:02}", seed, score, seconds=60 * cost, peak_bytes=int(cost * 2**30),
                    trainable=int(1e7 * cost), flops=1e15 * cost,
                )  # fmt: skip
    return found
