"""Filling a store before training: the prefix's layers pass by in groups, and every example passes through each group.

A group's weights are read from the model's files, used, and given up before the next; only states wait in between. At no time is
there more of the model in memory than a group. What the store has already is not computed again: a fill that was stopped goes on with
the examples it lacks (from the first layer on, for states between groups are not kept). In eval mode and in the model's own forward
pass, which ends at the group's last layer: the states are those that the whole model's prefix gives for the same batches.

Ranks share the examples by batches, each on its own device, and say nothing to each other until the end (`prefill`).

What cannot be stored, or computed in parts, ends the fill as soon as it shows: without the prefix's weights nothing else could give
those states.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.data.examples import Collate, Example
from dsfreeze.engine.memory import freed_memory_given_back, give_back
from dsfreeze.engine.process import everyones, together
from dsfreeze.engine.ranks import is_out_of_memory, read_ranks
from dsfreeze.errors import UserError
from dsfreeze.job import Job, dtype_of, room_of
from dsfreeze.prefix.eviction import EVICT, Asked, Load, groups_of, token_embedding
from dsfreeze.prefix.passage import Passage, Span
from dsfreeze.prefix.rows import Rows
from dsfreeze.prefix.store import Store
from dsfreeze.progress import Watch

#: Batches of the last group after which what was computed is made safe.
FLUSH_EVERY = 64

#: How a forward pass fails for want of something that is not there; out of memory is told apart.
_FAILURES = (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Work:
    """Where and how the prefix is computed: `dtype` of weights and states, examples of a batch and what makes one of them, bytes that a
    group's weights may take (one layer is always taken), this rank's `share` (number, of so many) of the batches, where states wait
    between groups; what `asked` for it."""

    device: torch.device
    dtype: torch.dtype
    batch_size: int
    collate: Collate
    scratch: Callable[[], Store]
    room: int = 0
    share: tuple[int, int] = (0, 1)
    asked: Asked = EVICT


@dataclass(frozen=True)
class Wanted:
    """A sequence whose states are to be computed; its row is read when it is its turn."""

    key: bytes
    rows: Rows
    index: int

    @property
    def num_tokens(self) -> int:
        return self.rows.length(self.index)

    def read(self) -> Example:
        return self.rows.sequences[self.index]


@dataclass(frozen=True)
class Filled:
    """What was computed, by one rank or by all."""

    examples: int
    tokens: int
    seconds: float

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0
        return f"{self.examples} examples, {self.tokens:,} tokens, {rate:,.0f} tokens/s"


def of_all_ranks(filled: Filled) -> Filled:
    """What the ranks computed together, in the time of the slowest (collective)."""
    examples, tokens, seconds = zip(*map(json.loads, everyones(json.dumps(astuple(filled)))), strict=True)
    return Filled(sum(examples), sum(tokens), max(seconds))


def scratch_bytes(tokens: int, width: int, dtype: torch.dtype, num_groups: int) -> int:
    """What the states of `tokens` tokens take at most while they wait between groups, beside the store that is filled and where it is:
    `dtype` is the run's own, however the store holds them. One group hands nothing on; of two groups the first one's wait; of more,
    what a group reads and what it gives are there at once. `tokens` counts those of all ranks that share the room."""
    return tokens * width * dtype.itemsize * min(max(num_groups - 1, 0), 2)


def prefill(
    job: Job,
    rows: Sequence[Rows],
    store: Store,
    scratch: Callable[[], Store],
    *,
    share: tuple[int, int] = (0, 1),
    watch: Watch[Any] = iter,
) -> Filled:
    """Complete the store of a job whose prefix is evicted (collective); before its engine is built, for the device is empty then.

    `rows` are all the examples. `share`: this rank's number among the ranks that see what it adds, and how many these are: they
    compute a part each. UserError where the store does not take everything; before anything is computed where that is clear from the
    start. A failure on the way ends its own rank's part at once; the others hear of it when they have computed theirs, for they need
    not have equal numbers of rounds and so have no place to meet before.
    """
    assert job.eviction is not None, "nothing is evicted"
    recipe, ranks, cut, asked = job.recipe, read_ranks(), job.eviction.cut, job.eviction.asked
    work = Work(
        ranks.device,
        dtype_of(recipe),
        recipe.train.per_device_eval_batch_size,
        job.data.collate,
        asked=asked,
        room=room_of(recipe, job.plan, job.plain),
        share=share,
        scratch=scratch,
    )
    together(store.refresh)  # all see the same before anybody adds, and so share out the same examples
    together(lambda: _require_writable(rows, store, asked))
    filled = together(lambda: fill(job.read_part, rows, job.plain, cut, store, work, watch))
    everybody_has(rows, store, asked)
    return filled


def fill(
    load: Load, rows: Sequence[Rows], anatomy: Anatomy, cut: int, store: Store, work: Work, watch: Watch[Any] = iter
) -> Filled:
    """Put into `store` what leaves the lowest `cut` transformer layers for every example of this rank's share that it lacks.

    `load` reads parts of the model whose `anatomy` (without adapters) this is. `watch` goes through (group, batch) rounds.
    """
    began = time.perf_counter()
    batches = _batches(lacking(rows, store), work)
    groups = groups_of(anatomy.blocks[:cut], work.room, work.dtype)
    rounds = [(number, batch) for number in range(len(groups)) for batch in batches]
    relay = _Relay(load, anatomy, groups, store, work)
    with freed_memory_given_back(), torch.no_grad():
        try:
            for number, batch in watch(rounds):
                relay.go_to(number)
                relay.run(batch)
        finally:
            relay.close()
    store.flush()
    _require_taking(store, work.asked)
    tokens = sum(one.num_tokens for batch in batches for one in batch)
    return Filled(sum(map(len, batches)), tokens, time.perf_counter() - began)


def lacking(rows: Sequence[Rows], store: Store) -> list[Wanted]:
    """Of all examples those the store lacks, each once."""
    found: dict[bytes, Wanted] = {}
    for part in rows:
        for index, key in enumerate(part.every_key()):
            if key not in store:
                found.setdefault(key, Wanted(key, part, index))
    return list(found.values())


def everybody_has(rows: Sequence[Rows], store: Store, asked: Asked = EVICT) -> None:
    """Every rank sees what all have computed (collective); UserError on all where one lacks an example after all."""
    together(store.flush)
    store.refresh()

    def require() -> None:
        if missing := len(lacking(rows, store)):
            _require_taking(store, asked)
            why = "; ".join(store.damaged) or "what another rank has stored is not to be seen here, or is gone again"
            raise UserError(
                f"The prefix cache lacks {missing} examples after it was filled ({why}). Name another freeze.prefix_cache_dir, or "
                f"{asked.instead}."
            )

    together(require)


def _require_writable(rows: Sequence[Rows], store: Store, asked: Asked) -> None:
    """UserError where the store lacks examples and would take none."""
    if not (missing := len(lacking(rows, store))):
        return
    _require_taking(store, asked)
    if not getattr(store, "may_write", True):  # a store in memory is the run's own
        raise UserError(
            f"The prefix cache lacks {missing} examples, and this run may not write it: another one does, or the folder is only to be "
            "read. Start again when that one has ended, name another freeze.prefix_cache_dir, or "
            f"{asked.instead}."
        )


def _require_taking(store: Store, asked: Asked) -> None:
    """UserError where a store has given up, wherever states wait or stay."""
    if store.failure:
        raise UserError(
            f"The prefix cache cannot be filled: {store.failure} Free space there, name a freeze.prefix_cache_dir elsewhere (with "
            f"freeze.prefix_cache: disk), or {asked.instead}."
        )


def _batches(wanted: Sequence[Wanted], work: Work) -> list[list[Wanted]]:
    """This rank's batches, of examples of like length, the longest first: too little memory shows at once."""
    order = np.argsort([-one.num_tokens for one in wanted], kind="stable")
    starts = range(0, len(order), work.batch_size)
    rank, ranks = work.share
    return [[wanted[i] for i in order[start : start + work.batch_size]] for start in starts][rank::ranks]


