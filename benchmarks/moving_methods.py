"""LISA and BAdam in our loop's engine (ZeRO-2) against their reference definitions in plain PyTorch, on three seeds.

The reference is one torch.optim.AdamW over every tensor whose `requires_grad` flags follow the method: a tensor without a gradient is
left alone, its moments kept (LISA as LMFlow codes it), and at every BAdam switch the optimizer's state is emptied. It shares the
layer draws with ours, which are an input of both, and nothing else. Text of a random Markov chain, so that there is something
to learn; a 12-layer Llama of width 64, 8 x 64 tokens a step. `loss` is the mean over the last 20 steps.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import machine, write
from transformers import LlamaConfig, LlamaForCausalLM

from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.model import read_anatomy
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions, Recipe
from dsfreeze.strategies import make_plan

SEEDS, STEPS, LR, LAST, VOCABULARY = (0, 1, 2), 160, 3e-3, 20, 32
METHODS = {
    "lisa": {"strategy": "lisa", "active_layers": 2, "switch_every": 10, "state": "keep"},
    "badam": {"strategy": "badam", "switch_every": 10, "state": "clear", "embed": "train", "norm": "train", "head": "train"},
}  # fmt: skip


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(100 + seed)
    chain = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=draw), -1)
    ids = torch.randint(0, VOCABULARY, (STEPS * 8, 64), generator=draw)
    for position in range(1, 64):
        ids[:, position] = torch.multinomial(chain[ids[:, position - 1]], 1, generator=draw)[:, 0]
    return [{"input_ids": part, "labels": part} for part in ids.split(8)]


def plan_of(method: str, seed: int) -> FreezePlan:
    options = FreezeOptions.model_validate({**METHODS[method], "seed": seed})
    return make_plan(read_anatomy(model(seed), "llama-12x64"), options, STEPS)


def ours(method: str, seed: int) -> list[float]:
    values = {"model": "benchmark", "task": "causal_lm", "zero": "zero2", "train": {"max_grad_norm": 0.0}}
    recipe, module, plan = Recipe.model_validate(values), model(seed), plan_of(method, seed)
    engine = build_engine(module, read_anatomy(module, "llama-12x64"), recipe, plan)
    losses = []
    for step, batch in enumerate(batches(seed)):
        engine.enter(plan.phase_at(step))
        losses.append(engine.forward_backward(batch, 1.0))
        engine.step(LR)
    engine.close()
    return losses


def reference(method: str, seed: int) -> list[float]:
    module, plan = model(seed), plan_of(method, seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=LR, weight_decay=0.0)
    active: tuple[str, ...] = ()
    losses = []
    for step, batch in enumerate(batches(seed)):
        chosen = plan.phase_at(step).trainable
        if chosen != active:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in chosen)
                if method == "badam" and name in active and name not in chosen:
                    optimizer.state.pop(parameter, None)
            active = chosen
        loss = module(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def compare(method: str) -> dict[str, Any]:
    pairs = [(ours(method, seed), reference(method, seed)) for seed in SEEDS]

    def told(index: int) -> dict[str, float]:
        ends = [statistics.mean(pair[index][-LAST:]) for pair in pairs]
        return {"mean": round(statistics.mean(ends), 5), "sd": round(statistics.stdev(ends), 5)}

    apart = [max(abs(a - b) for a, b in zip(*pair, strict=True)) for pair in pairs]
    return {
        "first_loss": round(statistics.mean(pair[0][0] for pair in pairs), 4), "loss": told(0), "reference_loss": told(1),
        "largest_difference_of_any_step": float(f"{max(apart):.2e}"),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with process_group(Recipe(model="benchmark")):
        result = {method: compare(method) for method in METHODS}
    write(__file__, {"machine": machine(), "seeds": len(SEEDS), "steps": STEPS, "methods": result})


if __name__ == "__main__":
    main()
