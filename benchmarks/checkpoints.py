"""Checkpoints: how long one stops the training, how many bytes it has by what is frozen, and how soon a resumed run makes a step.

    python benchmarks/checkpoints.py        # SmolLM2-135M in bf16 on one device, optimizer state with it

`pause`: seconds in which the loop waits for a checkpoint (a copy to the host), beside those that writing it takes and those of a plain copy
of as many bytes, of one run with checkpoints far enough apart. `first_step`: seconds from the start of a process until its first step is recorded, cold and resumed, in turn.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import machine, spread, write

from dsfreeze import checkpoint
from dsfreeze.loop import train
from dsfreeze.recipe import Recipe
from dsfreeze.saving import CheckpointWriter

ROUNDS = 5
PLANS = {"full": {"strategy": "full"}} | {
    f"bottom{n}": {"strategy": "bottom", "fraction": n / 100} for n in (25, 50, 75)
}


def recipe(folder: Path, freeze: dict[str, Any], **options: Any) -> Recipe:
    return Recipe.model_validate({
        "model": "smollm2-135m", "task": "causal_lm", "zero": "local", "freeze": freeze,
        "data": {"train": "../shared/data/tinystories/train.jsonl.gz", "text": "text", "max_length": 64, "max_train_examples": 256},
        "train": {"per_device_train_batch_size": 2, "bf16": True, "learning_rate": 1e-5, "export": False, "output_dir": str(folder / "run"), **options},
    })  # fmt: skip


@contextmanager
def timed(owner: Any, name: str, seconds: list[float]) -> Iterator[None]:
    """How long each call of a function takes."""
    real: Callable[..., Any] = getattr(owner, name)

    def measured(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return real(*args, **options)
        finally:
            seconds.append(time.perf_counter() - began)

    setattr(owner, name, measured)
    try:
        yield
    finally:
        setattr(owner, name, real)


def pauses(folder: Path, freeze: dict[str, Any]) -> dict[str, Any]:
    stopped, written = list[float](), list[float]()
    options = {"max_steps": 6 * ROUNDS, "save_strategy": "steps", "save_steps": 6, "save_total_limit": 1}
    with timed(CheckpointWriter, "save", stopped), timed(checkpoint, "save", written):
        summary = train(recipe(folder, freeze, **options))
    newest = next((folder / "run").glob("checkpoint-*"))
    size = sum(path.stat().st_size for path in newest.iterdir())
    return {
        "checkpoint_bytes": size, "seconds_per_step": summary["seconds_per_step"], "stopped": spread(stopped[:ROUNDS]),
        "written": spread(written[:ROUNDS]), "copied": copied(size),
    }  # fmt: skip


def copied(size: int) -> dict[str, Any]:
    """Seconds that torch takes to copy one tensor of so many bytes to memory of its own."""
    source, seconds = torch.ones(size, dtype=torch.uint8), list[float]()
    for _ in range(ROUNDS):
        began = time.perf_counter()
        source.clone()
        seconds.append(time.perf_counter() - began)
    return spread(seconds)


def first_step(file: Path, run: Path, resumed: bool) -> float:
    """Of a process of its own."""
    steps = run / "steps.jsonl"
    before = len(steps.read_text().splitlines()) if steps.exists() else 0
    words = [
        f"train.max_steps={before + 2}",
        f"train.output_dir={run}",
        f"train.resume_from_checkpoint={str(resumed).lower()}",
    ]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dsfreeze", "train", str(file), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None:
        if steps.exists() and len(steps.read_text().splitlines()) > before:
            seconds = time.perf_counter() - began
            process.wait()
            return seconds
        time.sleep(0.005)
    raise RuntimeError(f"exit code {process.returncode}")


def starts(folder: Path) -> dict[str, Any]:
    """In turn, so that both meet the same machine."""
    file = folder / "recipe.json.yaml"
    file.write_text(
        json.dumps(
            recipe(folder, {"strategy": "full"}, save_strategy="steps", save_steps=1, save_total_limit=1).model_dump(
                mode="json"
            )
        )
    )
    seconds: dict[str, list[float]] = {"cold": [], "resumed": []}
    first_step(file, folder / "warm", resumed=False)
    for number in range(ROUNDS):
        run = folder / f"start-{number}"
        seconds["cold"].append(first_step(file, run, resumed=False))
        seconds["resumed"].append(first_step(file, run, resumed=True))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    return {name: spread(values) for name, values in seconds.items()} | {"resumed / cold": spread(ratios)}


def main() -> None:
    plans: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, freeze in PLANS.items():
            plans[name] = pauses(Path(place, name), freeze)
            plans[name]["bytes / full"] = round(plans[name]["checkpoint_bytes"] / plans["full"]["checkpoint_bytes"], 4)
        write(__file__, {"machine": machine(), "pause": plans, "first_step": starts(Path(place))})


if __name__ == "__main__":
    main()
