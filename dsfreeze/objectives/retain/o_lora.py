"""O-LoRA (arXiv 2310.14152; cmnfriend/O-LoRA 07117e1): each task's adapters in directions that earlier tasks' leave free.

    loss + lambda_1 sum |A_old A_new^T| + lambda_2 sum ||new||_2

The first sum is over the elements of the products with each earlier task's A (r, in) of the same matrix, the second over the new
A and B. `weight` is lambda_1, `l2` lambda_2. Earlier adapters lie in the weights, into which a run's export merges them (the
authors keep them beside; the function is the same), so the memory keeps their A alone.
"""

from __future__ import annotations

import torch

from dsfreeze.engine import Engine, Piece
from dsfreeze.engine.process import together
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.objectives import Term
from dsfreeze.objectives.retain.memory import Memory, write_memory

A = ".lora_A."


class OLora(Term):
    """Holds the earlier tasks' A of every matrix, below each other, on every rank; and gathers the new ones at each step."""

    rule = "O-LoRA, arXiv 2310.14152, cmnfriend/O-LoRA 07117e1; earlier adapters merged"

    def __init__(self, job: Job, memory: Memory) -> None:
        self.job, self.memory, self.options = job, memory, job.recipe.retain
        trained = job.plan.phases[0].trainable
        self.adapters = tuple(name for name in trained if ".lora_" in name)
        self.targets = tuple(name for name in self.adapters if A in name)
        self._require_shapes()
        self._old: dict[str, torch.Tensor] = {}
        self._penalty = 0.0

    def _require_shapes(self) -> None:
        for name in self.targets:
            inputs = self.job.anatomy.by_name[name].shape[1]
            for task in range(1, self.memory.num_tasks + 1):
                shape = self.memory.shapes.get(f"{task}/{matrix_of(name)}")
                if shape is not None and (len(shape) != 2 or shape[1] != inputs):
                    raise UserError(
                        f"retain.memory: {self.memory.folder} holds an adapter of '{matrix_of(name)}' that does not fit."
                    )

    def start(self, engine: Engine) -> None:
        for name in self.targets:
            keys = [f"{task}/{matrix_of(name)}" for task in range(1, self.memory.num_tasks + 1)]
            found = [self.memory.read(key) for key in keys if key in self.memory.shapes]
            if found:
                self._old[name] = torch.cat(found).to(engine.device, torch.float32)

    def before_step(self, engine: Engine, step: int) -> None:
        gradients, overlap = {}, 0.0
        for name, old in self._old.items():
            products = engine.whole_weight(name).float() @ old.T
            gradients[name] = (self.options.strength * products.sign() @ old).reshape(-1)
            overlap += self.options.strength * float(products.abs().sum())
        norms = self._norms(engine) if self.options.l2 else {}
        with engine.edited_gradients() as pieces:
            for piece in pieces:
                if piece.name in gradients:
                    piece.add(gradients[piece.name][piece.first : piece.last].to(piece.value.device))
                if norms.get(piece.name):
                    piece.add(self.options.l2 / norms[piece.name] * piece.value)
        self._penalty = overlap + self.options.l2 * sum(norms.values())

    def _norms(self, engine: Engine) -> dict[str, float]:
        """L2 norms of the new adapters' tensors, as they are stepped (collective)."""
        squares = dict.fromkeys(self.adapters, 0.0)
        squares |= {p.name: _squared(p) for p in engine.pieces() if p.name in squares}
        return dict(zip(squares, (s**0.5 for s in engine.sum_over_pieces(list(squares.values()))), strict=True))

    def value(self, engine: Engine) -> float:
        return self._penalty

    def finish(self, engine: Engine) -> None:
        if self.options.remember is None:
            return
        kept = {key: self.memory.read(key) for key in self.memory.shapes}
        kept |= {f"{self.memory.num_tasks + 1}/{matrix_of(name)}": engine.read_weight(name) for name in self.targets}
        together(lambda: None if engine.rank else write_memory(self.job, self.memory, kept))


def matrix_of(adapter: str) -> str:
    """The module that an adapter's tensor belongs to."""
    return adapter.partition(".lora_")[0]


def _squared(piece: Piece) -> float:
    return float(piece.value.double().square().sum())
