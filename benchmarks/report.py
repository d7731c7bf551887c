"""A report of 500 runs: seconds of the whole process. The records are made up (a falling loss, accuracies by a seeded draw), of the size that real ones have."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, spread, write

from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import STEPS, Record

RUNS, NUM_STEPS, ROUNDS = 500, 100, 5
TASKS = ("rte", "mrpc", "cola", "sst2")
SETUPS = [
    ["freeze.strategy=full"], ["freeze.strategy=bottom", "freeze.fraction=0.25"], ["freeze.strategy=bottom", "freeze.fraction=0.5"],
    ["freeze.strategy=bottom", "freeze.fraction=0.75"], ["freeze.strategy=top", "freeze.fraction=0.5"], ["freeze.strategy=lisa"],
]  # fmt: skip
ENVIRONMENT = {
    "versions": {"torch": "2.13.0"},
    "python": "3.11",
    "device": "cpu",
    "cores": 2,
    "threads": 2,
    "world_size": 1,
}


def write_run(folder: Path, number: int, draw: random.Random) -> None:
    task, setup = TASKS[number % len(TASKS)], SETUPS[number // len(TASKS) % len(SETUPS)]
    words = ["model=minilm-l6", f"data.train={task}.jsonl", f"data.eval={task}-eval.jsonl", *setup]
    more = [f"train.seed={number // (len(TASKS) * len(SETUPS))}", f"train.output_dir={folder}", f"train.max_steps={NUM_STEPS}"]  # fmt: skip
    recipe = load_recipe(None, words + more)
    record = Record.create(
        folder, recipe, FreezePlan(recipe.freeze.strategy, (Phase(0, None, ("a", "b")),)), ENVIRONMENT
    )
    lines = [json.dumps(_step(step, draw)) for step in range(1, NUM_STEPS + 1)]
    (folder / STEPS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    record.summary(_summary(recipe.freeze.strategy, folder, draw))


def _step(step: int, draw: random.Random) -> dict[str, Any]:
    return {
        "step": step, "epoch": 0, "loss": 0.3 + 0.7 * math.exp(-3 * step / NUM_STEPS) + draw.gauss(0, 0.03), "learning_rate": 5e-5,
        "grad_norm": 1.0 + draw.random(), "seconds": 0.05 + draw.random() / 100, "tokens": 810, "tokens_per_second": 15000.0,
        "memory_allocated": 1203941376, "memory_peak": 1343025152, "phase": 0,
    }  # fmt: skip


def _summary(strategy: str, folder: Path, draw: random.Random) -> dict[str, Any]:
    accuracy = 0.6 + 0.2 * draw.random()
    return {
        "steps": NUM_STEPS, "loss": 0.34, "metrics": {"before": {"loss": 0.7, "accuracy": 0.5}, "after": {"loss": 0.5, "accuracy": accuracy}},
        "strategy": strategy, "plan_digest": "x", "trainable": 11_000_000, "held": 22_000_000, "total": 22_000_000, "flops_vs_full": 0.7,
        "full_flops_per_token": 1e8, "seconds_per_step": 0.05, "memory": {"peak": 1_300_000_000, "optimizer_state": 1, "masters": 1, "parked": 0},
        "never_moved": [], "switches": 0, "seconds_switching": 0.0, "prefix_cache": None, "selection": None, "record": str(folder), "model": None,
    }  # fmt: skip


def main() -> None:
    seconds, draw = [], random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(RUNS):
            write_run(Path(folder, "runs", str(number)), number, draw)
        page = Path(folder, "report.html")
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "dsfreeze", "report", f"{folder}/runs", "-o", str(page)], check=True)
            seconds.append(time.perf_counter() - began)
        size = page.stat().st_size
    told = {"runs": RUNS, "steps_of_each": NUM_STEPS, "seconds": spread(seconds), "page_bytes": size}
    write(__file__, {"machine": machine(), **told})


if __name__ == "__main__":
    main()
