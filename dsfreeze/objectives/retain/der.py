"""DER++ (arXiv 2004.07211, equation 6): loss + alpha MSE(z, z_kept) + beta CE(y_kept), on two independent draws of kept examples.

Ours, where the paper is silent about language models: of each item (a labelled token, a class label) the `top_k` largest logits are
kept and compared; both means are over items (and, for the first, logits); logits are those of the model at the end of the task, where the
paper stores those of the moment at which an example was drawn. The kept examples have passes of their own, whose gradient is added
before clipping: so the objective, its prefix cache and accumulation are as without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from dsfreeze.data import TaskData
from dsfreeze.engine import Engine, MicroBatches, Piece, gradients_of
from dsfreeze.engine.process import together
from dsfreeze.evaluation import over_all
from dsfreeze.job import Job
from dsfreeze.objectives import Objective, Term
from dsfreeze.objectives.retain.examples import Kept, choose, items_of, kept_of, shares_of
from dsfreeze.objectives.retain.memory import Memory, write_memory

#: Beside a batch of rows: how many of them, the first, are compared with stored logits; these, and whose they are, [items, k].
NUMBER, STORED, CLASSES = "retain_number", "retain_logits", "retain_classes"


class Replay(Objective):
    """Both means over a step's draws, as a sum over the items of one micro-batch."""

    def __init__(self, data: TaskData, alpha: float, beta: float) -> None:
        self.data, self.alpha, self.beta = data, alpha, beta
        #: Stored logits of the first draw, and items of the second, over all ranks and micro-batches.
        self.num_logits, self.num_items = 1, 1

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        return {name: value for name, value in batch.items() if name not in (NUMBER, STORED, CLASSES)}

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        first, labels, logits = int(batch[NUMBER]), batch["labels"], outputs.logits
        compared, _ = items_of(self.data, logits[:first], labels[:first])
        distance = (compared.gather(-1, batch[CLASSES]) - batch[STORED]).square().sum()
        found, wanted = items_of(self.data, logits[first:], labels[first:])
        return self.alpha * distance / self.num_logits + self.beta * self._sum(found, wanted) / self.num_items

    def _sum(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.data.num_labels == 1:
            return (logits.squeeze(-1) - labels).square().sum()
        return F.cross_entropy(logits, labels, reduction="sum")


class Der(Term):
    """Holds the stored logits in host memory and, while a step is made, a gradient of this rank's pieces."""

    rule = "DER++, arXiv 2004.07211 equation 6, on the largest logits at the end of a task"

    def __init__(self, job: Job, memory: Memory) -> None:
        self.job, self.memory, self.options = job, memory, job.recipe.retain
        self.replay = Replay(job.data, self.options.alpha, self.options.beta)
        self.logits, self.classes = _stored(memory)
        self._gradient: list[torch.Tensor] = []
        self._loss = 0.0

    def before_passes(self, engine: Engine, step: int) -> None:
        if not self.memory.examples:
            return
        draws = [
            choose(self.memory.examples, self.options.memory_batch_size, [self.job.recipe.train.seed, step, number])
            for number in range(2)
        ]
        batches = self._micro_batches(engine, *draws)
        self._loss = engine.scratch_gradients(batches, self._keep, objective=self.replay)

    def _keep(self, pieces: list[Piece]) -> None:
        self._gradient = [gradient.clone() for gradient in gradients_of(pieces)]

    def _micro_batches(self, engine: Engine, compared: Sequence[Kept], replayed: Sequence[Kept]) -> MicroBatches:
        data, accumulation = self.job.data, self.job.recipe.train.gradient_accumulation_steps
        self.replay.num_logits = sum(row["items"] for row in compared) * self.logits.shape[1]
        self.replay.num_items = sum(row["items"] for row in replayed)
        batches = []
        for first, second in zip(
            shares_of(compared, engine, accumulation), shares_of(replayed, engine, accumulation), strict=True
        ):
            places = [place for row in first for place in range(row["at"], row["at"] + row["items"])]
            stored = {NUMBER: torch.tensor(len(first)), STORED: self.logits[places], CLASSES: self.classes[places]}
            batch = data.collate([*first, *second] or compared[:1])
            batches.append(({**batch, **stored}, float(bool(first or second))))
        return batches

    def before_step(self, engine: Engine, step: int) -> None:
        if not self._gradient:
            return
        with engine.edited_gradients() as pieces:
            for piece, kept in zip(pieces, self._gradient, strict=True):
                piece.add(kept)
        self._gradient = []

    def value(self, engine: Engine) -> float:
        return engine.sum([self._loss])[0]

    def finish(self, engine: Engine) -> None:
        if self.options.remember is None:
            return
        kept = kept_of(self.job, self.memory.num_tasks + 1)
        found = self._top_logits(engine, kept)
        together(lambda: None if engine.rank else self._write(kept, found))

    def _write(self, kept: Sequence[Kept], found: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        at, placed = len(self.logits), []
        for row, (logits, _) in zip(kept, found, strict=True):
            placed.append({**row, "at": at, "items": len(logits)})
            at += len(logits)
        earlier = [(self.logits, self.classes)] if self.memory.examples else []
        every_logits, every_classes = zip(*earlier, *found, strict=True)
        tensors = {"logits": torch.cat(every_logits), "classes": torch.cat([c.int() for c in every_classes])}
        write_memory(self.job, self.memory, tensors, [*self.memory.examples, *placed])

    def _top_logits(self, engine: Engine, kept: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each example the largest logits of its items [items, k] and whose they are, on every rank (collective)."""
        data = self.job.data
        number = self.logits.shape[1] if self.memory.examples else self.options.top_k

        def run(chosen: np.ndarray) -> list[tuple[torch.Tensor, torch.Tensor]]:
            batch = data.collate([kept[int(index)] for index in chosen])
            rows = engine.no_grad_forward(batch).logits.cpu()
            items = [
                items_of(data, row, label)[0]
                for row, label in zip(torch.split(rows, 1), torch.split(batch["labels"], 1), strict=True)
            ]
            tops = (found.topk(min(number, found.shape[-1])) for found in items)
            return [(top.values, top.indices) for top in tops]

        lengths = np.asarray([len(row["input_ids"]) for row in kept])
        return over_all(engine, lengths, self.job.recipe.train.per_device_eval_batch_size, run)


def _stored(memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    if not memory.examples:
        return torch.zeros(0, 0), torch.zeros(0, 0, dtype=torch.int64)
    return memory.read("logits"), memory.read("classes").long()
