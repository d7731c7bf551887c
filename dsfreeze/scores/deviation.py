"""Deviation (loss contribution): how far the state that predicts a label is from it, space by space (SALF, arXiv 2406.11753).

Space 0 is what enters layers.0, space k what layers.{k-1} gives. The label stands in the states' own space as its semantic
basis, the row that the output head's pseudo-inverse gives it; the distance is 1 - cosine, from 0 to 2. The gain's formula is not
published: A to D are candidates of ours, reported side by side.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import cosine_similarity

from dsfreeze.scores.observations import Observations, Scores
from dsfreeze.strategies.salf import GAINS, Trace

#: Regularisation of the Gram matrices, as a share of their mean eigenvalue (ours).
RIDGE = 1e-6
#: The same where a head is fitted to few examples (ours).
FIT_RIDGE = 1e-2


def deviation_a(seen: Observations) -> Scores:
    """Mean over examples of g_k = d_{k-1} - d_k. No unit. Cost: one forward pass."""
    return _gains(seen, "deviation", GAINS["a"])


def deviation_b(seen: Observations) -> Scores:
    """The same of log d_{k-1} - log d_k."""
    return _gains(seen, "deviation", GAINS["b"])


def deviation_c(seen: Observations) -> Scores:
    """The same of (log d_{k-1} - log d_k) / (log (k+1) - log k)."""
    return _gains(seen, "deviation", GAINS["c"])


def deviation_d(seen: Observations) -> Scores:
    """The same of (d_{k-1} - d_k) / (d_0 - d_L); where d_0 <= d_L, of A."""
    return _gains(seen, "deviation", GAINS["d"])


def logit_lens(seen: Observations) -> Scores:
    """Mean over examples of how much the layer lowers the logit lens's cross-entropy: the ablation of the cosine. In nats. Cost:
    the head on every space of the answer positions."""
    return _gains(seen, "logit_lens", GAINS["a"])


def _gains(seen: Observations, trace: str, gain: Callable[[Trace], list[float]]) -> Scores:
    rows = np.asarray([gain(row) for row in seen.traces[trace].tolist()])
    return dict(zip(seen.blocks, np.sort(rows, axis=0).mean(axis=0).tolist(), strict=True))


# -- bases ---------------------------------------------------------------------------------------------------------


def semantic_basis(head: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(labels, d) fp64: the rows of the pseudo-inverse of `head`.T (v, d) that belong to `labels`.

    By the normal equations s_y = (U'U + eps I)^-1 U[y]: the v x d pseudo-inverse itself is never formed. O(v d^2 + d^3)."""
    gram = torch.zeros(head.shape[1], head.shape[1], dtype=torch.float64)
    for rows in torch.split(head, 4096):  # in fp64, a part at a time
        gram += rows.double().T @ rows.double()
    gram.diagonal().add_(RIDGE * gram.trace() / len(gram))
    basis: torch.Tensor = torch.linalg.solve(gram, head[labels].double().T).T
    return basis


def fitted_basis(states: torch.Tensor, labels: torch.Tensor, number: int) -> torch.Tensor:
    """(number, d) fp64: class rows by ridge regression of one-hot labels (examples,) on the last space's states (examples, d),
    both centred, where the head is fresh and its own rows say nothing (ours)."""
    x = states.double() - states.double().mean(0)
    y = torch.nn.functional.one_hot(labels, number).double()
    kernel = x @ x.T
    kernel.diagonal().add_(FIT_RIDGE * kernel.trace() / len(kernel))
    basis: torch.Tensor = torch.linalg.solve(kernel, y - y.mean(0)).T @ x
    return basis


def deviation(states: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """(n, L + 1) fp64: 1 - cosine of states (n, L + 1, d) to each example's basis (n, d)."""
    return 1 - cosine_similarity(states.double(), basis.double().unsqueeze(1), dim=-1)
