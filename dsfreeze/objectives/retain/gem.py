"""GEM (arXiv 1706.08840) and A-GEM (1812.00420): a gradient that conflicts with earlier tasks' gradients is projected.

A-GEM: with g_ref the gradient of kept examples of all earlier tasks, g <- g - (g.g_ref / |g_ref|^2) g_ref where g.g_ref < 0.
GEM: with a row g_k of G for each earlier task, and some g.g_k < 0, g <- g + G^T v, where v >= margin solves the dual
min 1/2 v^T G G^T v + (G g)^T v, so that g.g_k >= 0 for all k.

Gradients are whole: reduced over ranks, all tensors together, before clipping. (TRACE projects tensor by tensor, each rank by
itself, with the gradient of a task's last batch, and hands the dual to a solver of the opposite sign.) Ours: examples are drawn
anew for each step, and equal tasks are told by the dual's eigenvalues, where the authors' code adds 1e-3 to its diagonal, whatever
the gradients' scale.
Adam does not step along the gradient: what holds of g need not hold of the update.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import nnls

from dsfreeze.engine import Engine, Piece, gradients_of
from dsfreeze.engine.process import together
from dsfreeze.job import Job
from dsfreeze.objectives import Term
from dsfreeze.objectives.retain.examples import Kept, choose, kept_of, micro_batches
from dsfreeze.objectives.retain.memory import Memory, write_memory

#: Eigenvalues of the gradients' cosines below this are zero: fp32 gradients tell no less.
FLAT = 1e-9


class Gem(Term):
    """Holds, while a step is made, a gradient of this rank's pieces for each earlier task."""

    rule = "GEM, arXiv 1706.08840, on reduced whole gradients; examples drawn anew each step"

    def __init__(self, job: Job, memory: Memory) -> None:
        self.job, self.memory, self.options = job, memory, job.recipe.retain
        self._gradients: list[list[torch.Tensor]] = []

    def _groups(self) -> Sequence[Sequence[Kept]]:
        """Kept examples whose loss must not rise."""
        return self.memory.by_task

    def before_passes(self, engine: Engine, step: int) -> None:
        self._gradients = []
        for number, kept in enumerate(self._groups()):
            chosen = choose(kept, self.options.memory_batch_size, [self.job.recipe.train.seed, step, number])
            engine.scratch_gradients(micro_batches(self.job, engine, chosen), self._keep)

    def _keep(self, pieces: list[Piece]) -> None:
        self._gradients.append([gradient.clone() for gradient in gradients_of(pieces)])

    def before_step(self, engine: Engine, step: int) -> None:
        if not self._gradients:
            return
        with engine.edited_gradients() as pieces:
            products = self._products(engine, [*self._gradients, gradients_of(pieces)])
            if (products[-1, :-1] < 0).any():
                weights = self._solve(products[:-1, :-1], products[-1, :-1])
                for piece, *others in zip(pieces, *self._gradients, strict=True):
                    piece.add(sum(float(v) * other.float() for v, other in zip(weights, others, strict=True)))
        self._gradients = []

    def _products(self, engine: Engine, vectors: Sequence[Sequence[torch.Tensor]]) -> np.ndarray:
        """Inner products of each with each, over all ranks (collective)."""
        number = len(vectors)
        mine = [
            sum((_dot(a, b) for a, b in zip(vectors[i], vectors[j], strict=True)), torch.zeros(()))
            for i, j in _pairs(number)
        ]
        sums = engine.sum_over_pieces(torch.stack([value.cpu() for value in mine]).tolist())
        products = np.zeros((number, number))
        for (i, j), value in zip(_pairs(number), sums, strict=True):
            products[i, j] = products[j, i] = value
        return products

    def _solve(self, gram: np.ndarray, product: np.ndarray) -> np.ndarray:
        return solve_dual(gram, product, self.options.margin)

    def finish(self, engine: Engine) -> None:
        if self.options.remember is None:
            return
        kept = [*self.memory.examples, *kept_of(self.job, self.memory.num_tasks + 1)]
        together(lambda: None if engine.rank else write_memory(self.job, self.memory, {}, kept))


class AGem(Gem):
    """One gradient for all earlier tasks."""

    rule = "A-GEM, arXiv 1812.00420, on reduced whole gradients"

    def _groups(self) -> Sequence[Sequence[Kept]]:
        return [self.memory.examples] if self.memory.examples else []

    def _solve(self, gram: np.ndarray, product: np.ndarray) -> np.ndarray:
        weights: np.ndarray = -product / gram[0]
        return weights


def solve_dual(gram: np.ndarray, product: np.ndarray, margin: float) -> np.ndarray:
    """v [k] >= margin that minimises 1/2 v^T gram v + product^T v.

    With v = margin + u, and rows of G scaled to length one, that is a least-squares problem |R u - t| in u >= 0, where R^T R is the
    matrix of cosines."""
    lengths = np.sqrt(np.diag(gram))
    scale = np.where(lengths > 0, lengths, 1.0)
    values, vectors = np.linalg.eigh(gram / np.outer(scale, scale))
    kept = values > FLAT
    root = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    linear = (product + gram @ np.full(len(product), margin)) / scale
    target = -(vectors[:, kept].T @ linear) / np.sqrt(values[kept])
    solution: np.ndarray = margin + nnls(root, target)[0] / scale
    return solution


def _pairs(number: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(number) for j in range(i + 1)]


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() * b.float()).sum(dtype=torch.float64)
