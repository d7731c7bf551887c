"""Step time of freeze plans against full tuning: a 12-layer Llama (hidden 384), batch 4 x 128, one thread, ZeRO-2 in one process.

All plans live side by side and take turns, so that a noisy moment hits them alike; each round gives one ratio per plan. The floor
by FLOPs (methods card, T = L + (L - b) + |A| against 3L) is 1.5 for bottom 50 %, 2.0 for bottom 75 %, 1.2 for top 50 %.
"""

from __future__ import annotations

import time

import torch
from common import machine, spread, write
from transformers import LlamaConfig, LlamaForCausalLM

from dsfreeze.engine import Engine
from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.estimate import estimate
from dsfreeze.model import read_anatomy
from dsfreeze.recipe import Recipe
from dsfreeze.strategies import make_plan

PLANS = {
    "full": {"strategy": "full"},
    "bottom50": {"strategy": "bottom", "fraction": 0.5},
    "bottom75": {"strategy": "bottom", "fraction": 0.75},
    "top50": {"strategy": "top", "fraction": 0.5},
}
ROUNDS, STEPS, WARMUP = 15, 2, 3
BATCH, LENGTH = 4, 128


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=12, num_attention_heads=6, num_key_value_heads=6,
        vocab_size=1024, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def build(freeze: dict) -> tuple[Engine, float]:
    recipe = Recipe.model_validate({"model": "benchmark", "task": "causal_lm", "zero": "zero2", "freeze": freeze})
    module = model()
    anatomy = read_anatomy(module, "llama-12x384")
    plan = make_plan(anatomy, recipe.freeze)
    engine = build_engine(module, anatomy, recipe, plan)
    engine.enter(plan.phases[0])
    cost = estimate(anatomy, plan, sequence_length=LENGTH)
    return engine, cost.full_flops_per_token / cost.flops_per_token


def seconds(engine: Engine, batch: dict[str, torch.Tensor], steps: int) -> float:
    began = time.perf_counter()
    for _ in range(steps):
        engine.forward_backward(batch, 1.0)
        engine.step(1e-4)
    return (time.perf_counter() - began) / steps


def main() -> None:
    torch.set_num_threads(1)
    with process_group(Recipe(model="benchmark")):
        engines = {name: build(freeze) for name, freeze in PLANS.items()}
        tokens = torch.randint(0, 1024, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
        for engine, _ in engines.values():
            seconds(engine, batch, WARMUP)
        rounds = [{n: seconds(engine, batch, STEPS) for n, (engine, _) in engines.items()} for _ in range(ROUNDS)]
    result = {
        name: {"times_faster_than_full": spread([r["full"] / r[name] for r in rounds]), "by_flops": round(flops, 3)}
        for name, (_, flops) in engines.items()
    }
    write(
        __file__,
        {"machine": machine(), "shape": "llama 12 x 384, batch 4 x 128, fp32, ZeRO-2, 1 rank", "plans": result},
    )


if __name__ == "__main__":
    main()
