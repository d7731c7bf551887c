"""Who is missing when ranks wait for each other in vain.

Every rank leaves a note of what it begins (a step, an evaluation) in the process group's store. Where a collective call times out, or the
connection to a rank breaks, the ranks that are left say so there too: who does not is the one they wait for. It is named, with what it was
at; one that is alive on this machine is asked (SIGUSR2) to put its stack on its standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout, _world

from dsfreeze.errors import UserError

T = TypeVar("T")
_KEY, _WAITED = "dsfreeze/whereabouts/{}", "dsfreeze/waited/{}"
#: What gloo, NCCL and the store say when somebody does not answer.
_LOST = re.compile(
    r"timed? ?out|connection (was )?(closed|reset|refused)|broken pipe|socket (is )?closed|remote process exited",
    re.IGNORECASE,
)
#: How long the others have to say that they waited too, and a store to answer.
_PATIENCE, _ANSWER = 5.0, timedelta(seconds=2)
#: Seconds after which a store does not answer at all: torch's own time-out waits for its confirmation, for ever on a dead cable.
_SILENCE = 15.0


@dataclass(frozen=True)
class Note:
    """Where a rank was last."""

    rank: int
    what: str
    pid: int
    host: str

    @property
    def alive(self) -> bool | None:
        """None where this machine cannot tell."""
        if self.host != socket.gethostname():
            return None
        with suppress(PermissionError):
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
        return not _is_zombie(self.pid)


#: What this process began last.
at = "the beginning"


def begin(what: str) -> None:
    """This rank begins something, such as "step 12"."""
    global at
    at = what
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    note = {"what": what, "pid": os.getpid(), "host": socket.gethostname()}
    with suppress(RuntimeError):  # the store is rank 0's; that it has gone shows in the next collective call
        _get_default_store().set(_KEY.format(dist.get_rank()), json.dumps(note))


def limit(seconds: float) -> None:
    """How long collective calls wait in every group there is; DeepSpeed makes its own with torch's default, half an hour."""
    for group in list(_world.pg_map):
        if dist.get_rank(group) >= 0:
            _set_pg_timeout(timedelta(seconds=seconds), group)


def listen() -> None:
    """Answer SIGUSR2 with this process's stack, on standard error."""
    standard_error: Any = sys.__stderr__  # which may be None, and faulthandler takes that
    with suppress(
        AttributeError, ValueError, OSError, RuntimeError
    ):  # no such signal, not the main thread, no real standard error
        faulthandler.register(signal.SIGUSR2, file=standard_error, all_threads=True)


def explained(error: BaseException) -> UserError | None:
    """What a broken collective call means; None for other errors."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    if dist.get_world_size() == 1:  # nobody is there to be lost
        return None
    nothing: tuple[dict[int, Note], list[int]] = ({}, [])
    notes, silent = _in_time(_asked, nothing)
    missing = [notes[rank] for rank in silent]
    gone = [note for note in missing if note.alive is False]
    stuck = [note for note in missing if note not in gone]
    for note in stuck:
        if note.alive:
            os.kill(note.pid, signal.SIGUSR2)
    said = " ".join(str(error).split())
    found = [f"rank {n.rank} (process {n.pid} on {n.host}) has ended; it was at {n.what}" for n in gone]
    found += [
        f"rank {n.rank} (process {n.pid} on {n.host}) does not answer; it is at {n.what}{_stack(n)}" for n in stuck
    ]
    whom = "; ".join(found) or (
        "all others wait too, so that a connection has broken"
        if notes
        else "rank 0, which keeps the notes, has ended or cannot be reached"
    )
    mine = notes.get(dist.get_rank())
    here = f" This is rank {mine.rank}, at {mine.what}." if mine else ""
    return UserError(
        f"The ranks have lost each other: {whom}.{here} Checkpoints that are there are whole: start again with "
        f"train.resume_from_checkpoint=true. A rank that is slow and not stuck needs a longer train.ddp_timeout. ({said:.200})"
    )


def _stack(note: Note) -> str:
    return ", and its stack is on its standard error" if note.alive else ""


def _in_time(ask: Callable[[], T], otherwise: T) -> T:
    found = [otherwise]
    asking = threading.Thread(target=lambda: found.append(ask()), daemon=True)
    asking.start()
    asking.join(_SILENCE)
    return found[-1]


def _asked() -> tuple[dict[int, Note], list[int]]:
    notes = _notes()
    return notes, _silent(set(notes) - {dist.get_rank()})


def _notes() -> dict[int, Note]:
    """By rank; empty where the store has gone."""
    found = {}
    for rank in range(dist.get_world_size()):
        with suppress(RuntimeError, ValueError, TypeError):
            store, key = _get_default_store(), _KEY.format(rank)
            store.wait([key], _ANSWER)
            values: dict[str, Any] = json.loads(store.get(key))
            found[rank] = Note(rank, **values)
    return found


def _silent(others: set[int]) -> list[int]:
    """Ranks that do not say, within a few seconds, that they wait in vain too; this one says so."""
    deadline, silent = time.monotonic() + _PATIENCE, set(others)
    with suppress(RuntimeError):
        store = _get_default_store()
        store.set(_WAITED.format(dist.get_rank()), "1")
        while silent and time.monotonic() < deadline:
            silent -= {rank for rank in silent if store.check([_WAITED.format(rank)])}
            time.sleep(0.1)
    return sorted(silent)


def _is_zombie(pid: int) -> bool:
    import psutil

    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    return True
