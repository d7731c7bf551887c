"""The prefix cache of one run: at which cut states are stored, where a forward pass starts, and what that saved.

A batch starts at the highest cut at which all of its examples are stored, and what leaves the prefix is stored if it was not.
So a cut that moves up goes on from the states below it, and one that moves down uses what is stored at or below it, or
computes. What is stored is only ever read by the weights that made it: levels are told apart by the digests of their layers.

At stage 3 a forward pass is collective, and so is the question where it starts. Everything marked collective is called by every
rank. `read` alone runs in the read-ahead thread too.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console

from dsfreeze.anatomy import Layer
from dsfreeze.data.examples import Batch
from dsfreeze.engine import Engine
from dsfreeze.engine.process import everyones
from dsfreeze.engine.ranks import Ranks
from dsfreeze.estimate.caching import Choice
from dsfreeze.job import Job
from dsfreeze.model_card import public_name
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.prefix.choice import Stretch, choose_tier, stored_as, stretch_of
from dsfreeze.prefix.keys import layer_digest, manifest_of
from dsfreeze.prefix.levels import Level, open_level, stored_keys
from dsfreeze.prefix.passage import Kept, Passage, Span, cut_of, require_passable
from dsfreeze.prefix.rows import Rows


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

    cached: list[float] = field(default_factory=list)
    computed: list[float] = field(default_factory=list)


class PrefixCache:
    """Use: `enter` a phase (before its first pass); `around` every forward pass; `share` at an epoch's end; `close`."""

    def __init__(self, job: Job, ranks: Ranks, console: Console, num_steps: int, steps_per_epoch: int) -> None:
        self.job, self.ranks, self.console = job, ranks, console
        self.num_steps, self.steps_per_epoch = num_steps, steps_per_epoch
        self.options = job.recipe.freeze
        self.wanted = self.options.prefix_cache != "off"
        self.dtype = torch.bfloat16 if job.recipe.train.bf16 else torch.float32
        self.train = Rows(job.data.train) if job.data.train is not None else None
        self.eval = Rows(job.data.eval) if job.data.eval is not None else None
        self.view = View()
        self.trained, self.evaluated, self.times = Tally(), Tally(), Times()
        self.tier, self.reason = "off", ""
        self._passage: Passage | None = None
        self._phase: Phase | None = None
        self._digests: dict[str, str] = {}
        self._levels: list[Level] = []
        self._passable: set[int] = set()
        self._missed = False
        self._told: set[str] = set()

    # -- phases ------------------------------------------------------------------------------------------------

    def enter(self, engine: Engine, phase: Phase, step: int) -> None:
        """Follow the engine into a phase: its cut, and whether to store there (collective; free when the set is the same)."""
        if not self.wanted or (self._phase is not None and self._phase.trainable == phase.trainable):
            self._phase = phase
            return
        left, self._phase = self._phase, phase
        self._forget(left.trainable if left is not None else _trained_before(self.job.plan, step))
        self.view = View()  # until it is settled what may be read
        self._open(engine, stretch_of(self.job.plan, self.job.anatomy, phase, step, self.num_steps))
        self._drop_stale()
        cut = cut_of(self.job.anatomy, phase.trainable)
        usable = [level for level in self._levels if level.cut <= cut]
        self.view = View(cut if usable else 0, tuple(sorted(usable, key=lambda level: -level.cut)))

    def _forget(self, trained: Iterable[str]) -> None:
        """Layers that have trained are not what their digests say any more."""
        for name in {self.job.anatomy.layer_of[t].name for t in trained}:
            self._digests.pop(name, None)

    def _open(self, engine: Engine, stretch: Stretch) -> None:
        choice = choose_tier(self.job, self.ranks, stretch, self.steps_per_epoch, self._tokens())
        if self.options.prefix_cache == "auto" and stretch.cut and self._lies_on_disk(engine, stretch):
            choice = Choice("disk", "disk: another run has stored the states of these examples")
        if choice.tier != "off":
            self._open_level(engine, stretch, choice)
        if choice.tier != "off" or self.tier == "off":
            self.tier, self.reason = choice.tier, choice.reason
        self._tell(f"prefix cache: {choice.reason}")

    def _open_level(self, engine: Engine, stretch: Stretch, choice: Choice) -> None:
        digests = self._digests_of(engine, stretch.layers)
        if any(level.digests == digests for level in self._levels):
            return
        self._require_passable(engine, stretch.cut)
        manifest, width = self._manifest(stretch.cut, digests, engine.device), self.job.anatomy.hidden_size
        folder = self.options.prefix_cache_dir
        level = open_level(choice.tier, stretch.cut, digests, manifest, width, self.ranks, folder)
        self._levels.append(level)
        for note in level.notes:
            self._tell(f"prefix cache: {note}")

    def _lies_on_disk(self, engine: Engine, stretch: Stretch) -> bool:
        """Whether every rank finds all training examples in a folder (collective)."""
        manifest = self._manifest(stretch.cut, self._digests_of(engine, stretch.layers), engine.device)
        stored = stored_keys(manifest, self.job.anatomy.hidden_size, self.options.prefix_cache_dir)
        rows = self.train
        found = bool(stored) and rows is not None and all(rows.key(i) in stored for i in range(len(rows.examples)))
        return set(everyones(str(found))) == {"True"}

    def _manifest(self, cut: int, digests: tuple[str, ...], device: torch.device) -> dict[str, Any]:
        config, recipe = self.job.module.config, self.job.recipe
        return manifest_of(
            model=public_name(recipe.model.name), config=config, cut=cut, layers=digests,
            attention=getattr(config, "_attn_implementation", None), dtype=self.dtype, stored=stored_as(self.job),
            device=device.type, tokenizer=self.job.tokenizer, max_length=recipe.data.max_length,
        )  # fmt: skip

    def _digests_of(self, engine: Engine, layers: Sequence[Layer]) -> tuple[str, ...]:
        for layer in layers:
            if layer.name not in self._digests:
                weights = {tensor.name: engine.read_weight(tensor.name) for tensor in layer.tensors}
                self._digests[layer.name] = layer_digest(layer, weights)
        return tuple(self._digests[layer.name] for layer in layers)

    def _drop_stale(self) -> None:
        """Close the levels whose layers have trained since."""
        layers = [layer.name for layer in self.job.anatomy.layers]
        for level in list(self._levels):
            if any(self._digests.get(name) != own for name, own in zip(layers, level.digests, strict=False)):
                level.close()
                self._levels.remove(level)

    def _require_passable(self, engine: Engine, cut: int) -> None:
        if self._passage is None:
            self._passage = Passage(engine.module, self.job.anatomy)
        rows = self.train or self.eval
        if cut in self._passable or rows is None:
            return
        shortest = np.argsort(rows.examples.num_tokens, kind="stable")[:2]
        batch = self.job.data.collate([rows.examples[int(index)] for index in shortest])
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        require_passable(self._passage, engine.no_grad_forward, inputs, cut)
        self._passable.add(cut)

    def _tokens(self) -> tuple[int, int]:
        return self.train.tokens if self.train else 0, self.eval.tokens if self.eval else 0

    # -- passes ------------------------------------------------------------------------------------------------

    def read(self, rows: Rows, chosen: np.ndarray, width: int) -> Staged | None:
        """The examples' states from the highest level that holds them all, in a batch `width` positions wide."""
        for level in self.view.levels:
            wanted = rows.of(chosen)
            if not all(key in level.store for key, _ in wanted):
                continue
            states = torch.zeros(len(wanted), width, self.job.anatomy.hidden_size, dtype=self.dtype)
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
        stage 3). `staged`: what was read ahead; `counts`: whether it is no filler."""
        view = self.view
        if not view.cut or rows is None:
            yield
            return
        if staged is None or staged.level not in view.levels:
            staged = self.read(rows, chosen, batch["input_ids"].shape[1])
        staged = self._agreed(engine, view, staged)
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

    # -- the run -----------------------------------------------------------------------------------------------

    def after_step(self, seconds: float) -> None:
        """A step has taken so long."""
        if self.view.cut:
            (self.times.computed if self._missed else self.times.cached).append(seconds)
        self._missed = False

    def share(self, engine: Engine) -> None:
        """Let every rank see what the others have stored (collective)."""
        if engine.world_size == 1 or not self._levels:
            return
        for level in self._levels:
            level.store.flush()
        engine.barrier()
        for level in self._levels:
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

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self.console.print(sentence, highlight=False)

    def summary(self, engine: Engine) -> Mapping[str, Any] | None:
        """What the cache did, of all ranks (collective); None where none was asked for."""
        if not self.wanted:
            return None
        counts = {
            "hits": self.trained.hits, "extended": self.trained.extended, "examples": self.trained.total,
            "evaluation_hits": self.evaluated.hits, "evaluation_examples": self.evaluated.total,
        }  # fmt: skip
        totals = engine.sum([float(number) for number in counts.values()])
        top = max(self._levels, key=lambda level: level.cut, default=None)
        return {
            "tier": self.tier, "reason": self.reason, "cut": top.cut if top else 0,
            "where": top.where if top else None,
            **{name: int(total) for name, total in zip(counts, totals, strict=True)},
            "bytes": sum(level.store.nbytes for level in self._levels),
            "seconds_per_cached_step": _median(self.times.cached),
            "seconds_per_computed_step": _median(self.times.computed),
            "told": sorted(self._told),
        }  # fmt: skip

    def close(self) -> None:
        self.view = View()
        while self._levels:
            self._levels.pop().close()


def _trained_before(plan: FreezePlan, step: int) -> set[str]:
    return {name for phase in plan.phases if phase.first_step < step for name in phase.trainable}


def _median(seconds: Sequence[float]) -> float | None:
    return statistics.median(seconds) if seconds else None
