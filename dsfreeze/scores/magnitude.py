"""Magnitude: how large the weights are, alone or against what comes in."""

from __future__ import annotations

import math

import numpy as np

from dsfreeze.scores.observations import Observations, Scores


def weight_norm(seen: Observations) -> Scores:
    """||theta||_2 by tensor and, of all its tensors together, by layer, in the weights' unit. Favours large tensors. Cost: none but
    reading the weights."""
    return {name: math.sqrt(squared) for name, squared in seen.with_layers(seen.weights).items()}


def wanda(seen: Observations) -> Scores:
    """Wanda (arXiv 2306.11695): the sum over a matrix of |W_ij| ||x_j||_2, x_j the j-th input over all tokens; adds up over matrices.

    Published is an order within each output's row, for pruning; the sum over all of it is ours, after SSU (arXiv 2512.04844), which
    scores columns. Matrices alone have it, and not experts packed in one tensor. Cost: a forward pass for each example alone."""
    squared = {name: sum(half[name] for half in seen.inputs) for name in seen.columns}
    found = {name: float(seen.columns[name] @ np.sqrt(squared[name])) for name in squared}
    layers = {layer.name: sum(found.get(t.name, 0.0) for t in layer.tensors) for layer in seen.anatomy.blocks}
    return {**layers, **found}
