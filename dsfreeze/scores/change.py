"""Change: how far the weights move in a few probe steps, and what the loss says of that move.

Two probes train all layers, each on its own half of the calibration data, from the start weights; a score is the mean of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from dsfreeze.scores.gradient import numel
from dsfreeze.scores.observations import Observations, Scores
from dsfreeze.strategies.evidence import Change


def change_l2(seen: Observations) -> Scores:
    """||theta_k - theta_0||_2 after k steps (ADT's, Hwang et al. 2025), in the weights' unit. Favours large layers. Cost: 2 k
    training steps of all layers."""
    return _averaged(seen, lambda change, name: math.sqrt(change.squared))


def change_relative(seen: Observations) -> Scores:
    """The same over ||theta_0||_2, without unit; a tensor that starts at zero has none and counts 0."""
    return _averaged(
        seen, lambda change, name: math.sqrt(change.squared / change.start_squared) if change.start_squared else 0.0
    )


def change_rms(seen: Observations) -> Scores:
    """The same by element: ||theta_k - theta_0||_2 / sqrt(N). With AdamW every element moves by about the learning rate, so
    layers differ little."""
    return _averaged(seen, lambda change, name: math.sqrt(change.squared / numel(seen, name)))


def ila(seen: Observations) -> Scores:
    """ILA's gates (arXiv 2410.17875): gamma = sigmoid(s) that minimise loss(theta_0 + gamma * (theta_k - theta_0)) with the
    weights fixed; the score is s, without unit. One gate a layer, fitted on the half that the change was not trained on (both ours;
    the paper's constants are unknown). Cost: the probes, and a backward pass for each step of the fit."""
    fits = seen.gates
    return {name: sum(fit[k] for fit in fits) / len(fits) for k, name in enumerate(seen.blocks)}


def _averaged(seen: Observations, measure: Callable[[Change, str], float]) -> Scores:
    found: dict[str, float] = {}
    for changes in seen.changes:
        parts = {name: changes[name] for name in seen.tensors}
        sums = {
            layer.name: Change(
                sum(parts[t.name].squared for t in layer.tensors),
                sum(parts[t.name].start_squared for t in layer.tensors),
            )
            for layer in seen.anatomy.blocks
        }
        for name, change in {**sums, **parts}.items():
            found[name] = found.get(name, 0.0) + measure(change, name) / len(seen.changes)
    return found
