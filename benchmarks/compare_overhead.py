"""What a comparison adds to its runs: the wall time of recipes/compare_quick.yaml less that of its processes, from start to exit.

One run at a time. On a busy machine the wall's difference is mostly waiting for a core; the CPU seconds of the comparison's own process are
told beside it, what it takes to start among them. A thread waits for each process, so that its end is known when it happens, not when the queue looks. What the runs
themselves take to start (importing torch and DeepSpeed) counts as theirs, and is told beside: the time before a record's first line.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import machine, write
from rich.console import Console

from dsfreeze.cli.known import anatomy_of
from dsfreeze.compare import processes
from dsfreeze.compare.reading import read_grid
from dsfreeze.compare.running import run_grid

RECIPE = Path(__file__).parents[1] / "recipes" / "compare_quick.yaml"


def main() -> None:
    seconds: list[float] = []
    launch = processes.launch

    def timed(*arguments: Any) -> Any:
        began, process = time.perf_counter(), launch(*arguments)

        def wait() -> None:
            process.wait()
            seconds.append(time.perf_counter() - began)

        threading.Thread(target=wait).start()
        return process

    processes.launch = timed
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
