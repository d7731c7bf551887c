"""A run's way through its plan: entering phases, what moved in them, and revising an adaptive plan.

Rank 0 decides a revision, every rank receives it; the record keeps each with the scores that caused it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from dsfreeze.engine import Engine
from dsfreeze.engine.process import together
from dsfreeze.job import Job
from dsfreeze.journal import Journal
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.strategies.adaptive import ADAPTIVE, needs
from dsfreeze.strategies.evidence import Revision
from dsfreeze.tracking import Tracker

#: After so many steps it is asked whether every trainable tensor moves, so that a mistake is not found out at the end;
#: shorter phases do not pay for a look at all frozen tensors each (one that thaws is looked at in any case).
FIRST_LOOK = 10


class Phases:
    """Use: `start` once, then for every step `enter`, the step itself, and `after_step`; `look` at the end."""

    def __init__(self, job: Job, journal: Journal, console: Console, num_steps: int) -> None:
        self.job, self.journal, self.console, self.num_steps = job, journal, console, num_steps
        adaptive = job.plan.strategy in ADAPTIVE
        self.tracker = Tracker(job, needs(job.recipe.freeze)) if adaptive else None
        self.memory: Mapping[str, Any] = {}
        self.phase: Phase | None = None
        self.seconds_switching = 0.0
        self.switches = 0
        #: What deciding took: bytes of the device at the most until the last decision, and of copies in host memory.
        self.selection: dict[str, Any] = {"decisions": 0, "seconds": 0.0, "peak": 0, "host_bytes": 0}
        self._looked = self._started = 0
        #: Tensors that have trained and not moved so far.
        self.still: tuple[str, ...] = ()

    def start(self, engine: Engine, step: int) -> None:
        """Enter the phase that a run which has made `step` steps is in; before its state is loaded."""
        if self.job.plan.decide_at is None:
            self.tracker = None
        if self.tracker:  # measured against the start of the run, whose weights the model has now
            engine.enter(self.job.plan.phases[0])
            self.tracker.start(engine)
        self.phase = self.job.plan.phase_at(max(0, step - 1))
        engine.enter(self.phase)
        self._looked = self._started = step

    def phase_at(self, step: int) -> Phase:
        """The phase that the engine is in when `step` steps are made: that of the next one is entered with it."""
        return self.phase or self.job.plan.phase_at(step)

    def enter(self, engine: Engine, step: int) -> Phase:
        """The phase of `step`, entered (collective). The one that ended is looked at first."""
        phase = self.job.plan.phase_at(step)
        if self.phase is not None and phase.trainable != self.phase.trainable:
            if step > self._started:  # resumed at a boundary: here, the phase that ended made no step
                self.look(engine, step, frozen=step - self._looked >= FIRST_LOOK)
            began = time.perf_counter()
            engine.enter(phase)
            self._tell(phase, step, time.perf_counter() - began)
        self.phase = phase
        return phase

    def _tell(self, phase: Phase, step: int, seconds: float) -> None:
        self.switches += 1
        self.seconds_switching += seconds
        chosen = set(phase.trainable)
        layers = [layer.name for layer in self.job.anatomy.layers if any(t.name in chosen for t in layer.tensors)]
        self.journal.event("phase", step=step, layers=layers, tensors=len(chosen), seconds=seconds)

    def after_step(self, engine: Engine, step: int, loss: float, learning_rate: float) -> None:
        """After `step` steps: measure, take the early look, revise the plan if it is time (collective)."""
        if self.tracker:
            self.tracker.after_step(engine, loss, learning_rate)
        if step == FIRST_LOOK < self.num_steps:  # the end has its own look
            self.look(engine, step)
        if self.tracker and self.job.plan.decide_at == step < self.num_steps:
            self._decide(engine, step)

    # -- revisions ---------------------------------------------------------------------------------------------

    def _decide(self, engine: Engine, step: int) -> None:
        assert self.tracker is not None
        began = time.perf_counter()
        evidence = self.tracker.evidence(engine, step)
        rule, options = ADAPTIVE[self.job.plan.strategy], self.job.recipe.freeze

        def decide() -> Revision | None:
            if engine.rank:
                return None
            return rule.revise(self.job.plain, options, self.num_steps, self.job.plan, evidence, self.memory)

        revision = together(decide)
        told = engine.gather(
            None if revision is None else (revision.plan.to_json(), dict(revision.scores), dict(revision.memory))
        )[0]
        revised, scores, self.memory = FreezePlan.from_json(told[0]), told[1], told[2]
        assert revised.masks == self.job.plan.masks, "the engine holds back what the first plan says"
        self.job.plan = revised
        self.journal.revision(step, self.job.plan, scores)
        peak = engine.memory(reset_peak=self.job.plan.decide_at is None).peak
        self.selection = {
            "decisions": self.selection["decisions"] + 1,
            "seconds": self.selection["seconds"] + time.perf_counter() - began,
            "peak": max(peak, self.selection["peak"]),
            "host_bytes": max(self.tracker.host_bytes(engine), self.selection["host_bytes"]),
        }
        self.tracker.reset()
        if self.job.plan.decide_at is None:  # nothing is left to decide: stop measuring
            engine.watch()
            self.tracker = None

    # -- what moved --------------------------------------------------------------------------------------------

    def look(self, engine: Engine, step: int, *, frozen: bool = True) -> None:
        """Name trainable tensors that stand still in a warning; a frozen one that moved is a bug of ours (collective)."""
        assert self.phase is not None
        moved = engine.movement(frozen=frozen)
        assert not moved.frozen_changed, f"frozen tensors changed: {moved.frozen_changed[:3]}"
        self._looked = step if frozen else self._looked
        alive = set(self.phase.trainable) - set(moved.never_moved)
        known = set(self.still)
        self.still = tuple(n for n in self.still if n not in alive) + tuple(
            n for n in moved.never_moved if n not in known and step > self.phase.first_step
        )
        if moved.never_moved and step - self.phase.first_step >= min(FIRST_LOOK, self.num_steps):
            self._warn(moved.never_moved, step)

    def _warn(self, still: tuple[str, ...], step: int) -> None:
        self.journal.event("never_moved", step=step, tensors=list(still))
        self.console.print(
            f"[yellow]warning[/] {len(still)} trainable tensors have not moved by step {step}: "
            f"{', '.join(still[:3])}{' ...' if len(still) > 3 else ''}. The model's forward pass does not use them, "
            "or no gradient reaches them; freeze them, or mend the model.",
            highlight=False,
        )

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on; plain values."""
        return {
            "still": list(self.still), "memory": dict(self.memory), "switches": self.switches,
            "seconds_switching": self.seconds_switching, "selection": self.selection,
            "tracker": self.tracker.state_dict() if self.tracker else None,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.still, self.memory = tuple(state["still"]), state["memory"]
        self.switches, self.seconds_switching = state["switches"], state["seconds_switching"]
        self.selection = state["selection"]
        if self.tracker:
            self.tracker.load_state_dict(state["tracker"])
