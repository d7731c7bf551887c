"""Filling a store before training: the prefix's layers pass by in groups, and every example passes through each group.

A group's weights are read from the model's files, used, and given up before the next; only states wait in between. At no time is
there more of the model in memory than a group. What the store has already is not computed again: a fill that was stopped goes on with
the examples it lacks (from the first layer on, for states between groups are not kept). In eval mode and in the model's own forward
pass, which ends at the group's last layer: the states are those that the whole model's prefix gives for the same batches.

Ranks share the examples by batches, each on its own device, and say nothing to each other until the end (`prefill`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.data import TaskData
from dsfreeze.data.examples import Example, Examples
from dsfreeze.engine.memory import freed_memory_given_back, give_back
from dsfreeze.engine.process import together
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.errors import UserError
from dsfreeze.job import Job, dtype_of, room_of
from dsfreeze.prefix.eviction import Load, groups_of, token_embedding
from dsfreeze.prefix.keys import example_key
from dsfreeze.prefix.passage import Passage, Span
from dsfreeze.prefix.store import Store
from dsfreeze.progress import Watch

#: Batches of the last group after which what was computed is made safe.
FLUSH_EVERY = 64


@dataclass(frozen=True)
class Work:
    """Where and how the prefix is computed: `dtype` of weights and states, examples of a batch, bytes that a group's weights may take
    (one layer is always taken), this rank's `share` (number, of so many) of the batches, where states wait between groups."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    scratch: Callable[[], Store]
    room: int = 0
    share: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Wanted:
    """An example whose states are to be computed; its row is read when it is its turn."""

    key: bytes
    rows: Examples
    index: int

    @property
    def num_tokens(self) -> int:
        return int(self.rows.num_tokens[self.index])

    def read(self) -> Example:
        return self.rows[self.index]


@dataclass(frozen=True)
class Filled:
    """What this rank computed."""

    examples: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0
        return f"{self.examples} examples, {self.tokens:,} tokens, {rate:,.0f} tokens/s"


def prefill(
    job: Job,
    store: Store,
    scratch: Callable[[], Store],
    *,
    share: tuple[int, int] = (0, 1),
    watch: Watch[Any] = iter,
) -> Filled:
    """Complete the store of a job whose prefix is evicted (collective); before its engine is built, for the device is empty then.

    `share`: this rank's number among the ranks that see what it adds, and how many these are: they compute a part each. UserError
    where the store did not take everything.
    """
    assert job.eviction is not None, "nothing is evicted"
    recipe, ranks, cut = job.recipe, read_ranks(), job.eviction.cut
    work = Work(
        ranks.device,
        dtype_of(recipe),
        recipe.train.per_device_eval_batch_size,
        room=room_of(recipe, job.plan, job.plain),
        share=share,
        scratch=scratch,
    )
    together(store.refresh)  # all see the same before anybody adds, and so share out the same examples
    filled = together(lambda: fill(job.read_part, job.data, job.plain, cut, store, work, watch))
    everybody_has(job.data, store)
    return filled


def fill(
    load: Load, data: TaskData, anatomy: Anatomy, cut: int, store: Store, work: Work, watch: Watch[Any] = iter
) -> Filled:
    """Put into `store` what leaves the lowest `cut` transformer layers for every example of this rank's share that it lacks.

    `load` reads parts of the model whose `anatomy` (without adapters) this is. `watch` goes through (group, batch) rounds.
    """
    began = time.perf_counter()
    batches = _batches(lacking(data, store), work)
    groups = groups_of(anatomy.blocks[:cut], work.room, work.dtype)
    rounds = [(number, batch) for number in range(len(groups)) for batch in batches]
    relay = _Relay(load, data, anatomy, groups, store, work)
    with freed_memory_given_back(), torch.no_grad():
        try:
            for number, batch in watch(rounds):
                relay.go_to(number)
                relay.run(batch)
        finally:
            relay.close()
    store.flush()
    tokens = sum(one.num_tokens for batch in batches for one in batch)
    return Filled(sum(map(len, batches)), tokens, time.perf_counter() - began)


def lacking(data: TaskData, store: Store) -> list[Wanted]:
    """Of all examples, train and eval, those the store lacks, each once."""
    found: dict[bytes, Wanted] = {}
    for rows in filter(None, (data.train, data.eval)):
        for index in range(len(rows)):
            key = example_key(rows[index])
            if key not in store:
                found.setdefault(key, Wanted(key, rows, index))
    return list(found.values())


