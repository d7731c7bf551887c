"""Similarity: how much a layer changes what passes through it, and how far a model has moved from a reference copy.

Forward passes alone. The layers that change least are the first to freeze; that this is so is a hypothesis taken over from
pruning, and the benchmark says what became of it.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, normalize

from dsfreeze.scores.observations import Observations, Scores


def block_influence(seen: Observations) -> Scores:
    """ShortGPT's BI (arXiv 2403.03853): 1 - mean over tokens of cos(h_in, h_out), a number from 0 to 2 for each layer; 0 for a
    layer that is the identity. Row by row, not the token x token matrix of the public port. Cost: one forward pass."""
    return dict(zip(seen.blocks, seen.mean("influence"), strict=True))


def cka_consecutive(seen: Observations) -> Scores:
    """1 - linear CKA (Kornblith et al., arXiv 1905.00414) between a layer's input and its output at a few positions of each
    example, from 0 to 1; 0 for a layer that only turns or scales. Cost: one forward pass."""
    spaces = seen.states
    return {name: 1 - linear_cka(spaces[k], spaces[k + 1]) for k, name in enumerate(seen.blocks)}


def cka_reference(seen: Observations) -> Scores:
    """1 - linear CKA between a layer's outputs here and in the reference model, from 0 to 1: how far it has moved. Cost: a
    forward pass of each model."""
    return {name: 1 - linear_cka(seen.reference[k + 1], seen.states[k + 1]) for k, name in enumerate(seen.blocks)}


def plasticity_reference(seen: Observations) -> Scores:
    """Egeria's plasticity (arXiv 2201.06227) of a layer's outputs against the reference model's. Cost: as above."""
    return {name: plasticity(seen.reference[k + 1], seen.states[k + 1]) for k, name in enumerate(seen.blocks)}


def influence(before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(batch,) 1 - mean cosine of (batch, positions, d) states over the positions where `mask` (batch, positions) is true."""
    distance = 1 - cosine_similarity(before.float(), after.float(), dim=-1)
    return (distance.double() * mask).sum(1) / mask.sum(1)


def linear_cka(one: torch.Tensor, other: torch.Tensor) -> float:
    """||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) of (n, d) activations, columns centred (Kornblith et al., arXiv 1905.00414)."""
    x, y = ((t.double() - t.double().mean(0)) for t in (one, other))
    # n x n kernels: n is the probe's sample, smaller than d in any large model
    k, m = x @ x.T, y @ y.T
    scale = float(k.norm() * m.norm())
    return float((k * m).sum()) / scale if scale else 1.0


def plasticity(one: torch.Tensor, other: torch.Tensor) -> float:
    """Similarity-preserving loss ||A - B||_F^2 / n^2 with A, B the row-normalised n x n Gram matrices (Egeria, arXiv
    2201.06227, after Tung and Mori, arXiv 1907.09682)."""
    a, b = (normalize(t.double() @ t.double().T, dim=1) for t in (one, other))
    return float((a - b).square().sum()) / len(a) ** 2
