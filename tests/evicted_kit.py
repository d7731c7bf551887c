"""Steps of a run with and without its prefix, as the loop makes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsfreeze.data import Loader
from dsfreeze.engine import Engine
from dsfreeze.engine.process import build_engine
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.job import Job, prepare_job
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.keys import example_key
from dsfreeze.prefix.passage import Passage, Span
from dsfreeze.prefix.rows import Rows
from dsfreeze.prefix.store import MemoryStore
from dsfreeze.prefix.streaming import prefill
from dsfreeze.recipe import Recipe

EVICTED = {"evict_prefix": True, "prefix_cache": "memory"}


def shelf(width: int = 32) -> MemoryStore:
    """An empty store in memory, precise for fp32 and for bf16."""
    return MemoryStore(width, CODECS["fp32"])


def states_in(store: MemoryStore) -> dict[bytes, torch.Tensor]:
    """What it holds, by example."""
    return {key: example.payload for key, example in store._examples.items()}


def rows_of(job: Job) -> list[Rows]:
    """All examples of a job, as the cache has them."""
    return [Rows(examples) for examples in (job.data.train, job.data.eval) if examples is not None]


class Stepper:
    """One rank's job, engine and loader; `step` makes the next optimizer step."""

    def __init__(self, recipe: Recipe) -> None:
        self.job: Job = prepare_job(recipe)
        self.store, self.passage = shelf(self.job.plain.hidden_size), Passage(self.job.module, self.job.anatomy)
        if self.job.eviction:
            prefill(self.job, rows_of(self.job), self.store, partial(shelf, self.job.plain.hidden_size))
        self.engine: Engine = build_engine(self.job.module, self.job.held, recipe, self.job.plan)
        self.engine.enter(self.job.plan.phases[0])
        train, ranks = recipe.train, read_ranks()
        self.loader = Loader(
            self.job.data.train, self.job.data.collate, self.job.data.num_items,
            per_device_batch_size=train.per_device_train_batch_size, seed=train.seed, rank=ranks.rank,
            world_size=ranks.world_size,
        )  # fmt: skip

    def step(self, number: int) -> float:
        step, loss = next(self.loader), 0.0
        torch.manual_seed(number + 100 * self.engine.rank)
        for batch, items in step.micro_batches:
            with self.suffix(batch):
                loss += self.engine.forward_backward(batch, items / step.global_items)
        self.engine.step(1e-2)
        return self.engine.sum([loss])[0]

    @contextmanager
    def suffix(self, batch: dict[str, torch.Tensor]) -> Iterator[None]:
        if self.job.eviction is None:
            yield
            return
        dtype = next(self.job.module.parameters()).dtype
        states = torch.zeros(*batch["input_ids"].shape, self.job.plain.hidden_size, dtype=dtype)
        for row, ids, mask in zip(states, batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            assert self.store.read(example_key({"input_ids": ids[:length].tolist()}), row[:length])
        with self.passage.over(Span(self.job.eviction.cut, states)):
            yield


def losses(recipe: Recipe, steps: int = 4) -> tuple[list[float], Stepper]:
    stepper = Stepper(recipe)
    return [stepper.step(number) for number in range(steps)], stepper


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with keys of its sections replaced."""
    values = recipe.model_dump(mode="json", exclude_unset=True)
    for section, value in changes.items():
        values[section] = {**values[section], **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


def evicted(recipe: Recipe, **train: Any) -> Recipe:
    return changed(recipe, freeze=EVICTED, train=train)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
