"""A queue of processes on one machine: as many at once as there are jobs, and as their predicted bytes allow. No torch.

What is to run comes from *sources*, generators that yield batches of work and are sent their results, so that what comes next may
depend on what came before (a learning rate on its trials). Work of the same key runs once, whoever asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dsfreeze.recipe import Recipe
from dsfreeze.record import RecordData

#: Seconds between looks at what runs.
POLL = 0.02


@dataclass(frozen=True)
class Work:
    """One process: `dsfreeze VERB` of a recipe whose files go to the recipe's own folder. `order`: lower ones begin earlier."""

    key: str
    recipe: Recipe
    verb: Literal["train", "analyze"] = "train"
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class Result:
    """How a piece of work ended; a finished training has its record."""

    status: Literal["done", "failed", "impossible", "interrupted"]
    reason: str | None = None
    record: RecordData | None = None


class Process(Protocol):
    """What the queue needs of a `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Source = Generator[list[Work], list[Result], None]


class Shop(Protocol):
    """Who knows what work is."""

    def known(self, work: Work) -> Result | None:
        """The result of work that need not run: it has finished, or never can."""

    def bytes_of(self, work: Work) -> int | None:
        """Predicted bytes; None where nobody knows, so that it runs alone."""

    def start(self, work: Work) -> Process: ...

    def ended(self, work: Work, code: int) -> Result: ...


@dataclass
class _Batch:
    """What a source waits for."""

    source: Source
    works: list[Work]
    results: dict[str, Result] = field(default_factory=dict)


class Queue:
    """Runs sources to their end, or until `stop` says so."""

    def __init__(
        self, shop: Shop, *, jobs: int = 1, memory: int | None = None, told: Callable[[Work, Result], Any] = lambda *_: None
    ) -> None:  # fmt: skip
        self.shop, self.jobs, self.memory, self.told = shop, jobs, memory, told
        self.waiting: list[Work] = []
        self.running: dict[str, tuple[Work, Process, int | None]] = {}
        self.batches: list[_Batch] = []
        self._sizes: dict[str, int | None] = {}

    def add(self, sources: Sequence[Source]) -> None:
        """Take in sources, each as far as it comes without running anything."""
        for source in sources:
            self._advance(source, next(source, None))

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Until nothing is left. Once `stop` says so, nothing begins and what runs is asked to end."""
        asked = False
        while self.running or (self.waiting and not asked):
            if stop() and not asked:
                asked = True
                for _, process, _ in self.running.values():
                    process.terminate()
            while not asked and (work := self._next()) is not None:
                self.waiting.remove(work)
                self.running[work.key] = work, self.shop.start(work), self._size(work)
            self._collect()

    def _next(self) -> Work | None:
        """The first work that has room. One that has none waits for it, and others may go before; what no room is enough for has been
        refused."""
        if len(self.running) >= self.jobs:
            return None
        sizes = [size for _, _, size in self.running.values()]
        if None in sizes:
            return None
        left = None if self.memory is None else self.memory - sum(size or 0 for size in sizes)
        return next((work for work in self.waiting if not sizes or self._fits(work, left)), None)

    def _fits(self, work: Work, left: int | None) -> bool:
        size = self._size(work)
        return size is not None and (left is None or size <= left)

    def _size(self, work: Work) -> int | None:
        """Bytes, where more than one may run; nothing is asked of who predicts where it would change nothing."""
        if self.jobs == 1:
            return 0
        if work.key not in self._sizes:
            self._sizes[work.key] = self.shop.bytes_of(work)
        return self._sizes[work.key]

    def _collect(self) -> None:
        ended = {key: code for key, (_, process, _) in self.running.items() if (code := process.poll()) is not None}
        for key, code in ended.items():
            work, _, _ = self.running.pop(key)
            self._settle(work, self.shop.ended(work, code))
        if not ended:
            time.sleep(POLL)

    # -- sources -----------------------------------------------------------------------------------------------

    def _advance(self, source: Source, works: list[Work] | None) -> None:
        """Go on with a source until it has to wait."""
        while works is not None:
            batch = _Batch(source, works)
            for work in works:
                if (found := self.shop.known(work)) is not None:
                    batch.results[work.key] = found
                    self.told(work, found)
            if len(batch.results) < len({work.key for work in works}):
                self._wait_for(batch)
                return
            works = _sent(batch)

    def _wait_for(self, batch: _Batch) -> None:
        self.batches.append(batch)
        queued = {*self.running, *(work.key for work in self.waiting)}
        for work in batch.works:
            if work.key not in batch.results and work.key not in queued:
                queued.add(work.key)
                self.waiting.append(work)
        self.waiting.sort(key=lambda work: work.order)

    def _settle(self, work: Work, result: Result) -> None:
        self.told(work, result)
        for batch in list(self.batches):
            keys = {each.key for each in batch.works}
            if work.key not in keys:
                continue
            batch.results[work.key] = result
            if len(batch.results) == len(keys):
                self.batches.remove(batch)
                self._advance(batch.source, _sent(batch))


def _sent(batch: _Batch) -> list[Work] | None:
    """The source's next batch, given the results of this one; None at its end."""
    try:
        return batch.source.send([batch.results[work.key] for work in batch.works])
    except StopIteration:
        return None
