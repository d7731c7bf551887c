"""A long run: 20,000 steps of a tiny model with plans that rotate, a cache on disk and a checkpoint every 500 steps; then gone on with from ten
of its checkpoints. What grows, and whether a resumed run is the same to the bit.

    python benchmarks/soak.py [steps]

`memory`: resident MiB, file handles, threads and bytes on disk, at every checkpoint of the run.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from common import machine, write
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_runs import tiny_recipe

from dsfreeze.loop import Run, train
from dsfreeze.record import read_record
from dsfreeze.saving import CheckpointWriter

STEPS, EVERY, KEEP, POINTS = 20_000, 500, 3, 10
#: Steps that a resumed run makes.
FURTHER = 60


def recipe(folder: Path, steps: int, **options: Any) -> Any:
    freeze = {
        "strategy": "badam", "active_layers": 1, "switch_every": 40, "fraction": None, "state": "offload", "prefix_cache": "disk",
        "prefix_cache_dir": str(folder / "prefix"),
    }  # fmt: skip
    train = {
        "max_steps": steps, "save_strategy": "steps", "save_steps": EVERY, "save_total_limit": KEEP, "export": False, "per_device_train_batch_size": 2,
        "logging_steps": EVERY, **options,
    }  # fmt: skip
    return tiny_recipe(folder, zero="local", freeze=freeze, train=train)


def held(folder: Path) -> dict[str, float]:
    """What this process and its folder hold now."""
    process = psutil.Process()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl")
    return {
        "rss": round(process.memory_info().rss / 2**20, 1), "handles": process.num_fds(), "threads": process.num_threads(), "disk": size,
    }  # fmt: skip


def soak(folder: Path, steps: int) -> dict[str, Any]:
    """The run, what it held at each checkpoint, and copies of ten checkpoints."""
    seen: list[dict[str, float]] = []
    numbers = sorted(
        random.Random(0).sample(range(EVERY, steps - FURTHER, EVERY), min(POINTS, (steps - FURTHER) // EVERY - 1))
    )
    real = CheckpointWriter.save

    def save(self: CheckpointWriter, engine: Any, step: int, state: Any) -> Path:
        self.wait()  # the one before is whole
        if step - EVERY in numbers:
            shutil.copytree(
                self.job.output_dir / f"checkpoint-{step - EVERY}", folder / "kept" / f"checkpoint-{step - EVERY}"
            )
        seen.append({"step": step, **held(self.job.output_dir)})
        return real(self, engine, step, state)

    CheckpointWriter.save = save  # type: ignore[method-assign]
    try:
        train(recipe(folder, steps), Console(quiet=True))
    finally:
        CheckpointWriter.save = real  # type: ignore[method-assign]
    return {"held": seen, "resumed": [resumed(folder, number, steps) for number in numbers]}


def resumed(folder: Path, number: int, steps: int) -> dict[str, Any]:
    """A run that goes on from a checkpoint, for some steps, beside the one that never stopped."""
    expected = [line["loss"] for line in read_record(folder / "run").steps][number : number + FURTHER]
    made: list[float] = []
    real = Run._one_step

    def one_step(self: Run, *rest: Any) -> None:
        real(self, *rest)
        if self.step >= number + FURTHER:
            raise KeyboardInterrupt

    Run._one_step = one_step  # type: ignore[method-assign]
    out = folder / f"from-{number}"
    options = {"resume_from_checkpoint": str(folder / "kept" / f"checkpoint-{number}"), "output_dir": str(out)}
    try:
        train(recipe(folder, steps, **options), Console(quiet=True))
    except KeyboardInterrupt:
        pass
    finally:
        Run._one_step = real  # type: ignore[method-assign]
    made = [line["loss"] for line in read_record(out).steps][-FURTHER:]
    shutil.rmtree(out)
    return {"from": number, "same": made == expected, "steps": len(made)}


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), steps)
    write(__file__, {"machine": machine(), "steps": steps, **found})


if __name__ == "__main__":
    main()
