"""What a person sees while a run goes on: a bar with ETA, tokens/s and loss on standard error (rank 0 alone)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

T = TypeVar("T")
#: Goes through a sequence and shows how far it has come.
Watch = Callable[[Sequence[T]], Iterable[T]]


class StepBar:
    """A bar over the run's steps. Where standard error is no terminal, a line every `every` steps instead."""

    def __init__(self, console: Console, total: int, done: int, every: int, *, shown: bool) -> None:
        self.console, self.total, self.every, self.shown = console, total, every, shown
        figures = TextColumn("{task.fields[figures]}")
        self.bar = Progress(*_columns(), figures, console=console, disable=not (shown and console.is_terminal))
        self.task = self.bar.add_task("training", total=total, completed=done, figures="")

    def __enter__(self) -> StepBar:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def advance(self, step: int, loss: float, tokens_per_second: float) -> None:
        figures = f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, completed=step, figures=figures)
        if self.shown and not self.console.is_terminal and (step % self.every == 0 or step == self.total):
            self.console.print(f"step {step}/{self.total}  {figures}", highlight=False)


def watched(console: Console, description: str) -> Watch[T]:
    """A bar with ETA over what is gone through; where the console is no terminal, a line at the start."""

    def through(sequence: Sequence[T]) -> Iterable[T]:
        if not console.is_terminal:
            console.print(f"{description}: {len(sequence)} rounds", highlight=False)
        with Progress(*_columns(), console=console, disable=not console.is_terminal) as bar:
            yield from bar.track(sequence, description=description)

    return through


def _columns() -> Iterable[ProgressColumn]:
    return (
        TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(),
    )  # fmt: skip
