"""Ctrl-C and SIGTERM end a run at the next step, with a checkpoint, and an exit code that says so."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Interrupt:
    """Within the block the first signal is remembered, not obeyed, and later ones are dropped: launchers send SIGTERM again
    while the checkpoint is being written. The third Ctrl-C is a person who will not wait; it acts at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal = 0
        self._interrupts = 0

    def __enter__(self) -> Interrupt:
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def flags(self) -> list[float]:
        """One number per signal of SIGNALS, 1.0 where it arrived here; ranks add theirs."""
        return [float(self.signal == number) for number in self.SIGNALS]

    def first(self, flags: list[float]) -> int:
        """The signal that `flags`, summed over ranks, tells of; the gentler one where both came."""
        return next(number for number, flag in zip(self.SIGNALS, flags, strict=True) if flag)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        self._interrupts += number == signal.SIGINT
        if self._interrupts == 2:
            signal.signal(signal.SIGINT, self._before[signal.SIGINT])


class Interrupted(Exception):
    """A run that a signal ended after `step` steps; its checkpoint is whole. `exit_code` is the shell's 128 + signal."""

    def __init__(self, number: int, step: int, checkpoint: str) -> None:
        name = signal.Signals(number).name
        super().__init__(
            f"{name} after step {step}: wrote {checkpoint}. Continue with train.resume_from_checkpoint=true."
        )
        self.exit_code = 128 + number

    @classmethod
    def of(cls, number: int, what_to_do: str) -> Interrupted:
        """That a signal ended many runs, each with its checkpoint."""
        found = cls(number, 0, "")
        found.args = (f"{signal.Signals(number).name}. {what_to_do}",)
        return found