def everybody_has(data: TaskData, store: Store) -> None:
    """Every rank sees what all have computed (collective); UserError on all where one lacks an example after all."""
    together(store.flush)
    store.refresh()

    def require() -> None:
        if missing := len(lacking(data, store)):
            why = getattr(store, "failure", None) or (
                "it could not be written, by reason of another run that writes it or of values that freeze.prefix_cache_dtype cannot hold"
            )
            raise UserError(
                f"The prefix cache lacks {missing} examples after it was filled ({why}), and without the prefix's weights they cannot "
                "be computed on the way. Name another freeze.prefix_cache_dir, or write freeze.evict_prefix: false."
            )

    together(require)


def _batches(wanted: Sequence[Wanted], work: Work) -> list[list[Wanted]]:
    """This rank's batches, of examples of like length, the longest first: too little memory shows at once."""
    order = np.argsort([-one.num_tokens for one in wanted], kind="stable")
    starts = range(0, len(order), work.batch_size)
    rank, ranks = work.share
    return [[wanted[i] for i in order[start : start + work.batch_size]] for start in starts][rank::ranks]


class _Relay:
    """The group that is in memory, and the states handed on from group to group."""

    def __init__(
        self, load: Load, data: TaskData, anatomy: Anatomy, groups: Sequence[Sequence[Layer]], store: Store, work: Work
    ) -> None:
        self.load, self.data, self.anatomy, self.groups, self.work = load, data, anatomy, groups, work
        self.store, self.number, self.start = store, -1, 0
        self.before: Store | None = None
        self.after: Store = store
        self.passage: Passage | None = None
        self._looked_up: set[str] = set()
        self._rounds = 0

    def go_to(self, number: int) -> None:
        """Have the group of that number in memory, and none else."""
        if number == self.number:
            return
        gives_tuple = self.passage.gives_tuple if self.passage else None
        self.passage = None  # the former group's weights go before the next are read
        give_back()
        self.after.flush()
        if self.before is not None:
            self.before.close()
        self.before = None if number == 0 else self.after
        self.after = self.store if number == len(self.groups) - 1 else self.work.scratch()
        self.number, self.start = number, sum(map(len, self.groups[:number]))
        self.passage = Passage(self._read(number), self.anatomy)
        self.passage.gives_tuple = gives_tuple

    def _read(self, number: int) -> nn.Module:
        """The module with the group's weights and, for the first, the embedding's; beside it the small tensors of the embedding."""
        names = {t.name for layer in self.groups[number] for t in layer.tensors}
        beside = {t.name for layer in self.anatomy.layers if layer.name == "embed" for t in layer.tensors}
        module = self.load(names | beside if number == 0 else names | (beside - self._looked_up))
        if number == 0:
            self._looked_up = token_embedding(module)
        for parameter in module.parameters():  # as an engine places them
            parameter.data = parameter.data.to(self.work.device, self.work.dtype)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.work.device)
        return module.eval()

    def run(self, batch: Sequence[Wanted]) -> None:
        """The batch through the group; its states to the next one."""
        assert self.passage is not None, "go to a group first"
        examples = [one.read() for one in batch]
        inputs = self.data.collate(examples)
        moved = {name: value.to(self.work.device) for name, value in inputs.items() if name != "labels"}
        lengths = [len(example["input_ids"]) for example in examples]
        states = self._states(batch, lengths) if self.before is not None else None
        stop = self.start + len(self.groups[self.number])
        span = Span(self.start, states, keep=stop)
        with self.passage.over(span) as kept, _ending_at(self.passage.blocks[stop - 1]):
            self.passage.module(**moved)
        assert kept.states is not None, "the group's last layer has run"
        for one, length, row in zip(batch, lengths, kept.states.to("cpu"), strict=True):
            self.after.add(one.key, row[:length])
        self._rounds += 1
        if self.after is self.store and self._rounds % FLUSH_EVERY == 0:
            self.store.flush()

    def _states(self, batch: Sequence[Wanted], lengths: Sequence[int]) -> torch.Tensor:
        """What left the former group, zero where there is no token."""
        assert self.before is not None
        states = torch.zeros(len(batch), max(lengths), self.anatomy.hidden_size, dtype=self.work.dtype)
        for one, length, row in zip(batch, lengths, states, strict=True):
            found = self.before.read(one.key, row[:length])
            assert found, "the former group had the same batches"
        return states.to(self.work.device)

    def close(self) -> None:
        """Give up the weights and what waits between groups."""
        self.passage = None
        for states in (self.before, self.after):
            if states is not None and states is not self.store:
                states.close()
        give_back()


class _Reached(Exception):
    """The last layer that was wanted has run."""


@contextmanager
def _ending_at(block: nn.Module) -> Iterator[None]:
    """Within it a pass ends when the block has run: there may be no weights above it."""

    def end(*_: object) -> None:
        raise _Reached

    hook = block.register_forward_hook(end)
    try:
        yield
    except _Reached:
        pass
    finally:
        hook.remove()
