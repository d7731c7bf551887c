"""One piece of work at a time in a thread beside the training: what it failed with is told where somebody asks. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Thread


class Background:
    """Use: `start`, as often as there is work; ask `failed`; `wait`, always, before what was written is counted on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._thread: Thread | None = None
        self._failure: BaseException | None = None

    def start(self, work: Callable[[], object]) -> None:
        """Begin, once what was begun before has ended; raises what that failed with."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 (raised again in `wait`)
                self._failure = error

        # a daemon: who presses Ctrl-C three times does not wait for it
        self._thread = Thread(target=run, name=self.name, daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether what was begun has come to grief; never waits."""
        return self._failure is not None

    def wait(self) -> None:
        """Until what was begun has ended; raises what it failed with, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Until what was begun has ended, however that is; on the way out of an error, or of a Ctrl-C, which waits for nothing."""
        if self._thread is not None and not isinstance(sys.exception(), KeyboardInterrupt):
            self._thread.join()
