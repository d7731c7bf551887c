"""Reading ahead: the next steps' batches and cached states are made ready in a thread while a step is computed."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dsfreeze.data import Loader, Step
from dsfreeze.prefix.cache import PrefixCache, Staged

#: Steps that lie ready at the most.
DEPTH = 2


@dataclass(frozen=True)
class Ready:
    """A step, what was read for each of its micro-batches, and where the loader stands after it."""

    step: Step
    staged: list[Staged | None]
    position: Mapping[str, Any]


class ReadAhead(Iterator[Ready]):
    """The loader's steps, each with its states. `waited` is how long `next` has waited for them in all, `last_wait` the last time,
    in seconds.

    The loader runs ahead of the training: `state_dict` is where the training stands. Close it, or a thread is left waiting.
    """

    def __init__(self, loader: Loader, cache: PrefixCache) -> None:
        self.loader, self.cache = loader, cache
        self.waited = self.last_wait = 0.0
        self._position: Mapping[str, Any] = loader.state_dict()
        self._queue: queue.Queue[Ready | BaseException] = queue.Queue(DEPTH)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __next__(self) -> Ready:
        self.last_wait = 0.0
        if self._thread is None and not self.cache.wanted:  # once it reads, only the thread asks the loader
            found: Ready | BaseException = self._make()
        else:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
                self._thread.start()
            began = time.perf_counter()
            found = self._queue.get()
            self.last_wait = time.perf_counter() - began
            self.waited += self.last_wait
        if isinstance(found, BaseException):
            raise found
        self._position = found.position
        return found

    def _make(self) -> Ready:
        step = next(self.loader)
        rows = self.cache.train
        assert rows is not None, "the loader has checked that there are examples"
        staged = [
            self.cache.read(rows, chosen, batch["input_ids"].shape[1])
            for (batch, _), chosen in zip(step.micro_batches, step.chosen, strict=True)
        ]
        return Ready(step, staged, self.loader.state_dict())

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                found: Ready | BaseException = self._make()
            except BaseException as error:  # noqa: BLE001 (raised where the step is asked for)
                found = error
            self._put(found)
            if isinstance(found, BaseException):
                return

    def _put(self, found: Ready | BaseException) -> None:
        while not self._over.is_set():
            with suppress(queue.Full):
                self._queue.put(found, timeout=0.2)
                return

    def state_dict(self) -> Mapping[str, Any]:
        """Where the next step starts, whatever has been read beyond it."""
        return self._position

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; before the first step is asked for."""
        assert self._thread is None, "it reads already"
        self.loader.load_state_dict(state)
        self._position = self.loader.state_dict()

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
