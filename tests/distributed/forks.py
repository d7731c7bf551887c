"""Runs a function on several ranks, in seconds: children forked from a server that has torch and deepspeed imported.

    results = run_ranks(body, 2, "zero2")        # body(2, "zero2") on two gloo ranks; the values they return

An exception, a death or a hang of any rank is reported rank by rank. Bodies are module-level functions: they are
pickled by name. The server, and not this process, is forked, because a process that ever ran a backward pass cannot be.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing as mp
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

PRELOADED = [
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed's first step imports it: seconds
    "deepspeed.runtime.zero.stage3",
    "dsfreeze.engine.zero",
    "dsfreeze.engine.local",
    "dsfreeze.loop",
    "transformers.trainer",
    "accelerate",
    "sklearn.metrics",  # metrics import it when they are used: seconds again
]


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: `kind` is ok, error, died or hung; `error` the exception's type name."""

    kind: str
    value: Any = None
    error: str = ""
    text: str = ""


class RanksFailed(AssertionError):
    """Not every rank returned; `outcomes` in rank order."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        super().__init__("\n".join(f"rank {rank}: {o.kind} {o.text}" for rank, o in enumerate(outcomes)))


def run_ranks(body: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 60.0) -> list[Any]:
    """What `body(*args)` returns on every rank; RanksFailed when one of them does not return in `timeout` seconds."""
    outcomes = outcomes_of(body, *args, world_size=world_size, timeout=timeout)
    if any(o.kind != "ok" for o in outcomes):
        raise RanksFailed(outcomes)
    return [o.value for o in outcomes]


def outcomes_of(body: Callable[..., Any], *args: Any, world_size: int = 2, timeout: float = 60.0) -> list[Outcome]:
    """Run `body(*args)` on every rank; how each ended. No rank outlives this call."""
    context = _context()
    port = _free_port()
    # bytes, because multiprocessing's own pickling would pass every tensor as an open file
    task = pickle.dumps((body, args))
    pipes, children = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        child = context.Process(target=_child, args=(theirs, environment, timeout, task), daemon=True)
        child.start()
        theirs.close()
        pipes.append(ours)
        children.append(child)
    try:
        return _collect(pipes, time.monotonic() + timeout)
    finally:
        for child in children:
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()


def _context() -> Any:
    for name, value in {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}.items():
        os.environ.setdefault(name, value)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _collect(pipes: list[Connection], deadline: float) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    while len(outcomes) < len(pipes):
        waiting = [p for rank, p in enumerate(pipes) if rank not in outcomes]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            outcomes[pipes.index(pipe)] = _read(pipe)
    return [outcomes.get(rank, Outcome("hung", text="(no answer in time)")) for rank in range(len(pipes))]


def _read(pipe: Connection) -> Outcome:
    try:
        return pickle.loads(pipe.recv_bytes())  # noqa: S301 - our own child wrote it
    except EOFError:
        return Outcome("died", text="(the process ended without a word)")


def _child(pipe: Connection, environment: dict[str, Any], timeout: float, task: bytes) -> None:
    import torch

    gc.freeze()  # DeepSpeed collects garbage when it builds stage 3: not what the server imported
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(timeout - 1, exit=True)
    try:
        body, args = pickle.loads(task)  # noqa: S301 - our own parent wrote it
        outcome = Outcome("ok", body(*args))
    except Exception as error:  # noqa: BLE001 - reported to the test
        outcome = Outcome("error", None, type(error).__name__, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))
    faulthandler.cancel_dump_traceback_later()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
