"""Bytes of masters, moments and gradients counted from the live objects of a ZeRO engine, against what the plan says, at stages 0-3.

Gradients are counted between backward and step, masters and moments after the step. One process, so nothing is sharded; the figures
of two ranks are tests/distributed/test_zero_engine.py's.
"""

from __future__ import annotations

import torch
from common import machine, write
from step_time import BATCH, LENGTH, model

from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.estimate import estimate
from dsfreeze.model import read_anatomy
from dsfreeze.recipe import Recipe
from dsfreeze.strategies import make_plan

PLANS = {
    "full": {"strategy": "full"},
    "bottom50": {"strategy": "bottom", "fraction": 0.5},
    "bottom75": {"strategy": "bottom", "fraction": 0.75},
}


def measure(stage: int, bf16: bool, freeze: dict, batch: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    values = {
        "model": "benchmark",
        "task": "causal_lm",
        "zero": f"zero{stage}",
        "freeze": freeze,
        "train": {"bf16": bf16},
    }
    recipe = Recipe.model_validate(values)
    module = model().to(torch.bfloat16 if bf16 else torch.float32)
    anatomy = read_anatomy(module, "llama-12x384")
    plan = make_plan(anatomy, recipe.freeze)
    engine = build_engine(module, anatomy, recipe, plan)
    engine.enter(plan.phases[0])
    engine.forward_backward(batch, 1.0)
    gradients = engine.memory().gradients  # a step ends with them dropped
    engine.step(1e-4)
    memory = engine.memory()
    engine.close()
    cost = estimate(anatomy, plan, stage=stage, dtype_bytes=2 if bf16 else 4)
    return {
        "counted": {"masters": memory.masters, "optimizer_state": memory.optimizer_state, "gradients": gradients},
        "by_plan": {"masters": cost.masters, "optimizer_state": cost.optimizer_state, "gradients": cost.gradients},
    }


def main() -> None:
    tokens = torch.randint(0, 1024, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    with process_group(Recipe(model="benchmark")):
        rows = {
            f"zero{stage} {'bf16' if bf16 else 'fp32'} {name}": measure(stage, bf16, freeze, batch)
            for stage in range(4)
            for bf16 in (False, True)
            for name, freeze in PLANS.items()
        }
    write(__file__, {"machine": machine(), "bytes": rows})


if __name__ == "__main__":
    main()
