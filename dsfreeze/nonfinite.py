"""Steps whose loss or gradient is no finite number. No engine takes one whose gradient is not; the run ends there and says which examples
it was, or goes on without it, so many times as `train.max_skipped_steps` allows. Every rank decides alike."""

from __future__ import annotations

import math

import numpy as np

from dsfreeze.engine import Engine
from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe

#: Examples that a message names.
_NAMED = 16


class NonFiniteSteps:
    """Use: `see` every micro-batch's loss on this rank, then ask whether the step was `taken`."""

    def __init__(self, recipe: Recipe) -> None:
        self.options, self.data = recipe.train, recipe.data.train
        self.skipped = 0
        self._first: tuple[int, list[int]] | None = None
        self._seen = 0

    def see(self, loss: float, chosen: np.ndarray) -> float:
        """The loss again, after a look at it. `chosen`: the micro-batch's examples, by index (from 0)."""
        if self._first is None and not math.isfinite(loss):
            self._first = self._seen, chosen.tolist()
        self._seen += 1
        return loss

    def taken(self, engine: Engine, step: int, loss: float, norm: float) -> bool:
        """Whether the step (its first is 1) was taken. UserError, on every rank, where it was not and none may be left out (collective then)."""
        mine, self._first, self._seen = self._first, None, 0
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        if self.skipped < self.options.max_skipped_steps:
            self.skipped += 1
            return False
        raise UserError(self._told(step, loss, norm, engine.gather(mine)))

    def _told(self, step: int, loss: float, norm: float, found: list[tuple[int, list[int]] | None]) -> str:
        rank, first = next(((rank, each) for rank, each in enumerate(found) if each is not None), (0, None))
        where = " No single batch's loss was: the gradients overflowed." if first is None else (
            f" It began on rank {rank} in micro-batch {first[0] + 1}, examples {', '.join(map(str, first[1][:_NAMED]))} of {self.data} "
            "(counted from 0 after data.max_train_examples and what was left out)."
        )  # fmt: skip
        before = f" {self.skipped} such steps were left out before it." if self.skipped else ""
        return (
            f"The loss of step {step} is {loss} and its gradient norm {norm}: training cannot go on.{where}{before} Lower train.learning_rate "
            f"(now {self.options.learning_rate:g}), look at these examples, set train.max_grad_norm, or leave a few such steps out with "
            "train.max_skipped_steps."
        )

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skipped = state["skipped"]
