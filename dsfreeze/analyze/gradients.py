"""The backward passes of an analysis: norms of gradients, batch by batch and example by example."""

from __future__ import annotations

import numpy as np
import torch

from dsfreeze.analyze.bench import Bench


def batch_gradients(bench: Bench) -> dict[str, np.ndarray]:
    """`gradients` and `first_step`, see `Observations` (collective)."""
    epsilon = bench.recipe.train.adam_epsilon

    def run(batch: np.ndarray) -> list[tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}

        def take(name: str, gradient: torch.Tensor) -> None:
            size = gradient.float().abs()
            found[name] = _sum(size.square()), _sum(size.square() / (size + epsilon))

        bench.engine.scan_gradients(bench.collate(batch), bench.tensors, take)
        return [found.get(name, (0.0, 0.0)) for name in bench.tensors]

    rows = np.asarray(bench.over_batches(run))
    return {"gradients": rows[..., 0], "first_step": rows[..., 1]}


def example_gradients(bench: Bench) -> np.ndarray:
    """`fisher`, see `Observations`: an example's loss is summed over its items, being -log p of all its labels (collective)."""

    def run(chosen: np.ndarray) -> list[list[float]]:
        found: dict[str, float] = {}
        items = int(bench.examples.num_items[chosen].sum())

        def take(name: str, gradient: torch.Tensor) -> None:
            found[name] = _sum(gradient.float().square()) * items**2

        bench.engine.scan_gradients(bench.collate(chosen), bench.tensors, take)
        return [[found.get(name, 0.0) for name in bench.tensors]]

    return np.asarray(bench.over_examples(1, run))


def _sum(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
