"""What a comparison adds to its runs: the wall time of recipes/compare_quick.yaml less that of its processes, from start to exit.

One run at a time. On a busy machine the wall's difference is mostly waiting for a core; the CPU seconds of the comparison's own process are
told beside it, what it takes to start among them. What runs take to start counts as theirs: each its own imports where they are processes from the beginning, those of the
process that they are forked from once, in the first run's time. The loops' seconds leave all of that out, and the share of these is told beside.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import machine, write
from rich.console import Console

from dsfreeze.cli.known import anatomy_of
from dsfreeze.compare import processes
from dsfreeze.compare.forking import ForkServer
from dsfreeze.compare.queue import Process
from dsfreeze.compare.reading import read_grid
from dsfreeze.compare.running import run_grid

RECIPE = Path(__file__).parents[1] / "recipes" / "compare_quick.yaml"


class Watched:
    """A process whose end is known when it happens, not when the queue looks."""

    def __init__(self, process: Process, began: float, seconds: list[float]) -> None:
        self.process, self.lock = process, threading.Lock()
        self.terminate = process.terminate
        threading.Thread(target=self._watch, args=(began, seconds)).start()

    def poll(self) -> int | None:
        with self.lock:
            return self.process.poll()

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.002)
        return code

    def _watch(self, began: float, seconds: list[float]) -> None:
        self.wait()
        seconds.append(time.perf_counter() - began)


def watched(launch: Callable[..., Process], seconds: list[float]) -> Callable[..., Process]:
    def timed(*arguments: Any) -> Process:
        began = time.perf_counter()
        return Watched(launch(*arguments), began, seconds)

    return timed


def main() -> None:
    seconds: list[float] = []
    processes.launch = watched(processes.launch, seconds)
    ForkServer.launch = watched(ForkServer.launch, seconds)  # type: ignore[method-assign, assignment]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        state = run_grid(read_grid(RECIPE, [f"output_dir={folder}", *sys.argv[1:]]), anatomy_of, Console(stderr=True))
        wall, cpu = time.perf_counter() - began, time.process_time()
    loops = [cell["seconds"] for cell in state["cells"].values() if cell["seconds"] is not None]
    own = wall - sum(seconds)
    write(
        __file__,
        {
            "machine": machine(), "overrides": sys.argv[1:], "runs": len(seconds), "wall_seconds": wall, "processes_seconds": sum(seconds), "loops_seconds": sum(loops),
            "comparison_seconds": own, "comparison_cpu_seconds": cpu, "share_of_processes": own / sum(seconds), "share_of_loops": own / sum(loops),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
