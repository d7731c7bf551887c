"""Gradients of the calibration loss at the weights as they are: what a first step would do.

Tensor by tensor as the backward pass reaches them, norms alone: at no time is there a second gradient. Layers above a
frozen prefix would see the same gradients, so one pass serves every cut.
"""

from __future__ import annotations

import math

import numpy as np

from dsfreeze.scores.observations import Observations, Scores
from dsfreeze.strategies.adaptive.autofreeze import relative_change


def gradient_norm(seen: Observations) -> Scores:
    """Mean over batches of ||g||_2, by tensor and, of all its tensors together, by layer; loss per unit of weight. Favours
    large tensors. Cost: one forward and backward pass with recomputation."""
    return _norms(seen, seen.tables["gradients"])


def gradient_norm_by_size(seen: Observations) -> Scores:
    """Mean over batches of ||g||_2 / sqrt(N), N elements (GRASS's size, arXiv 2604.07808). Same cost."""
    norms = gradient_norm(seen)
    return {name: value / math.sqrt(numel(seen, name)) for name, value in norms.items()}


def fisher(seen: Observations) -> Scores:
    """Empirical Fisher (FISH, arXiv 2111.09839): mean over examples of the squared gradient of log p at the data's own label,
    not a sampled one, averaged over the elements (F_l = sum F_i / N_l, FLoE's layer form). Cost: a backward pass for each
    example alone."""
    sums = seen.with_layers(dict(zip(seen.tensors, seen.mean("fisher"), strict=True)))
    return {name: value / numel(seen, name) for name, value in sums.items()}


def greentrainer(seen: Observations) -> Scores:
    """GreenTrainer's -g . dw (arXiv 2309.13192), the loss that a step takes away to first order; adds up over tensors.

    Here dw is AdamW's first step in closed form, -eta g / (|g| + eps), by the learning rate eta: no probe step, nothing to
    restore; published is a real step, and g after it. Loss per unit of learning rate. Same cost as the norm."""
    return seen.with_layers(dict(zip(seen.tensors, seen.mean("first_step"), strict=True)))


def ablation(seen: Observations) -> Scores:
    """Mean over examples of the loss without the layer (skipped, or reset to fresh weights: analyze.ablation) less the loss
    with it. In the loss's unit. Cost: for each layer a forward pass of all above it."""
    return dict(zip(seen.blocks, seen.mean("ablation"), strict=True))


def auto_rgn(seen: Observations) -> Scores:
    """Auto-RGN's relative gradient norm (arXiv 2210.11466): mean over batches of ||g|| / ||theta||; a tensor that is zero
    has none and counts 0. Per unit of relative change. Cost: the gradient norm's."""
    norms, weights = gradient_norm(seen), seen.with_layers(seen.weights)
    return {name: value / math.sqrt(weights[name]) if weights[name] else 0.0 for name, value in norms.items()}


def gradient_norm_change(seen: Observations) -> Scores:
    """AutoFreeze's eta (arXiv 2102.01386): |before - now| / before of a layer's gradient, here its mean L1 norm in the first and in the
    second half of the probe's steps; mean of both probes. No unit. Published is the norm of the gradients' sum over an interval,
    which would take a copy of the weights (ours: the norms' mean). Cost: the probes."""
    found: dict[str, float] = {}
    for sizes in seen.sizes:
        first, second = (seen.with_layers({name: sizes[name][k] for name in seen.tensors}) for k in (0, 1))
        for name in first:
            found[name] = found.get(name, 0.0) + relative_change(first[name], second[name]) / len(seen.sizes)
    return found


def numel(seen: Observations, name: str) -> int:
    """Elements of a layer or a tensor."""
    return seen.anatomy.layer(name).numel if name in seen.blocks else seen.anatomy.by_name[name].numel


def _norms(seen: Observations, squared: np.ndarray) -> dict[str, float]:
    per_tensor = dict(zip(seen.tensors, np.sort(np.sqrt(squared), axis=0).mean(axis=0).tolist(), strict=True))
    column = {name: k for k, name in enumerate(seen.tensors)}
    layers = {}
    for layer in seen.anatomy.blocks:
        own = squared[:, [column[t.name] for t in layer.tensors]].sum(axis=1)
        layers[layer.name] = float(np.sort(np.sqrt(own)).mean())
    return {**layers, **per_tensor}
