"""Examples that a task keeps for later ones, and how kept ones are run through the model beside a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dsfreeze.data import TaskData
from dsfreeze.data.examples import IGNORED
from dsfreeze.engine import Engine, MicroBatches
from dsfreeze.job import Job

#: A tokenised example with the number of its task (`of_task`, from 1); what a collate does not know it does not read.
Kept = Mapping[str, Any]


def drawn(job: Job, number: int) -> np.ndarray:
    """Indices of at most `number` training examples, drawn by the run's seed."""
    assert job.data.train is not None, "something was trained on"
    return np.random.default_rng(job.recipe.train.seed).permutation(len(job.data.train))[:number]


def kept_of(job: Job, task: int) -> list[Kept]:
    """What this task keeps, in plain values."""
    assert job.data.train is not None, "something was trained on"
    rows = (job.data.train[int(index)] for index in drawn(job, job.recipe.retain.memory_examples))
    return [{**row, "of_task": task} for row in rows]


def choose(kept: Sequence[Kept], number: int, seed: Sequence[int]) -> list[Kept]:
    """At most `number` of them, without replacement; the same on every rank."""
    places = np.random.default_rng(seed).permutation(len(kept))[:number]
    return [kept[int(place)] for place in places]


def shares_of(kept: Sequence[Kept], engine: Engine, accumulation: int) -> list[list[Kept]]:
    """This rank's part for each micro-step, equal parts dealt as the loader does; some may be empty."""
    parts = np.array_split(np.arange(len(kept)), accumulation * engine.world_size)
    return [[kept[int(place)] for place in part] for part in parts[engine.rank :: engine.world_size]]


def micro_batches(job: Job, engine: Engine, kept: Sequence[Kept]) -> MicroBatches:
    """The examples as one step's micro-batches, weighted so that losses add up to the mean over all their items."""
    data, batches = job.data, []
    items = sum(data.num_items(data.collate([example])) for example in kept)
    for share in shares_of(kept, engine, job.recipe.train.gradient_accumulation_steps):
        batch = data.collate(share or kept[:1])
        batches.append((batch, data.num_items(batch) / items if share else 0.0))
    return batches


def items_of(data: TaskData, logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits [items, classes] and labels [items] of what counts in a batch (`TaskData.num_items`), row by row."""
    if data.task == "classification":
        return logits.float(), labels
    if data.task in ("causal_lm", "sft"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]
