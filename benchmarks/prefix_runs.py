"""Whole runs on RTE with and without the prefix cache (the data must lie beside the repository, as recipes/rte.yaml expects them).

    python benchmarks/prefix_runs.py accuracy    the encoder of recipes/rte.yaml, all data, three seeds: accuracies with and without
    python benchmarks/prefix_runs.py wall        SmolLM2-135M, bottom 75 %, 5 epochs of a sample: wall time against full tuning

Both write into prefix_runs.json. Wall time is that of the steps, from the first to the last, with the states' filling and waiting for
them; loading, evaluation and export are left out. The runs of a round follow each other, so that their ratio is of one time.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, spread, write
from rich.console import Console

from dsfreeze.loop import train
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record

ROOT = Path(__file__).parents[1]
SEEDS = (42, 43, 44)
RECIPE = ROOT / "recipes" / "rte.yaml"
DATA = [
    f"data.train={ROOT}/../shared/data/rte/train.jsonl.gz",
    f"data.eval={ROOT}/../shared/data/rte/validation.jsonl.gz",
]
SHORT = [
    *DATA, "train.export=false", "train.save_strategy=no", "zero=local", "model.name=smollm2-135m", "train.num_train_epochs=5",
    "data.max_train_examples=40", "train.eval_strategy=no",
]  # fmt: skip
WALL = {
    "full": ["freeze.strategy=full", "freeze.fraction=null"],
    "bottom75": ["freeze.fraction=0.75"],
    "bottom75_memory": ["freeze.fraction=0.75", "freeze.prefix_cache=memory"],
}
ROUNDS = 3


def run(*words: str) -> tuple[dict[str, Any], float]:
    """A run's summary, and the seconds of its steps with what lay between them."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe(RECIPE, [*words, f"train.output_dir={folder}/run", f"freeze.prefix_cache_dir={folder}"])
        summary = train(recipe, Console(quiet=True))
        steps = read_record(Path(folder) / "run").steps
    cache = summary["prefix_cache"] or {}
    return summary, sum(line["seconds"] for line in steps) + cache.get("seconds_waited", 0.0)


def accuracy() -> dict[str, Any]:
    """Of every seed with and without the cache, on the official validation split."""
    found: dict[str, list[float]] = {"off": [], "memory": []}
    for seed in SEEDS:
        for tier, values in found.items():
            words = [
                *DATA,
                "zero=local",
                "train.export=false",
                "train.save_strategy=no",
                f"train.seed={seed}",
                f"freeze.prefix_cache={tier}",
            ]
            summary, _ = run(*words)
            values.append(summary["metrics"]["after"]["accuracy"])
            sys.stderr.write(f"seed {seed}, {tier}: {values[-1]:.4f}, loss {summary['loss']:.6f}\n")
    return {
        "runs": "minilm-l6, bottom 50 %, 3 epochs, fp32, local engine", "seeds": list(SEEDS), "accuracy": found,
        "identical": found["off"] == found["memory"],
        **{f"{tier}_mean": round(statistics.mean(values), 4) for tier, values in found.items()},
        **{f"{tier}_deviation": round(statistics.stdev(values), 4) for tier, values in found.items()},
    }  # fmt: skip


def wall() -> dict[str, Any]:
    """Rounds of all plans in turn; ratios of a round."""
    rounds, told = [], {}
    for number in range(ROUNDS):
        seconds = {}
        for name, words in WALL.items():
            summary, seconds[name] = run(*SHORT, *words)
            told[name] = summary["prefix_cache"]
            sys.stderr.write(f"round {number}, {name}: {seconds[name]:.0f} s\n")
            time.sleep(1)
        rounds.append(seconds)
    cache = told["bottom75_memory"]
    return {
        "runs": "smollm2-135m, RTE, 40 examples, batch 8, 5 epochs, fp32, local engine",
        "times_faster_than_full": {name: spread([r["full"] / r[name] for r in rounds]) for name in WALL},
        "hits": cache["hits"], "examples": cache["examples"], "bytes": cache["bytes"],
        "wait_share": round(cache["wait_share"], 5),
    }  # fmt: skip


def main() -> None:
    parts = {"accuracy": accuracy, "wall": wall}
    path = Path(__file__).with_suffix(".json")
    before = json.loads(path.read_text()) if path.exists() else {}
    chosen = sys.argv[1:] or list(parts)
    found = {name: {"machine": machine(), **parts[name]()} for name in chosen}
    write(__file__, {**before, **found})


if __name__ == "__main__":
    main()
