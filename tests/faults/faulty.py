"""dsfreeze with one thing going wrong: python -m faulty FAULT RANK STEP train recipe.yaml ... (as the launchers' --module).

A fault strikes once, on that rank, at or after that step: the file that DSFREEZE_STRUCK names says that it has.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def strike(act: Callable[[], Any]) -> None:
    """Do it, unless it has been done."""
    mark = Path(os.environ["DSFREEZE_STRUCK"])
    if not mark.exists():
        mark.touch()
        act()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, act: Callable[[], Any], reached: Callable[..., bool] = lambda *_: True) -> None:
    """Let `act` happen before a call of that function for which `reached` holds."""
    real = getattr(owner, name)

    def patched(*args: Any, **options: Any) -> Any:
        if reached(*args):
            strike(act)
        return real(*args, **options)

    setattr(owner, name, patched)


def after(owner: Any, name: str, act: Callable[[], Any], reached: Callable[..., bool] = lambda *_: True) -> None:
    real = getattr(owner, name)

    def patched(*args: Any, **options: Any) -> Any:
        found = real(*args, **options)
        if reached(*args):
            strike(act)
        return found

    setattr(owner, name, patched)


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def _jump(seconds: float) -> None:
    """The wall clock is set, as by a daemon that has found the time; what counts monotonically does not notice."""
    real = time.time
    time.time = lambda: real() + seconds


def install(fault: str, step: int) -> None:
    from dsfreeze import checkpoint, loop
    from dsfreeze.engine.zero import ZeroEngine
    from dsfreeze.prefix.store import DiskStore
    from dsfreeze.record import Record

    def in_step(engine: Any, *_: Any) -> bool:
        return RUNS[-1].step + 1 >= step

    made = loop.Run.__init__

    def remember(run: Any, *args: Any) -> None:
        RUNS.append(run)
        made(run, *args)

    loop.Run.__init__ = remember
    match fault:
        case "die in step":
            before(ZeroEngine, "forward_backward", die, in_step)
        case "hang in step":
            before(ZeroEngine, "forward_backward", lambda: time.sleep(600), in_step)
        case "die in save":  # the weights are written, the manifest is not
            after(checkpoint, "save_file", die, lambda tensors, path: path.name == checkpoint.WEIGHTS and in_step(None))
        case "die before rename":
            before(checkpoint, "swap", die, in_step)
        case "die in refreeze":
            before(ZeroEngine, "_refreeze", die, in_step)
        case "die in cache fill":
            before(DiskStore, "add", die)
        case "clock back":
            before(ZeroEngine, "forward_backward", lambda: _jump(-86400.0), in_step)
        case "clock forward":
            before(ZeroEngine, "forward_backward", lambda: _jump(86400.0), in_step)
        case "full in save":
            before(checkpoint, "save_file", _full, lambda *_: in_step(None))
        case "full in record":
            before(Record, "step", _full, lambda record, line: line["step"] >= step)
        case _:
            sys.exit(f"no fault '{fault}'")


RUNS: list[Any] = []

if __name__ == "__main__":
    fault, rank, step, *words = (word for word in sys.argv[1:] if not word.startswith("--local_rank"))
    if os.environ.get("RANK", "0") == rank:
        install(fault, int(step))
    from dsfreeze import cli

    sys.exit(cli.run(words))
