"""Spectrum: signal and noise in the singular values of each matrix. Data-free; no forward pass.

A fused matrix counts as the one matrix it is. Values are exact (LAPACK's, in fp32: relative error of the order 1e-6 of the
largest); a layer's score is the mean over its matrices of the rank within their type, for types differ in scale.
"""

from __future__ import annotations

import math

import torch

from dsfreeze.anatomy import ATTENTION, MLP, Anatomy, Tensor
from dsfreeze.scores.observations import Observations, Scores

#: Interquartile range of a normal distribution in standard deviations.
_IQR = 1.349


def snr(seen: Observations) -> Scores:
    """Spectrum's SNR (arXiv 2406.06623, its code): singular values above eps = sigma (1 + sqrt(beta)) over those below, by the
    largest; sigma = IQR(S) / 1.349, beta = min / max dimension. sigma is the spread of *singular values*, as published code has
    it, not of the entries. No unit. Cost: one SVD of each matrix."""
    return _with_ranks(seen, "snr")


def snr_textbook(seen: Observations) -> Scores:
    """The same with the Marchenko-Pastur edge eps = sigma_w sqrt(m) (1 + sqrt(beta)), m the larger dimension and sigma_w the
    spread of the matrix's entries by their interquartile range."""
    return _with_ranks(seen, "snr_textbook")


def condition_number(seen: Observations) -> Scores:
    """KappaTune's S_max / (S_min + 1e-8) (arXiv 2506.16289), negated: it trains the best conditioned matrices. No unit."""
    return _with_ranks(seen, "condition_number")


def spectrum_of(weight: torch.Tensor) -> dict[str, float]:
    """The three numbers of a matrix (m, n) of any float dtype; NaN where it is not finite, which LAPACK would refuse."""
    matrix = weight.float()
    if not matrix.isfinite().all():
        return dict.fromkeys(("snr", "snr_textbook", "condition_number"), math.nan)
    values = torch.linalg.svdvals(matrix)
    beta = min(matrix.shape) / max(matrix.shape)
    edge = _spread(values) * (1 + beta**0.5)
    textbook = _spread(matrix.flatten()) * max(matrix.shape) ** 0.5 * (1 + beta**0.5)
    return {
        "snr": signal_to_noise(values, edge),
        "snr_textbook": signal_to_noise(values, textbook),
        "condition_number": -float(values[0] / (values[-1] + 1e-8)),
    }


def signal_to_noise(values: torch.Tensor, edge: float) -> float:
    """Sum of the values above the edge over the sum of those up to it (1 where there are none), over the largest."""
    above = values > edge
    noise = float(values[~above].sum()) or 1.0
    largest = float(values.max())
    return float(values[above].sum()) / noise / largest if largest else 0.0


def matrices(anatomy: Anatomy) -> list[Tensor]:
    """What has a spectrum: the layers' weight matrices."""
    kinds = (*ATTENTION, *MLP)
    return [t for t in anatomy.block_tensors if len(t.shape) == 2 and t.category in kinds]


def _spread(values: torch.Tensor) -> float:
    """Standard deviation by the interquartile range; by sorting, since torch's quantile takes no large input."""
    ordered = values.sort().values
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.75))
    return float(high - low) / _IQR


def _with_ranks(seen: Observations, score: str) -> Scores:
    values = seen.spectra[score]
    kinds: dict[str, list[str]] = {}
    for tensor in matrices(seen.anatomy):
        kinds.setdefault(tensor.category, []).append(tensor.name)
    ranks = {
        name: sum(values[other] < values[name] for other in kind) / max(1, len(kind) - 1)
        for kind in kinds.values()
        for name in kind
    }
    layers = {}
    for layer in seen.anatomy.blocks:
        own = [ranks[t.name] for t in layer.tensors if t.name in ranks]
        layers[layer.name] = sum(own) / len(own) if own else 0.0
    return {**layers, **values}
