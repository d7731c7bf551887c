"""What a run tells of itself while it goes on: the record and the trackers. Rank 0 tells; elsewhere nothing happens.

A disk that fills up between two steps is rank 0's trouble alone, and the other ranks would wait for it for ever. So a
failed write is kept here, and the loop lets every rank hear of it with the next numbers they exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import Recipe
from dsfreeze.record import Record
from dsfreeze.trackers import Tracker, start_trackers


class Journal:
    """Use: `open` once; then `step`, `evaluation` and `event` as things happen; `summary` at the end; `close` always."""

    def __init__(self, *, leader: bool) -> None:
        self.leader = leader
        self.failure: Exception | None = None
        self._trackers: list[Tracker] = []

    def open(
        self,
        recipe: Recipe,
        plan: FreezePlan,
        environment: Mapping[str, Any],
        deepspeed_config: Mapping[str, Any] | None,
        *,
        resume_step: int | None,
    ) -> None:
        """Start the record, or go on with it, and start the trackers; raises UserError."""
        if not self.leader:
            return
        self._record = Record.create(
            recipe.train.output_dir,
            recipe,
            plan,
            environment,
            deepspeed_config=deepspeed_config,
            resume_step=resume_step,
        )
        self._trackers = start_trackers(recipe)

    def step(self, line: Mapping[str, Any], *, track: bool) -> None:
        """A line of steps.jsonl; the trackers hear of it where `track` says so."""
        self._try(lambda: self._record.step(line))
        if track:
            figures = {f"train/{key}": value for key, value in line.items() if key != "step"}
            self._try(lambda: self._tell(line["step"], figures))

    def evaluation(self, when: str, step: int, metrics: Mapping[str, float]) -> None:
        self.event("evaluation", when=when, step=step, metrics=metrics)
        self._try(lambda: self._tell(step, {f"eval/{name}": value for name, value in metrics.items()}))

    def event(self, kind: str, **fields: Any) -> None:
        self._try(lambda: self._record.event(kind, **fields))

    def revision(self, step: int, plan: FreezePlan, scores: Mapping[str, float]) -> None:
        self._try(lambda: self._record.revision(step, plan, scores))

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The run is over; raises what failed to be written."""
        self.raise_failure()
        self._try(lambda: self._record.summary(summary))
        self.close()
        self.raise_failure()

    def raise_failure(self) -> None:
        """Raise the write that failed, if one did."""
        if self.failure is not None:
            raise self.failure

    def close(self) -> None:
        """Let the trackers write what they still hold; once is enough."""
        while self._trackers:
            self._try(self._trackers.pop().finish)

    def _tell(self, step: int, figures: Mapping[str, Any]) -> None:
        for tracker in self._trackers:
            tracker.log(step, figures)

    def _try(self, write: Callable[[], None]) -> None:
        if not self.leader:
            return
        try:
            write()
        except Exception as error:  # noqa: BLE001 (a tracker may raise anything)
            self.failure = self.failure or error
