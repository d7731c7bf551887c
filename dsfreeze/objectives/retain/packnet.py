"""PackNet's training half (arXiv 1711.05769; arunmallya/packnet): weights that a task keeps are never trained again.

At the end of a task, of the weights that it trained (those that nobody owned) the smallest `prune` share of each matrix is set to
zero and left to later tasks; the others are the task's. What belongs to somebody is in trains.safetensors (true: nobody's), which
the next task's plan takes as its masks (`freeze.mask_file`). Biases and norms belong whole to the first task that trains them.

Not here: the paper trains each task again after pruning, and at inference takes away, by the task's number, what later tasks
added. A task's own fresh head is left out. The pruned model is what the last evaluation measures and the export writes.
"""

from __future__ import annotations

import torch

from dsfreeze.engine import Engine
from dsfreeze.engine.process import together
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.objectives import Term
from dsfreeze.objectives.retain.anchors import names_of
from dsfreeze.objectives.retain.memory import Memory, write_memory
from dsfreeze.recipe_retain import MASKS_FILE


def pruned(weight: torch.Tensor, owner: torch.Tensor, task: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and owners (uint8, of the weight's shape, 0 nobody) after a task that trained what nobody owned: the smallest share of
    that in absolute value, rounded down, is zero and still nobody's; the rest is the task's. Vectors are kept whole."""
    weight, owner = weight.clone(), owner.clone()
    free = (owner.view(-1) == 0).nonzero().squeeze(-1)
    number = int(share * len(free)) if weight.dim() > 1 else 0
    smallest = weight.view(-1)[free].abs().float().argsort(stable=True)[:number]
    owner.view(-1)[free] = task
    owner.view(-1)[free[smallest]] = 0
    weight.view(-1)[free[smallest]] = 0
    return weight, owner


def masks_of(owners: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each tensor which elements may train: those that nobody owns."""
    return {name: owner == 0 for name, owner in owners.items()}


class PackNet(Term):
    """Acts at the end of a task alone; while it trains, the plan's masks hold back what is owned."""

    rule = "PackNet, arXiv 1711.05769, without training again after pruning"

    def __init__(self, job: Job, memory: Memory) -> None:
        self.job, self.memory, self.options = job, memory, job.recipe.retain
        self.names = names_of(job)
        self.task = memory.num_tasks + 1
        if self.task > 255:
            raise UserError("retain.method packnet numbers tasks in a byte: at most 255 of them.")
        self._require_masks()

    def _require_masks(self) -> None:
        owned = set(self.memory.shapes) & set(self.names)
        wanted, masks = self.memory.sha256.get(MASKS_FILE), self.job.plan.held_back
        bare = sorted(name for name in owned if name not in masks or masks[name].sha256 != wanted)
        if any(bool((self.memory.read(name) != 0).any()) for name in bare):
            raise UserError(
                f"retain.method packnet: earlier tasks own elements of '{bare[0]}', which this plan would train. Leave "
                "freeze.mask_file out: what is owned is masked by itself."
            )

    def finish(self, engine: Engine) -> None:
        if self.options.remember is None:
            return
        owners = {name: self.memory.read(name) for name in self.memory.shapes}
        for name in self.names:
            weight = engine.read_weight(name)
            owner = owners.get(name, torch.zeros(weight.shape, dtype=torch.uint8))
            kept, owners[name] = pruned(weight, owner, self.task, self.options.prune)
            engine.write_weights({name: kept})
        together(lambda: None if engine.rank else write_memory(self.job, self.memory, owners, masks=masks_of(owners)))
