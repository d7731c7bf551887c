"""What fits a budget and trains fastest: stage, micro-batch, checkpointing, offload, and how many layers train. No torch.

Ours: the most layers that fit at all come first, for nobody asks for memory in order to train less; among the ways to train
them, the most tokens a second. Fewer layers are listed beside it, since they are faster. Layers freeze from the bottom up, the
embedding with the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from dsfreeze.errors import UserError
from dsfreeze.planner.sweep import Cell, Ground, cell
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan
from dsfreeze.tables import gib

MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
#: (stage, optimizer offloaded), the plainest first: equals go to the earlier one.
WAYS = ((0, False), (1, False), (2, False), (3, False), (2, True), (3, True))


@dataclass(frozen=True)
class Found:
    """A way to train the top `trained` layers of a model."""

    trained: int
    stage: int
    offload: bool
    micro_batch_size: int
    checkpointing: bool
    at: Cell

    def __str__(self) -> str:
        offload = ", optimizer offloaded" if self.offload else ""
        recompute = "with" if self.checkpointing else "without"
        return f"ZeRO-{self.stage}{offload}, micro-batch {self.micro_batch_size}, {recompute} gradient checkpointing"


class Fit:
    """The search on one cluster of `gpus` devices; `ground.budget` is the limit, its workload's micro-batch and checkpointing are
    searched over. `global_batch_size` (sequences of a step), where given, must be whole micro-batches."""

    def __init__(self, ground: Ground, gpus: int, global_batch_size: int | None = None) -> None:
        self.ground, self.gpus, self.global_batch_size = ground, gpus, global_batch_size
        self.depth = len(ground.anatomy.blocks)
        self.best = cache(self._best)

    def most_layers(self) -> int:
        """The most layers that fit, 0 when not one does. What fits with some layers fits with fewer."""
        low, high = 0, self.depth
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.best(middle) else (low, middle - 1)
        return low

    def choices(self) -> list[Found]:
        """The most that fits, then fewer layers; UserError with what nearly did when nothing fits."""
        most = self.most_layers()
        if most == 0:
            raise UserError(self._nothing())
        counts = sorted({most, *(max(1, round(share * self.depth)) for share in (0.75, 0.5, 0.25))}, reverse=True)
        return [found for count in counts if count <= most and (found := self.best(count))]

    def _best(self, trained: int) -> Found | None:
        fitting = [found for found in self._ways(trained) if found.at.fits]
        return max(fitting, key=lambda found: found.at.tokens_per_second, default=None)

    def _ways(self, trained: int) -> Iterator[Found]:
        options = (
            {"strategy": "full"} if trained == self.depth else {"strategy": "bottom", "count": self.depth - trained}
        )
        plan = make_plan(self.ground.anatomy, FreezeOptions(**options), self.ground.num_steps)
        for micro in MICRO_BATCHES:
            accumulation = self._accumulation(micro)
            if accumulation is None:
                continue
            for checkpointing in (False, True):
                workload = replace(
                    self.ground.workload, micro_batch_size=micro, gradient_accumulation_steps=accumulation,
                    gradient_checkpointing=checkpointing,
                )  # fmt: skip
                cost = self.ground.cost(plan, workload)
                for stage, offload in WAYS:
                    at = cell(self.ground, cost, stage, self.gpus, offload=offload)
                    yield Found(trained, stage, offload, micro, checkpointing, at)

    def _accumulation(self, micro: int) -> int | None:
        if self.global_batch_size is None:
            return self.ground.workload.gradient_accumulation_steps
        whole, rest = divmod(self.global_batch_size, micro * self.gpus)
        return whole if not rest else None

    def _nothing(self) -> str:
        """Why nothing fits, and what is nearest."""
        ways = list(self._ways(1))
        nearest = min(ways, key=lambda found: found.at.price.peaks.most)
        price, budget = nearest.at.price, gib(self.ground.usable(self.gpus))
        weights = price.states.weights
        largest = sorted(price.items.items(), key=lambda item: -item[1])[:3]
        of_it = ", ".join(f"{name} {gib(size)}" for name, size in largest)
        lead = f"Nothing fits into {budget} a device on {self.gpus}"
        if weights > self.ground.usable(self.gpus):
            lead += f": the weights alone take {gib(weights)} a device at ZeRO-3"
        return (
            f"{lead}. The nearest, with one layer that trains: {nearest}, needs {gib(price.peaks.most)} at its peak ({of_it}). "
            "More devices (--gpus), a shorter --seq or a larger budget would help."
        )
