"""Which layers to train, by every ranking of the analyzer, against bottom, top, middle and random sets of equal step FLOPs.

Three tasks (SST-2, SICK, SNLI) x three seeds, the embedded encoder (6 layers), accuracy on the official validation splits. Of each
ranking the layers train that fit, in its order, into a step of 80 % of full tuning's FLOPs; the four controls are such orders too
(`random` is drawn anew for each seed), and `strategy: budget` makes its own set of greentrainer's scores. Head and pooler train in
every set, the embedding with layers.0. The learning rate is tuned for every set alike, on 400 examples held out of the training data
and a seed of their own. Rankings that choose the same set share its runs.

`python benchmarks/rankings.py RUNS` keeps finished runs in the file RUNS and goes on from there when it was interrupted.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

from common import machine, write

DATA = Path(__file__).parents[2] / "shared" / "data"
TASKS = {
    "sst2": "text", "sick": ["premise", "hypothesis"], "snli_dev": ["premise", "hypothesis"],
}  # fmt: skip
SEEDS, TUNING_SEED, RATES = (0, 1, 2), 100, (2e-4, 5e-4)
STEPS, BATCH, HELD_OUT, LIMIT, EXAMPLES, LAYERS = 120, 8, 400, 0.8, 64, 6


def recipe_of(task: str, seed: int, **sections: Any) -> Any:
    from dsfreeze.recipe import Recipe

    folder = DATA / task
    return Recipe.model_validate(
        {
            "model": {"name": "minilm-l6", "dropout": 0.0}, "task": "classification", "zero": "local",
            "data": {"train": str(folder / "train.jsonl.gz"), "eval": str(folder / "validation.jsonl.gz"), "text": TASKS[task],
                     "label": "label", "max_length": 64, "metrics": "accuracy"},
            "train": {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "per_device_eval_batch_size": 64, "seed": seed,
                      "learning_rate": 3e-4, "warmup_steps": 12},
            **sections,
        }
    )  # fmt: skip


@cache
def loaded(task: str, seed: int) -> Any:
    from dsfreeze.job import load_task
    from dsfreeze.model import read_anatomy

    recipe = recipe_of(task, seed)
    _, data, module = load_task(recipe)
    return recipe, data, module, read_anatomy(module, "minilm-l6")


# -- which sets ----------------------------------------------------------------------------------------------------


def flops_share(layers: frozenset[int]) -> float:
    from dsfreeze.estimate import estimate

    _, _, _, anatomy = loaded("sst2", SEEDS[0])
    cost = estimate(anatomy, plan_of(layers), sequence_length=64)
    return cost.flops_ratio


def plan_of(layers: frozenset[int]) -> Any:
    """Those layers, the embedding with layers.0, and everything above the last layer."""
    from dsfreeze.plan import FreezePlan, Phase

    _, _, _, anatomy = loaded("sst2", SEEDS[0])
    chosen = {f"layers.{k}" for k in layers} | {"norm", "head"} | ({"embed"} if 0 in layers else set())
    names = tuple(t.name for layer in anatomy.layers if layer.name in chosen for t in layer.tensors)
    return FreezePlan("patterns", (Phase(0, None, names),))


def filled(order: list[int]) -> frozenset[int]:
    """The layers in order, each that still fits into the limit: sets of other rankings are as dear, to within a layer."""
    chosen: frozenset[int] = frozenset()
    for layer in order:
        if flops_share(chosen | {layer}) <= LIMIT:
            chosen |= {layer}
    return chosen


def controls(seed: int) -> dict[str, frozenset[int]]:
    down, up = list(range(LAYERS))[::-1], list(range(LAYERS))
    middle = [3, 2, 4, 1, 5, 0]
    return {
        "bottom frozen": filled(down), "top frozen": filled(up), "middle": filled(middle),
        "random": filled(Random(seed).sample(up, LAYERS)),
    }  # fmt: skip


def ranked(job: tuple[str, int]) -> tuple[tuple[str, int], dict[str, Any]]:
    """Of each score the layers in order, and its stability; the budget's set; seconds."""
    from dsfreeze.analyze import analyze

    task, seed = job
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "num_examples": EXAMPLES, "gate_steps": 10, "seed": seed, "output_dir": folder,
            "budget": {"flops": f"{LIMIT:.0%}"},
        }  # fmt: skip
        content = analyze(recipe_of(task, seed, analyze=options))
    orders = {
        name: sorted(range(LAYERS), key=lambda k: -found["scores"][f"layers.{k}"])
        for name, found in content["all"].items()
    }
    best = [int(name.rpartition(".")[2]) for name in content["recommendation"]["layers"]]
    stability = {name: found["spearman"] for name, found in content["all"].items()}
    cut = content["cuts"]["a"]["dataset"]["median"]
    return job, {
        "orders": orders,
        "budget": best,
        "stability": stability,
        "salf cut": cut,
        "seconds": content["seconds"],
    }


# -- runs ----------------------------------------------------------------------------------------------------------