class _Relay:
    """The group that is in memory, and the states handed on from group to group."""

    def __init__(
        self, load: Load, anatomy: Anatomy, groups: Sequence[Sequence[Layer]], store: Store, work: Work
    ) -> None:
        self.load, self.anatomy, self.groups, self.work = load, anatomy, groups, work
        self.store, self.number, self.start = store, -1, 0
        self.before: Store | None = None
        self.after: Store = store
        self.passage: Passage | None = None
        self._looked_up: set[str] = set()
        self._rounds = 0
        self._tried = -1  # the last group that a batch has passed

    def go_to(self, number: int) -> None:
        """Have the group of that number in memory, and none else."""
        if number == self.number:
            return
        gives_tuple = self.passage.gives_tuple if self.passage else None
        self.passage = None  # the former group's weights go before the next are read
        give_back()
        self.after.flush()
        _require_taking(self.after, self.work.asked)
        if self.before is not None:
            self.before.close()
        self.before = None if number == 0 else self.after
        self.after = self.store if number == len(self.groups) - 1 else self._scratch()
        self.number, self.start = number, sum(map(len, self.groups[:number]))
        self.passage = Passage(self._read(number), self.anatomy)
        self.passage.gives_tuple = gives_tuple

    def _scratch(self) -> Store:
        try:
            return self.work.scratch()
        except OSError as error:
            raise UserError(
                f"There is no place where states could wait while the prefix cache is filled: {error}. Free space there, name another "
                f"freeze.prefix_cache_dir, or {self.work.asked.instead}."
            ) from error

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
        examples = [one.read() for one in batch]
        inputs = self.work.collate(examples)
        moved = {name: value.to(self.work.device) for name, value in inputs.items() if name != "labels"}
        lengths = [len(example["input_ids"]) for example in examples]
        states = self._states(batch, lengths) if self.before is not None else None
        self._put(batch, lengths, self._passed(moved, states))
        self._rounds += 1
        if self.after is self.store and self._rounds % FLUSH_EVERY == 0:
            self.store.flush()
        _require_taking(self.after, self.work.asked)

    def _passed(self, inputs: Mapping[str, torch.Tensor], states: torch.Tensor | None) -> torch.Tensor:
        """What leaves the group; UserError where its first batch shows that this model's layers do not go by in parts."""
        if self._tried == self.number:
            return self._run_group(inputs, states)
        try:
            found = self._run_group(inputs, states)
            other = self._run_group(inputs, states, blank=1.0) if self.start else found
        except UserError:
            raise
        except _FAILURES as error:
            if is_out_of_memory(error):
                raise
            raise self._impassable(f"they need more than is there ({type(error).__name__}: {error})") from error
        scale = 300 if self.work.dtype in (torch.float16, torch.bfloat16) else 1
        if (found.float() - other.float()).abs().max() > 1e-4 * scale * found.float().abs().max():
            raise self._impassable("they read the embedding beside the states")
        self._tried = self.number
        return found

    def _run_group(
        self, inputs: Mapping[str, torch.Tensor], states: torch.Tensor | None, blank: float = 0.0
    ) -> torch.Tensor:
        assert self.passage is not None, "go to a group first"
        self.passage.blank = blank  # what stands for the embedding above the first group
        stop = self.start + len(self.groups[self.number])
        with self.passage.over(Span(self.start, states, keep=stop)) as kept, _ending_at(self.passage.blocks[stop - 1]):
            self.passage.module(**inputs)
        if kept.states is None or kept.states.shape != (*inputs["input_ids"].shape, self.anatomy.hidden_size):
            raise self._impassable("they do not pass on one state for each token")
        return kept.states

    def _impassable(self, why: str) -> UserError:
        assert self.passage is not None
        first, last = self.groups[self.number][0].name, self.groups[self.number][-1].name
        which = first if first == last else f"{first} to {last}"
        return UserError(
            f"The prefix cache of {type(self.passage.module).__name__} cannot be filled before training: its layers cannot be run in parts "
            f"({which}): {why}. {self.work.asked.mend}"
        )

    def _put(self, batch: Sequence[Wanted], lengths: Sequence[int], states: torch.Tensor) -> None:
        """Hand on what left the group; UserError where it would not come back as it was."""
        if states.dtype != self.work.dtype:
            assert self.passage is not None
            raise UserError(
                f"The prefix of {type(self.passage.module).__name__} gives states in {_name(states.dtype)} in a run in "
                f"{_name(self.work.dtype)}, which would round them when they are stored. Write train.bf16: "
                f"{'true' if states.dtype == torch.bfloat16 else 'false'}, or {self.work.asked.instead}."
            )
        for one, length, row in zip(batch, lengths, states.to("cpu"), strict=True):
            refused = self.after.refused
            self.after.add(one.key, row[:length])
            if self.after.refused > refused:
                raise self._unstorable(row[:length])

    def _unstorable(self, states: torch.Tensor) -> UserError:
        layer = self.groups[self.number][-1].name
        if states.isfinite().all():
            return UserError(
                f"States that leave {layer} are too large for freeze.prefix_cache_dtype (up to {states.abs().max():.1e}), and the prefix cache "
                f"must hold all of them. Write freeze.prefix_cache_dtype: auto, or {self.work.asked.instead}."
            )
        bf16 = self.work.dtype == torch.bfloat16
        mend = "Write train.bf16: false" if bf16 else "Look whether the model's files are whole"
        return UserError(
            f"States that leave {layer} are not finite: the model gives NaN or infinities in {_name(self.work.dtype)}, and a run would "
            f"train on them. {mend}."
        )

    def _states(self, batch: Sequence[Wanted], lengths: Sequence[int]) -> torch.Tensor:
        """What left the former group, zero where there is no token."""
        assert self.before is not None
        states = torch.zeros(len(batch), max(lengths), self.anatomy.hidden_size, dtype=self.work.dtype)
        for one, length, row in zip(batch, lengths, states, strict=True):
            if not self.before.read(one.key, row[:length]):  # the former group had the same batches
                why = "; ".join(self.before.damaged) or "they are gone"
                raise UserError(
                    f"States that waited for the next layers cannot be read again while the prefix cache is filled ({why}). Start again, name "
                    f"a freeze.prefix_cache_dir on another disk, or {self.work.asked.instead}."
                )
        return states.to(self.work.device)

    def close(self) -> None:
        """Give up the weights and what waits between groups."""
        self.passage = None
        for states in (self.before, self.after):
            if states is not None and states is not self.store:
                states.close()
        give_back()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
