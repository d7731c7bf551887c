"""EWC (arXiv 1612.00796), online: 1/2 lambda sum F (theta - theta*)^2.

theta* are the weights at the end of the last task. F is the diagonal Fisher information, the mean over examples of the squared
gradient of log p(y | x), taken at the end of a task and added up: F <- gamma F + F_new [online EWC, arXiv 1805.06370, section 4.2].
log p of a sequence is the sum over its labelled tokens.

What others do: mammoth's `ewc_on` leaves the 1/2 out and multiplies each example's squared gradient by p(y | x); TRACE sums up
gradients of the training steps, each rank its own and the penalty's among them. Here F is taken over all ranks.
Ours: a tensor that a task did not train has no importance for it, and what no task trained none at all.
"""

from __future__ import annotations

import numpy as np
import torch

from dsfreeze.data import Batch
from dsfreeze.data.examples import IGNORED
from dsfreeze.engine import Engine, MicroBatches, Piece
from dsfreeze.engine.process import together
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.objectives.retain.anchors import Anchored, joined
from dsfreeze.objectives.retain.examples import drawn
from dsfreeze.objectives.retain.memory import Memory, write_memory


class Ewc(Anchored):
    """Holds F and theta* of the pieces."""

    rule = "EWC, arXiv 1612.00796, online (1805.06370), with 1/2; F a mean of squared gradients over all ranks"

    def __init__(self, job: Job, memory: Memory) -> None:
        super().__init__(job, memory)
        if self.options.fisher_labels == "model" and (job.recipe.task == "seq2seq" or job.data.num_labels == 1):
            raise UserError(
                "retain.fisher_labels: model draws classes or next tokens, which a regression and task seq2seq do not have; "
                "write data."
            )

    def _hold(self, piece: Piece) -> tuple[torch.Tensor | float, torch.Tensor] | None:
        if f"fisher/{piece.name}" not in self.memory.shapes:
            return None
        fisher, anchor = (
            self.memory.read(f"{kind}/{piece.name}", piece.first, piece.last).to(piece.value.device, torch.float32)
            for kind in ("fisher", "weight")
        )
        return self.options.strength * fisher, anchor

    def finish(self, engine: Engine) -> None:
        if self.options.remember is None:
            return
        fisher = joined(engine, self.names, fisher_of(self.job, engine))
        weights = {name: engine.read_weight(name) for name in self.names}
        together(lambda: None if engine.rank else self._write(fisher, weights))

    def _write(self, fisher: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
        for name in self.memory.under("fisher"):
            earlier = self.options.gamma * self.memory.read(f"fisher/{name}")
            fisher[name] = earlier + fisher[name] if name in fisher else earlier
            weights.setdefault(name, self.memory.read(f"weight/{name}"))
        kept = {f"fisher/{name}": value for name, value in fisher.items()}
        kept |= {f"weight/{name}": weights[name].reshape(-1) for name in fisher}
        write_memory(self.job, self.memory, kept)


def fisher_of(job: Job, engine: Engine) -> dict[str, tuple[int, torch.Tensor]]:
    """The diagonal Fisher information of this rank's pieces (first element, fp32), over the examples of all ranks (collective)."""
    options, examples = job.recipe.retain, job.data.train
    assert examples is not None, "something was trained on"
    chosen = drawn(job, options.fisher_examples)
    slots = engine.world_size * job.recipe.train.gradient_accumulation_steps
    found: dict[str, tuple[int, torch.Tensor]] = {}

    def add(pieces: list[Piece]) -> None:
        for piece in pieces:
            assert piece.gradient is not None
            first, total = found.get(piece.name, (piece.first, torch.zeros_like(piece.value)))
            found[piece.name] = first, total + piece.gradient.float() / len(chosen)

    for begin in range(0, len(chosen), slots):
        mine = np.arange(begin + engine.rank, begin + slots, engine.world_size)
        engine.scratch_gradients(_one_by_one(job, engine, chosen, mine), add, squared=True)
    return found


def _one_by_one(job: Job, engine: Engine, chosen: np.ndarray, places: np.ndarray) -> MicroBatches:
    """Each example by itself, weighted so that its mean loss is -log p; a filler beyond the last (collective at stage 3)."""
    examples, batches = job.data.train, []
    assert examples is not None, "something was trained on"
    for place in places.tolist():
        index = int(chosen[min(place, len(chosen) - 1)])
        batch = job.data.collate([examples[index]])
        if job.recipe.retain.fisher_labels == "model":
            batch = _with_drawn_labels(job, engine, batch, index)
        batches.append((batch, float(job.data.num_items(batch)) if place < len(chosen) else 0.0))
    return batches


def _with_drawn_labels(job: Job, engine: Engine, batch: Batch, index: int) -> Batch:
    """Labels drawn from the model's own distribution where the data has some; the same at every world size."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    probabilities = engine.no_grad_forward(inputs).logits.float().softmax(-1).cpu()
    generator = torch.Generator().manual_seed(job.recipe.train.seed + index)
    draws = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])
    if job.recipe.task in ("causal_lm", "sft"):  # the logits of a position are about the next one
        draws = torch.cat([draws[:, :1], draws[:, :-1]], dim=1)
    return {**batch, "labels": torch.where(batch["labels"] == IGNORED, IGNORED, draws)}