def trained(job: tuple[str, int, tuple[int, ...], float, bool]) -> tuple[Any, float]:
    """The metric after training those layers; with `tuning` on examples held out of the training data."""
    from copy import deepcopy
    from dataclasses import replace

    import numpy as np
    import torch

    from dsfreeze.data import Examples, Loader
    from dsfreeze.engine.local import LocalEngine
    from dsfreeze.evaluation import evaluate
    from dsfreeze.schedule import learning_rate_schedule

    task, seed, layers, rate, tuning = job
    torch.set_num_threads(1)
    recipe, data, module, anatomy = loaded(task, seed)
    if tuning:
        order = np.random.default_rng(TUNING_SEED).permutation(len(data.train))

        def part(chosen: Any) -> Examples:
            train = data.train
            return Examples([train[i] for i in chosen], train.num_items[chosen], train.num_tokens[chosen])

        data = replace(data, train=part(order[HELD_OUT:]), eval=part(order[:HELD_OUT]))
    engine = LocalEngine(deepcopy(module), anatomy, recipe)
    engine.enter(plan_of(frozenset(layers)).phases[0])
    loader = Loader(data.train, data.collate, data.num_items, per_device_batch_size=BATCH, seed=seed)
    schedule = learning_rate_schedule(recipe.train, STEPS)
    for step in range(STEPS):
        batch = next(loader)
        for micro, items in batch.micro_batches:
            engine.forward_backward(micro, items / batch.global_items)
        engine.step(schedule(step) * rate / recipe.train.learning_rate)
    return job, evaluate(engine, data, recipe)["accuracy"]


def all_trained(pool: ProcessPoolExecutor, jobs: list[Any], kept: Path | None) -> Iterator[tuple[Any, float]]:
    """The results of the jobs, each with a line; what `kept` holds is not run again."""
    lines = kept.read_text().splitlines() if kept and kept.exists() else []
    known = {(task, seed, tuple(layers), *rest): score for task, seed, layers, *rest, score in map(json.loads, lines)}
    yield from ((job, known[job]) for job in jobs if job in known)
    left = [job for job in jobs if job not in known]
    for number, (job, score) in enumerate(pool.map(trained, left), start=1):
        print(f"{number}/{len(left)}", *job, f"{score:.4f}", file=sys.stderr, flush=True)
        if kept:
            with kept.open("a") as file:
                file.write(json.dumps([*job, score]) + "\n")
        yield job, score


def main() -> None:
    jobs = list(product(TASKS, SEEDS))
    kept = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        rankings = dict(pool.map(ranked, jobs))
        sets = {
            job: {
                **controls(job[1]),
                "full": frozenset(range(LAYERS)),
                "budget (greentrainer)": frozenset(rankings[job]["budget"]),
                **{name: filled(order) for name, order in rankings[job]["orders"].items()},
            }
            for job in jobs
        }
        wanted = sorted({(task, tuple(sorted(layers))) for (task, _), own in sets.items() for layers in own.values()})
        tuning = [(task, TUNING_SEED, layers, rate, True) for task, layers in wanted for rate in RATES]
        tuned: dict[Any, tuple[float, float]] = {}
        for (task, _, layers, rate, _), score in all_trained(pool, tuning, kept):
            tuned[task, layers] = max(tuned.get((task, layers), (-1.0, 0.0)), (score, rate))
        runs = {(task, seed, tuple(sorted(layers))) for (task, seed), own in sets.items() for layers in own.values()}
        final = [(task, seed, layers, tuned[task, layers][1], False) for task, seed, layers in sorted(runs)]
        scores = {(task, seed, layers): score for (task, seed, layers, _, _), score in all_trained(pool, final, kept)}
    write(__file__, report(sets, rankings, tuned, scores))


def report(sets: Any, rankings: Any, tuned: Any, scores: Any) -> dict[str, Any]:
    names = list(next(iter(sets.values())))

    def cell(name: str, task: str) -> dict[str, Any]:
        own = [tuple(sorted(sets[task, seed][name])) for seed in SEEDS]
        found = [scores[task, seed, layers] for seed, layers in zip(SEEDS, own, strict=True)]
        return {
            "mean": round(statistics.fmean(found), 4), "sd": round(statistics.stdev(found), 4), "sets": [list(layers) for layers in own],
            "flops": [round(flops_share(frozenset(layers)), 3) for layers in own],
        }  # fmt: skip

    stability = {
        name: round(statistics.fmean(r["stability"][name] for r in rankings.values()), 3)
        for name in next(iter(rankings.values()))["stability"]
        if next(iter(rankings.values()))["stability"][name] is not None
    }
    return {
        "machine": machine(), "model": "minilm-l6", "steps": STEPS, "batch": BATCH, "flops_limit": LIMIT, "seeds": SEEDS,
        "rankings": {name: {task: cell(name, task) for task in TASKS} for name in names},
        "learning_rates": {f"{task} {list(layers)}": rate for (task, layers), (_, rate) in tuned.items()},
        "stability": stability,
        "seconds_of_an_analysis": round(statistics.median(r["seconds"] for r in rankings.values()), 1),
    }  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not DATA.is_dir():
        sys.exit(f"The task data are not at {DATA}.")
    main()
