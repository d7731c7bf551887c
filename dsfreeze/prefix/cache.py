"""The prefix cache of one run: at which cut states are stored, where a forward pass starts, and what that saved.

A batch starts at the highest cut at which all of its examples are stored, and what leaves the prefix is stored if it was not.
So a cut that moves up goes on from the states below it, and one that moves down uses what is stored at or below it, or
computes. What is stored is only ever read by the weights that made it: levels are told apart by the digests of their layers.

At stage 3 a forward pass is collective, and so is the question where it starts. Everything marked collective is called by every
rank. `read` alone runs in the read-ahead thread too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dsfreeze.data.examples import Batch
from dsfreeze.durations import Durations
from dsfreeze.engine import Engine
from dsfreeze.engine.process import everyones
from dsfreeze.engine.ranks import Ranks
from dsfreeze.errors import UserError
from dsfreeze.job import Job, dtype_of
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.prefix.choice import Stretch, choose_tier, precise, stretch_of
from dsfreeze.prefix.holdings import Holdings, ReadWeight
from dsfreeze.prefix.levels import Level
from dsfreeze.prefix.passage import (
    Kept,
    Passage,
    Span,
    cut_of,
    require_fixed_positions,
    require_passable,
    require_suffix,
)
from dsfreeze.prefix.rows import Rows
from dsfreeze.prefix.store import MemoryStore
from dsfreeze.prefix.streaming import of_all_ranks, prefill
from dsfreeze.progress import Watch, watched


@dataclass(frozen=True)
class Staged:
    """A batch's states, (batch, positions, d) on the CPU, zeros where it is padded, as they leave the level's cut."""

    level: Level
    states: torch.Tensor


@dataclass(frozen=True)
class View:
    """What the read-ahead thread goes by: the cut in force and the levels at or below it, the highest first."""

    cut: int = 0
    levels: tuple[Level, ...] = ()


@dataclass
class Tally:
    """Examples that started at the cut, that went on from a lower one, and that were computed from their tokens."""

    hits: int = 0
    extended: int = 0
    misses: int = 0

    def count(self, start: int, cut: int, number: int) -> None:
        kind = "hits" if start == cut else "extended" if start else "misses"
        setattr(self, kind, getattr(self, kind) + number)

    @property
    def total(self) -> int:
        return self.hits + self.extended + self.misses


@dataclass
class Times:
    """Seconds of the steps that read all of their states, and of the others."""

    cached: Durations = field(default_factory=Durations)
    computed: Durations = field(default_factory=Durations)


class PrefixCache:
    """Use: `prefill` before the engine is built; `enter` a phase before its first pass; `around` every forward pass; `share` at an
    epoch's end; `close`."""

    def __init__(self, job: Job, ranks: Ranks, console: Console, num_steps: int, steps_per_epoch: int) -> None:
        self.job, self.ranks, self.console = job, ranks, console
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.asked = self.wanted = job.recipe.freeze.prefix_cache != "off"
        self.dtype = dtype_of(job.recipe)
        self.train = Rows(job.data.train) if job.data.train is not None else None
        self.eval = Rows(job.data.eval) if job.data.eval is not None else None
        self.view = View()
        self.trained, self.evaluated, self.times = Tally(), Tally(), Times()
        self.tier, self.reason = "off", ""
        self.holdings = Holdings(job, ranks)
        self._passage: Passage | None = None
        self._phase: Phase | None = None
        self._passable: set[int] = set()
        self._missed = False
        self._told: dict[str, str] = {}

    # -- phases ------------------------------------------------------------------------------------------------

    def prefill(self) -> dict[str, Any]:
        """Complete the cache of an evicted prefix, and say what it holds (collective)."""
        assert self.job.eviction is not None, "a prefix that is held is cached on the way"
        plan, anatomy = self.job.plan, self.job.anatomy
        lowest = min(plan.phases, key=lambda phase: cut_of(anatomy, phase.trainable))
        level = self._open(stretch_of(plan, anatomy, lowest, 0, self.num_steps), _no_weights)
        assert level is not None, "an evicted prefix is always cached"
        scratch = partial(level.scratch, anatomy.hidden_size, precise(self.job.recipe))
        watch: Watch[Any] = watched(self.console, "filling the prefix cache")
        rows = [part for part in (self.train, self.eval) if part is not None]
        filled = of_all_ranks(prefill(self.job, rows, level.store, scratch, share=level.share, watch=watch))
        self._tell(f"prefix cache: computed {filled}; the prefix's weights are not held")
        return {
            "layers": level.cut, "examples": len(level.store), "bytes": level.store.nbytes, "where": level.where,
            "computed_examples": filled.examples, "computed_tokens": filled.tokens, "seconds": filled.seconds,
        }  # fmt: skip

    def enter(self, engine: Engine, phase: Phase, step: int) -> None:
        """Follow the engine into a phase: its cut, and whether to store there (collective; free when the set is the same)."""
        if not self.wanted or (self._phase is not None and self._phase.trainable == phase.trainable):
            self._phase = phase
            return
        left, self._phase = self._phase, phase
        self.holdings.forget(left.trainable if left is not None else _trained_before(self.job.plan, step))
        self.view = View()  # until it is settled what may be read
        stretch = stretch_of(self.job.plan, self.job.anatomy, phase, step, self.num_steps)
        self._open(stretch, engine.read_weight)
        self.holdings.drop_stale()
        usable = [level for level in self.holdings.levels if level.cut <= stretch.cut]
        self.view = View(stretch.cut if usable else 0, tuple(sorted(usable, key=lambda level: -level.cut)))
        if usable:
            self._settle(engine)

    def _open(self, stretch: Stretch, read: ReadWeight) -> Level | None:
        """The stretch's level: open already, or worth opening."""
        if stretch.cut and (level := self.holdings.find(stretch, read)):
            return level
        there = self.holdings.there(stretch, read, self.train)
        choice = choose_tier(
            self.job, self.ranks, stretch, self.steps_per_epoch, self._tokens(), there, first=not self.reason
        )
        # its figures change with the steps that are left; said for each of them it would be said at every turn of a plan that rotates
        self._tell(f"prefix cache: {choice.reason}", once_for=f"{stretch.cut} {choice.tier}")
        if choice.tier == "off":
            self.reason = self.reason or choice.reason
            return None
        self.tier, self.reason = choice.tier, choice.reason
        level = self.holdings.open(stretch, choice, read)
        for note in level.notes:
            self._tell(f"prefix cache: {note}")
        return level

    def _settle(self, engine: Engine) -> None:
        """Make sure that the model can start at the cut: an error where a cache was asked for by name, a reason against it where `auto`
        was to find out (collective at stage 3)."""
        try:
            self._require_passable(engine)
            refusal = ""
        except UserError as problem:
            refusal = str(problem)
        refusal = next(filter(None, everyones(refusal)), "")  # ranks round apart, and must go on alike
        if not refusal:
            return
        if self.job.recipe.freeze.prefix_cache != "auto" or self.job.eviction is not None:
            raise UserError(refusal)
        self.tier, self.reason, self.wanted = "off", f"off: {refusal}", False
        self._tell(f"prefix cache: {self.reason}")
        self.close()

    def _require_passable(self, engine: Engine) -> None:
        """Two examples through the model with and without its prefix (collective at stage 3); UserError where that differs."""
        if self._passage is None:
            self._passage = Passage(engine.module, self.job.anatomy)
        rows, cut = self.train or self.eval, self.view.cut
        if cut in self._passable or rows is None:
            return
        self._passable.add(cut)
        shortest = np.argsort(rows.examples.num_tokens, kind="stable")[:2]
        batch = self.job.data.collate([rows.examples[int(index)] for index in shortest])
        require_fixed_positions(self._passage, self.job.recipe.data.max_length)
        if self.job.eviction is None:
            require_passable(self._passage, engine.no_grad_forward, batch, cut, self.dtype)
            return
        staged = self.read(rows, shortest, batch["input_ids"].shape[1])
        self._require_states(engine, staged)
        assert staged is not None, "it was asked for"
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        states = staged.states.to(engine.device)
        require_suffix(self._passage, engine.no_grad_forward, inputs, states, staged.level.cut)

    def _tokens(self) -> tuple[int, int]:
        """Of the examples that training and evaluation will pass."""
        evaluates = self.eval is not None and self.job.recipe.train.eval_strategy != "no"
        return self.train.tokens if self.train else 0, self.eval.tokens if self.eval and evaluates else 0

    # -- passes ------------------------------------------------------------------------------------------------

    def read(self, rows: Rows, chosen: np.ndarray, width: int, above: int = 0) -> Staged | None:
        """The examples' states from the highest level over the cut `above` that holds them all, in a batch `width` positions wide."""
        for level in self.view.levels:
            wanted = rows.of(chosen)
            if level.cut <= above or not all(key in level.store for key, _ in wanted):
                continue
            shape = (len(wanted), width, self.job.anatomy.hidden_size)
            # from pinned memory a GPU takes them while it computes
            states = torch.zeros(shape, dtype=self.dtype, pin_memory=self.ranks.device.type == "cuda")
            if all(level.store.read(key, states[row, :length]) for row, (key, length) in enumerate(wanted)):
                return Staged(level, states)
        return None

    @contextmanager
    def around(
        self,
        engine: Engine,
        rows: Rows | None,
        chosen: np.ndarray,
        batch: Batch,
        staged: Staged | None = None,
        *,
        counts: bool = True,
    ) -> Iterator[None]:
        """Within it a forward pass of this batch starts at the highest cut it can, and stores what is not stored (collective at
        stage 3). `staged`: what was read ahead; `counts`: whether `summary` counts it, which a filler is not worth."""
        view = self.view
        if not view.cut or rows is None:
            yield
            return
        if staged is not None and staged.level not in view.levels:
            staged = None
        if (ahead := staged.level.cut if staged else 0) < view.cut:  # what was not there then may be there now
            staged = self.read(rows, chosen, batch["input_ids"].shape[1], above=ahead) or staged
        staged = self._agreed(engine, view, staged)
        self._require_states(engine, staged)
        start = staged.level.cut if staged else 0
        top = view.levels[0] if view.levels[0].cut == view.cut else None
        states = staged.states.to(engine.device, non_blocking=True) if staged else None
        assert self._passage is not None, "a level is open"
        with self._passage.over(Span(start, states, keep=top.cut if top and start < top.cut else None)) as kept:
            yield
        self._missed |= start < view.cut
        if counts:
            (self.trained if rows is self.train else self.evaluated).count(start, view.cut, len(chosen))
        if top is not None:
            self._store(top, rows, chosen, kept)

    def _store(self, level: Level, rows: Rows, chosen: np.ndarray, kept: Kept) -> None:
        if kept.states is None:
            return
        states = kept.states.to("cpu")
        for row, (key, length) in enumerate(rows.of(chosen)):
            level.store.add(key, states[row, :length])
        self._tell_trouble(level)

    def _agreed(self, engine: Engine, view: View, staged: Staged | None) -> Staged | None:
        """Where every forward pass is collective all ranks start at one cut, or none above the tokens."""
        if getattr(engine, "stage", 0) < 3 or engine.world_size == 1:
            return staged
        start = staged.level.cut if staged else 0
        counts = engine.sum([float(start == cut) for cut in (0, *(level.cut for level in view.levels))])
        return staged if max(counts) == engine.world_size else None

    def _require_states(self, engine: Engine, staged: Staged | None) -> None:
        """UserError on every rank where one has no states for a batch, and no prefix to compute them with (collective then)."""
        if self.job.eviction is None or not engine.sum([float(staged is None)])[0]:
            return
        why = "; ".join(f"{reason}" for level in self.holdings.levels for reason in level.store.damaged) or "it is gone"
        raise UserError(
            f"The prefix cache cannot give the states of a batch any more ({why}), and the prefix's weights are not held. Start the run "
            "again: what is missing is filled in first; with train.resume_from_checkpoint=true it goes on from its newest checkpoint."
        )

    # -- the run -----------------------------------------------------------------------------------------------

    def after_step(self, seconds: float) -> None:
        """A step has taken so long."""
        if self.view.cut:
            (self.times.computed if self._missed else self.times.cached).add(seconds)
        self._missed = False

    def share(self, engine: Engine) -> None:
        """Let every rank see what the others have stored (collective)."""
        if engine.world_size == 1 or not self.holdings.levels:
            return
        for level in self.holdings.levels:
            level.store.flush()
        engine.barrier()
        for level in self.holdings.levels:
            level.store.refresh()
            self._tell_trouble(level)

    def _tell_trouble(self, level: Level) -> None:
        for reason in level.store.damaged:
            self._tell(f"prefix cache: {reason}; its examples are computed again")
        if level.store.failure:
            self._tell(f"prefix cache: {level.store.failure}")
        if level.store.refused:
            self._tell(
                "prefix cache: some states are too large for freeze.prefix_cache_dtype; their examples are computed every time"
            )

    def _tell(self, sentence: str, *, once_for: str = "") -> None:
        """Say a sentence that was not said yet, or none for what `once_for` names."""
        if (once_for or sentence) not in self._told:
            self._told[once_for or sentence] = sentence
            self.console.print(sentence, highlight=False)

    def summary(self, engine: Engine) -> Mapping[str, Any] | None:
        """What the cache did, of all ranks (collective); None where none was asked for."""
        if not self.asked:
            return None
        counts = {
            "hits": self.trained.hits, "extended": self.trained.extended, "examples": self.trained.total,
            "evaluation_hits": self.evaluated.hits, "evaluation_examples": self.evaluated.total,
        }  # fmt: skip
        totals = engine.sum([float(number) for number in counts.values()])
        top = max(self.holdings.levels, key=lambda level: level.cut, default=None)
        return {
            "tier": self.tier, "reason": self.reason, "cut": top.cut if top else 0,
            "where": top.where if top else None,
            **{name: int(total) for name, total in zip(counts, totals, strict=True)},
            "bytes": sum(level.store.nbytes for level in self.holdings.levels),
            "seconds_per_cached_step": self.times.cached.median(),
            "seconds_per_computed_step": self.times.computed.median(),
            "told": list(self._told.values()),
            "evicted_bytes": self._evicted_bytes(),
        }  # fmt: skip

    def as_chosen(self) -> Job:
        """The job with the tier that was chosen in its recipe, as the planner prices it."""
        recipe = self.job.recipe
        freeze = recipe.freeze.model_copy(update={"prefix_cache": self.tier})
        return replace(self.job, recipe=recipe.model_copy(update={"freeze": freeze}))

    @property
    def bytes_in_process(self) -> int:
        """Of states that lie in this process's own memory."""
        return sum(level.store.nbytes for level in self.holdings.levels if isinstance(level.store, MemoryStore))

    def _evicted_bytes(self) -> int:
        eviction, by_name = self.job.eviction, self.job.plain.by_name
        return sum(by_name[name].numel for name in eviction.names) * self.dtype.itemsize if eviction else 0

    def close(self) -> None:
        self.view = View()
        self.holdings.close()


def _no_weights(name: str) -> torch.Tensor:
    raise AssertionError(f"{name} is evicted: its digest is known")


def _trained_before(plan: FreezePlan, step: int) -> set[str]:
    return {name for phase in plan.phases if phase.first_step < step for name in phase.trainable}
