"""Step time with the frozen prefix read from a cache: a 12-layer Llama (hidden 384), batch 4 x 128, fp32, one thread, local engine.

Every plan runs the loop's own parts (loader, read-ahead, cache, engine) on 64 blocks of random tokens; epochs are over when the
timing begins, so that the cached ones read every state. All live side by side and take turns. The floor by FLOPs against full
tuning (3 L layer passes) is 1.5 for bottom 50 % and 2.0 for bottom 75 %, and with the prefix not computed 2.0 and 4.0. Peers run in
an environment of their own, when `PEERS_PYTHON` names its python (see README.md).
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, spread, write
from prefix_cache_peers import Peer
from rich.console import Console
from step_time import model

from dsfreeze.checkpoint import Base
from dsfreeze.data import Examples, Loader, TaskData
from dsfreeze.data.causal_lm import Blocks
from dsfreeze.data.examples import TokenCollate
from dsfreeze.engine import Engine
from dsfreeze.engine.process import build_engine
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.job import Job
from dsfreeze.model import add_adapters, read_anatomy
from dsfreeze.prefix.ahead import ReadAhead
from dsfreeze.prefix.cache import PrefixCache
from dsfreeze.recipe import Recipe
from dsfreeze.strategies import make_plan

HALF, MOST = {"strategy": "bottom", "fraction": 0.5}, {"strategy": "bottom", "fraction": 0.75}
ALL = {"strategy": "full"}
PLANS: dict[str, dict[str, Any]] = {
    "full": ALL,
    "bottom50": HALF,
    "bottom75": MOST,
    "bottom50_memory": {**HALF, "prefix_cache": "memory"},
    "bottom75_memory": {**MOST, "prefix_cache": "memory"},
    "bottom50_disk": {**HALF, "prefix_cache": "disk"},
    "bottom75_disk": {**MOST, "prefix_cache": "disk"},
    "bottom75_memory_int8": {**MOST, "prefix_cache": "memory", "prefix_cache_dtype": "int8"},
    "lora": {"strategy": "lora", "fraction": 0.0, "adapter": {"r": 8}},
    "lora_bottom75_memory": {"strategy": "lora", "fraction": 0.75, "adapter": {"r": 8}, "prefix_cache": "memory"},
}  # fmt: skip
#: Passes of a step over full tuning's, with the prefix computed once.
FLOOR = {"bottom50": 1.5, "bottom75": 2.0, "bottom50_memory": 2.0, "bottom75_memory": 4.0}
#: Other tools' bottom freezing and LoRA, each in a process of its own.
PEERS = (
    "llamafactory-full", "llamafactory-freeze-50", "llamafactory-freeze-75", "llamafactory-lora", "peft-freeze-50", "peft-freeze-75",
    "peft-lora", "peft-lora-top-50",
)  # fmt: skip
ROUNDS, STEPS, WARMUP, CONSECUTIVE = 13, 2, 2, 40
BATCH, LENGTH, BLOCKS = 4, 128, 64


class NoTokenizer:
    """Random tokens need none; the cache asks for its vocabulary."""

    pad_token_id, eos_token_id = 0, 0

    def get_vocab(self) -> dict[str, int]:
        return {}


def job_of(freeze: dict[str, Any], folder: Path) -> Job:
    train = {"per_device_train_batch_size": BATCH, "num_train_epochs": 1000}
    freeze = {**freeze, "prefix_cache_dir": str(folder)}
    recipe = Recipe.model_validate({"model": "benchmark", "task": "causal_lm", "zero": "local", "freeze": freeze, "train": train,
                                    "data": {"max_length": LENGTH}})  # fmt: skip
    stream = np.random.default_rng(0).integers(0, 1024, BLOCKS * LENGTH).astype(np.int32)
    blocks = Blocks(stream, LENGTH)
    tokens = np.full(BLOCKS, LENGTH, dtype=np.int64)
    data = TaskData("causal_lm", Examples(blocks, tokens - 1, tokens), None, TokenCollate(0), NoTokenizer())
    module = model()
    plain = read_anatomy(module, "llama-12x384")
    plan = make_plan(plain, recipe.freeze)
    if plan.adapter is not None:
        add_adapters(module, plan.adapter, seed=0)
    return Job(recipe, data.tokenizer, data, module, plan.adapted(plain), plan, Base("benchmark", "", ""), plain, plan)


@dataclass
class Method:
    """A plan in training, as the loop would run it."""

    engine: Engine
    cache: PrefixCache
    steps: ReadAhead
    losses: list[float] = field(default_factory=list)

    def seconds(self, number: int) -> float:
        began = time.perf_counter()
        for _ in range(number):
            self.step()
        return (time.perf_counter() - began) / number

    def step(self) -> None:
        ready, loss = next(self.steps), 0.0
        micro = zip(ready.step.micro_batches, ready.step.chosen, ready.staged, strict=True)
        for (batch, items), chosen, staged in micro:
            with self.cache.around(self.engine, self.cache.train, chosen, batch, staged):
                loss += self.engine.forward_backward(batch, items / ready.step.global_items)
        self.engine.step(1e-4)
        self.losses.append(loss)

    def close(self) -> None:
        self.steps.close()
        self.cache.close()


def build(freeze: dict[str, Any], folder: Path) -> Method:
    job = job_of(freeze, folder)
    loader = Loader(job.data.train, job.data.collate, job.data.num_items, per_device_batch_size=BATCH)
    engine = build_engine(job.module, job.anatomy, job.recipe, job.plan)
    engine.enter(job.plan.phases[0])
    cache = PrefixCache(job, read_ranks(), Console(quiet=True), 1000 * loader.steps_per_epoch, loader.steps_per_epoch)
    cache.enter(engine, job.plan.phases[0], 0)
    method = Method(engine, cache, ReadAhead(loader, cache))
    for _ in range(loader.steps_per_epoch):  # the epoch that fills the cache
        method.step()
    return method


def figures(name: str, rounds: list[dict[str, float]], method: Method | Peer) -> dict[str, Any]:
    found: dict[str, Any] = {"times_faster_than_full": spread([r["full"] / r[name] for r in rounds])}
    if name in FLOOR:
        found["by_flops"] = FLOOR[name]
    if isinstance(method, Method) and method.cache.wanted:
        found["wait_share"] = wait_share(method)
    return found


def wait_share(method: Method) -> float:
    """Of steps that follow each other without a pause, what share of their time is waiting for states; one turn's first steps find
    them ready."""
    method.seconds(WARMUP)
    method.steps.waited = 0.0
    taken = CONSECUTIVE * method.seconds(CONSECUTIVE)
    return round(method.steps.waited / taken, 5)


def bit_equal(methods: dict[str, Method | Peer], plain: str, cached: str) -> bool:
    """Whether both have made the same steps with the same losses."""
    one, other = methods[plain], methods[cached]
    assert isinstance(one, Method)
    assert isinstance(other, Method)
    return one.losses == other.losses


def main() -> None:
    torch.set_num_threads(1)
    python = os.environ.get("PEERS_PYTHON")
    with tempfile.TemporaryDirectory() as folder:
        methods: dict[str, Method | Peer] = {name: build(freeze, Path(folder) / name) for name, freeze in PLANS.items()}
        methods |= {name: Peer(python, name) for name in PEERS} if python else {}
        for method in methods.values():
            method.seconds(WARMUP)
        rounds = [{name: method.seconds(STEPS) for name, method in methods.items()} for _ in range(ROUNDS)]
        same = {name: bit_equal(methods, name, f"{name}_memory") for name in ("bottom50", "bottom75")}
        plans = {name: figures(name, rounds, method) for name, method in methods.items()}
        against = {
            f"{cached} over {other}": spread([r[other] / r[cached] for r in rounds])
            for cached in ("bottom50_memory", "bottom75_memory") for other in ("lora", *(PEERS if python else ()))
        }  # fmt: skip
        about = [method.about for method in methods.values() if isinstance(method, Peer)]
        for method in methods.values():
            method.close()
    write(__file__, {
        "machine": machine(), "shape": "llama 12 x 384, batch 4 x 128, fp32, local engine, one thread", "plans": plans,
        "times_faster_than": against, "losses_bit_equal": same, "peers": about,
    })  # fmt: skip


if __name__ == "__main__":
    main()
