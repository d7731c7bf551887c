"""Early stopping: which evaluation of held-out rows was the best, when to stop looking for a better one, and the way back to it.

The best evaluation's weights lie in output_dir/best.safetensors, all that the plan may ever train (of an adaptive plan all there are),
so that what first trained after it goes back to where it began. Every rank decides alike; rank 0 writes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dsfreeze.engine import Engine
from dsfreeze.engine.process import together
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.metrics import score

BEST = "best.safetensors"


class EarlyStopping:
    """Use: `judge` every evaluation, stop when it is `over`, then `go_back`. Without a patience it does nothing."""

    def __init__(self, job: Job) -> None:
        self.job, self.patience = job, job.recipe.train.early_stopping_patience
        self.best: float | None = None
        self.best_step = self.worse = 0

    @property
    def over(self) -> bool:
        return self.patience is not None and self.worse >= self.patience

    def judge(self, engine: Engine, step: int, numbers: Mapping[str, float]) -> None:
        """Hold an evaluation against the best so far; a better one's weights are kept (collective)."""
        value = score(self.job.data.metrics[0], numbers)
        if not value > (-math.inf if self.best is None else self.best):
            self.worse += 1
            return
        self.best, self.best_step, self.worse = value, step, 0
        plan = self.job.plan
        names = [t.name for t in self.job.held.tensors if plan.decide_at is not None or t.name in plan.ever_trained]
        weights = engine.export_weights(names)
        together(lambda: self._write(weights) if engine.rank == 0 else None)

    def go_back(self, engine: Engine, step: int) -> bool:
        """Give the engine the best evaluation's weights; whether they were others (collective)."""
        if self.best is None or self.best_step == step:
            return False
        engine.write_weights(together(self._read))
        return True

    def _write(self, weights: Mapping[str, Any]) -> None:
        aside = self._path.with_name(f".{BEST}.tmp")
        try:
            whole = {name: weight.contiguous() for name, weight in weights.items()}
            save_file(whole, aside, metadata={"step": str(self.best_step)})
            os.replace(aside, self._path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"Could not write {self._path}, the best weights so far: {error}. Free disk space there."
            ) from None

    def _read(self) -> dict[str, Any]:
        """UserError where the file is gone, or is another evaluation's: of a run that was stopped later than where this one began."""
        try:
            with safe_open(self._path, "pt") as file:
                found = int(file.metadata()["step"])
            if found == self.best_step:
                return load_file(self._path)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"Cannot read {self._path}, the best weights of this run: {error}. Train again.") from None
        raise UserError(f"{self._path} is of step {found}, and the best was step {self.best_step}. Train again.")

    @property
    def _path(self) -> Path:
        return self.job.output_dir / BEST

    def drop(self) -> None:
        """The run is over: its model is in the engine."""
        self._path.unlink(missing_ok=True)

    def summary(self) -> dict[str, Any] | None:
        """The best evaluation, its score 0 to 100 by `metrics.score`."""
        if self.patience is None:
            return None
        return {"metric": self.job.data.metrics[0], "score": self.best, "step": self.best_step, "stopped": self.over}

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "worse": self.worse}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.worse = state["best"], state["best_step"], state["worse"]
