"""Starts a training in a process of its own and passes signals on, so that it can write its checkpoint before it ends.

    python -m dsfreeze.supervise MODULE [arguments]     # as launch.sh starts deepspeed.launcher.runner

The child has a session of its own: a Ctrl-C reaches it through us alone, and nobody else ends it half-way. DeepSpeed's launcher
would: its runner dies of a signal and leaves the workers behind, and what it started on this machine kills them after 30 seconds.
So the workers are told, and the launchers end with their exit code. No torch here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from subprocess import DEVNULL, Popen
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: This many signals end the child at once, without a checkpoint.
IMPATIENT = 3
#: Seconds in which the workers of a launcher that was killed must end; DeepSpeed allows them 30.
GRACE = 40.0


def supervise(command: Sequence[str], **options: Any) -> tuple[int, int]:
    """Run `command` to its end, signals or not: its exit code (128 + n when signal n killed it), and the first signal that
    came here (0: none). `options` are Popen's."""
    arrived: list[int] = []
    child: Popen[bytes] | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        arrived.append(number)
        if child is not None:
            _pass_on(child.pid, arrived)

    with _handled_by(on_signal):
        child = Popen(command, stdin=DEVNULL, start_new_session=True, **options)
        if arrived:  # while it was starting
            _pass_on(child.pid, arrived)
        code = child.wait()
        if arrived or code < 0:
            _wait_for_the_rest(child.pid)
    return (code if code >= 0 else 128 - code), (arrived[0] if arrived else 0)


@contextmanager
def _handled_by(handler: Any) -> Iterator[None]:
    """The handler for every signal that is not ignored already, as SIGHUP is under nohup."""
    before = {n: signal.signal(n, handler) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _pass_on(child: int, arrived: Sequence[int]) -> None:
    number = signal.SIGTERM if arrived[-1] == signal.SIGHUP else arrived[-1]
    with suppress(ProcessLookupError):
        if len(arrived) >= IMPATIENT:
            os.killpg(child, signal.SIGKILL)
            return
        workers = _workers(child)
        for worker in workers:
            os.kill(worker, number)
        if not workers:
            os.killpg(child, number)


def _workers(child: int) -> list[int]:
    """The ranks that DeepSpeed's launcher started on this machine; none where the child is something else."""
    import psutil

    with suppress(psutil.Error):
        for process in psutil.Process(child).children():
            if "deepspeed.launcher.launch" in process.cmdline()[:5]:
                return [worker.pid for worker in process.children()]
    return []


def _wait_for_the_rest(group: int) -> None:
    """Where a signal hit the launcher itself, the workers may still be writing; nobody is left behind."""
    deadline = time.monotonic() + GRACE
    with suppress(ProcessLookupError, PermissionError):  # macOS: no permission to signal what is dead
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.1)
        os.killpg(group, signal.SIGKILL)


def main() -> None:
    code, number = supervise([sys.executable, "-m", *sys.argv[1:]])
    told = code in (0, 2)  # it had finished, or says itself what was wrong
    sys.exit(128 + number if number and not told else code)


if __name__ == "__main__":
    main()
