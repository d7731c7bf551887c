"""OSF (arXiv 2504.07097; peft's `OSFConfig`): updates keep off the leading singular directions of the weights a task starts from.

W = U_h S_h V_h^T + U_l S_l V_l^T, of which the first part, the `effective_rank` share of the directions with the largest singular
values, is frozen. With U_l orthogonal to U_h and V_l to V_h, as the paper's projections of dU_l and dV_l keep them, every change of the
second part lies in the complement of U_h on the left and of V_h on the right. So the whole matrix's gradient becomes

    dW <- (I - U_h U_h^T) dW (I - V_h V_h^T)

Ours: peft trains U_l, S_l and V_l themselves, with Adam's moments for each of them; here W trains, of which these are another
parametrisation. In both, Adam divides element by element and weight decay shrinks all of W, so that updates leave the complement
somewhat. Matrices of transformer layers alone; what else trains is left free. The bases are whole on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsfreeze.engine import Engine
from dsfreeze.engine.process import together
from dsfreeze.job import Job
from dsfreeze.objectives import Term
from dsfreeze.objectives.retain.memory import Memory, write_memory


@dataclass(frozen=True)
class Leading:
    """Left [rows, k] and right [columns, k] singular vectors, fp32, of a matrix's k largest singular values."""

    left: torch.Tensor
    right: torch.Tensor

    def without(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix without anything in these directions, on either side."""
        matrix = matrix - self.left @ (self.left.T @ matrix)
        return matrix - (matrix @ self.right) @ self.right.T


def leading(matrix: torch.Tensor, share: float) -> Leading:
    """Of the smaller dimension's directions that share, rounded down, at least one."""
    left, _, right = torch.linalg.svd(matrix.float(), full_matrices=False)
    number = max(1, int(share * min(matrix.shape)))
    return Leading(left[:, :number].contiguous(), right[:number].T.contiguous())


class Osf(Term):
    """Nothing is handed on: each task's directions are those of the weights that it starts from."""

    rule = "OSF, arXiv 2504.07097, as a projection of whole gradients"

    def __init__(self, job: Job, memory: Memory) -> None:
        self.job, self.memory, self.options = job, memory, job.recipe.retain
        matrices = {t.name for t in job.anatomy.block_tensors if len(t.shape) == 2}
        self.names = tuple(name for name in job.plan.phases[0].trainable if name in matrices)
        self._leading: dict[str, Leading] = {}

    def start(self, engine: Engine) -> None:
        for name in self.names:
            self._leading[name] = leading(engine.whole_weight(name), self.options.effective_rank)

    def before_step(self, engine: Engine, step: int) -> None:
        with engine.edited_gradients() as pieces:
            mine = {piece.name: piece for piece in pieces}
            for name, basis in self._leading.items():
                piece = mine.get(name)
                whole = engine.join(name, piece.first if piece else 0, piece.gradient if piece else None)
                shape = self.job.anatomy.by_name[name].shape
                projected = basis.without(whole.view(shape).to(basis.left.device)).reshape(-1)
                if piece is not None:
                    assert piece.gradient is not None
                    piece.gradient.copy_(projected[piece.first : piece.last])

    def finish(self, engine: Engine) -> None:
        if self.options.remember is not None:
            together(lambda: None if engine.rank else write_memory(self.job, self.memory, {}))
