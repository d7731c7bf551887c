"""What the two quadratic penalties have in common: 1/2 sum c_i (theta_i - anchor_i)^2 over what trains.

A rank holds anchors and coefficients of its own pieces alone, and adds c (theta - anchor) to their gradients once a step, after
they are reduced and before they are clipped. theta is what the optimizer steps, the fp32 master in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsfreeze.engine import Engine, Piece
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.objectives import Term
from dsfreeze.objectives.retain.memory import Memory


class Anchored(Term):
    """The penalty; a method says in `_hold` what a piece is pulled to, and how much."""

    def __init__(self, job: Job, memory: Memory) -> None:
        self.job, self.memory, self.options = job, memory, job.recipe.retain
        self.names = names_of(job)
        require_shapes(job, memory, self.names)
        self._held: dict[str, tuple[torch.Tensor | float, torch.Tensor]] = {}
        self._penalty = 0.0

    def start(self, engine: Engine) -> None:
        for piece in engine.pieces():
            if piece.name in self.names and (held := self._hold(piece)) is not None:
                self._held[piece.name] = held

    def _hold(self, piece: Piece) -> tuple[torch.Tensor | float, torch.Tensor] | None:
        """Coefficient (one, or one an element) and anchor, fp32 where the piece lies; None leaves the piece alone."""
        raise NotImplementedError

    def before_step(self, engine: Engine, step: int) -> None:
        total = torch.zeros((), dtype=torch.float64)
        with engine.edited_gradients() as pieces:
            for piece in pieces:
                if piece.name in self._held:
                    coefficient, anchor = self._held[piece.name]
                    distance = piece.value - anchor
                    pull = coefficient * distance
                    total = total.to(pull.device) + (pull * distance).sum(dtype=torch.float64) / 2
                    piece.add(pull)
        self._penalty = float(total)

    def value(self, engine: Engine) -> float:
        return engine.sum_over_pieces([self._penalty])[0]


def names_of(job: Job) -> tuple[str, ...]:
    """Tensors that train and that other tasks share, in model order: a task's own fresh head is not among them."""
    trained = job.plan.phases[0].trainable
    if not getattr(job.module, "has_fresh_head", False):
        return trained
    return tuple(name for name in trained if job.anatomy.layer_of[name].name != "head")


def require_shapes(job: Job, memory: Memory, names: tuple[str, ...]) -> None:
    """UserError when the memory holds a tensor with another number of elements than the model's."""
    for key, shape in memory.shapes.items():
        name, there = key.partition("/")[2], shape[0] if len(shape) == 1 else 0
        if name in names and there != (here := job.anatomy.by_name[name].numel):
            raise UserError(
                f"retain.memory: {memory.folder} holds {there} elements of '{name}', and the model has {here}. Start from the model "
                "that the earlier task exported."
            )


def joined(
    engine: Engine, names: tuple[str, ...], mine: Mapping[str, tuple[int, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Full fp32 1-D CPU tensors by name, on rank 0, from the ranks' parts (first element, values); {} elsewhere (collective)."""
    full = {}
    for name in names:
        whole = engine.join(name, *mine.get(name, (0, None)))
        if engine.rank == 0:
            full[name] = whole.cpu()
    return full
