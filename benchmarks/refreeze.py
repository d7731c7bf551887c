"""What a refreeze costs, leaves behind and frees: the 12-layer Llama of step_time.py, one process, ZeRO 1 to 3, fp32.

Resident memory is read after the C library has given back what it holds free (malloc_trim): without, it wanders by tens of MiB.
Cost: one layer (BAdam) and six layers take turns; each round times a refreeze and a training step of the same set, side by side.
`enter` is the engine's whole switch: refreeze, checksums of the tensors that leave and join, prefix and modes. Leaks: 100
refreezes, resident memory at each, live engines, wrappers and hooks. Frees: bytes of masters and moments for one layer against
those of all twelve.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from typing import Any

import psutil
import torch
from common import machine, spread, write
from step_time import BATCH, LENGTH, model, seconds

from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.model import read_anatomy
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import Recipe

ROUNDS, CHANGES, SETS = 8, 100, (1, 6)


def engine_of(stage: int) -> Any:
    recipe = Recipe.model_validate({"model": "benchmark", "task": "causal_lm", "zero": f"zero{stage}"})
    module = model()
    anatomy = read_anatomy(module, "llama-12x384")
    layers = tuple(t.name for layer in anatomy.blocks for t in layer.tensors)
    engine = build_engine(module, anatomy, recipe, FreezePlan("benchmark", (Phase(0, None, layers),)))
    engine.enter(Phase(0, None, layers))
    return engine


def phase(engine: Any, first: int, count: int) -> Phase:
    chosen = {f"layers.{(first + n) % 12}" for n in range(count)}
    return Phase(0, None, tuple(t.name for lay in engine.anatomy.blocks if lay.name in chosen for t in lay.tensors))


def costs(engine: Any, batch: dict[str, torch.Tensor], count: int) -> dict[str, Any]:
    """Medians over the rounds; the state of layers that leave is kept."""
    rounds = []
    timed = {"seconds": 0.0}
    whole = engine._refreeze

    def refreeze(names: tuple[str, ...]) -> None:
        began = time.perf_counter()
        whole(names)
        timed["seconds"] = time.perf_counter() - began

    engine._refreeze = refreeze
    for number in range(ROUNDS):
        began = time.perf_counter()
        engine.enter(phase(engine, number * count, count))
        switch = time.perf_counter() - began
        first = seconds(engine, batch, 1)
        step = seconds(engine, batch, 2)
        rounds.append((timed["seconds"] / step, switch / step, first / step))
    engine._refreeze = whole
    refrozen, entered, first_step = zip(*rounds[2:], strict=True)
    return {
        "refreeze_over_step": spread(refrozen), "enter_over_step": spread(entered), "first_step_over_step": spread(first_step),
    }  # fmt: skip


def leaks(engine: Any) -> dict[str, Any]:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    process, give_back, resident, counts = psutil.Process(), ctypes.CDLL(None).malloc_trim, [], []
    for number in range(CHANGES):
        engine.enter(phase(engine, number, 1))
        if number % 10 == 9:
            gc.collect()
            give_back(0)
            resident.append(process.memory_info().rss)
            alive = sum(issubclass(type(o), ZeROOptimizer) for o in gc.get_objects())
            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules())
            counts.append((alive, hooks, live_bytes()))
    late = resident[len(resident) // 2 :]
    return {
        "refreezes": CHANGES,
        "resident_MiB_per_refreeze": round(slope(resident) / 10 / 2**20, 4),
        "resident_MiB_between": [round(min(late) / 2**20, 1), round(max(late) / 2**20, 1)],
        **{
            name: sorted(set(seen))
            for name, seen in zip(("wrappers", "hooks", "live_bytes"), zip(*counts, strict=True), strict=True)
        },
    }


def slope(values: list[float]) -> float:
    """Least squares, per entry."""
    return statistics.linear_regression(range(len(values)), values).slope


def live_bytes() -> int:
    """Of every storage that a live tensor keeps."""
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu")
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def frees(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    held = {}
    for name, count in (("twelve", 12), ("one", 1)):
        engine.rule = "clear"
        engine.enter(phase(engine, 0, count))
        seconds(engine, batch, 1)
        memory = engine.memory()
        held[name] = memory.masters + memory.optimizer_state
    return {"state_of_one_layer_over_all_twelve": held["one"] / held["twelve"], "one_twelfth": 1 / 12}


def main() -> None:
    torch.set_num_threads(1)
    tokens = torch.randint(0, 1024, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    stages = {}
    with process_group(Recipe(model="benchmark")):
        for stage in (1, 2, 3):
            engine = engine_of(stage)
            seconds(engine, batch, 2)
            stages[f"zero{stage}"] = {
                **{f"{count} of 12 layers": costs(engine, batch, count) for count in SETS},
                "leaks": leaks(engine),
                "frees": frees(engine, batch),
            }
            engine.close()
    write(
        __file__,
        {"machine": machine(), "shape": "llama 12 x 384, batch 4 x 128, fp32, 1 rank, rule keep", "stages": stages},
    )


if __name__ == "__main__":
    main()
