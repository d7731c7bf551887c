"""What the planner's formula (dsfreeze/estimate/seconds.py) says of a step's time, against steps that ran.

Eleven plans of a model live side by side and take turns, another first in each round, so that a noisy moment hits them alike;
each round gives one ratio to full tuning per plan. Times are the process's CPU seconds, which with one thread and no waiting
are those of the clock on a machine of one's own, and stay so on a shared one; the clock's ratios are recorded beside. The formula
is calibrated on full tuning alone, so that an error is one of a ratio. Where a step spends its time (forward, backward,
optimizer) is recorded too, as shares of a full step, and so are the formula's items.

Activations are counted as well: the fullest moment of a real forward and backward pass, against the formula's. `--again` compares
what was measured before with the formula as it is now.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine, spread, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsfreeze.activation_reader import read_activations
from dsfreeze.activations import TaskActivations
from dsfreeze.engine import Engine
from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.estimate.price import PlanCost
from dsfreeze.hardware import find_device
from dsfreeze.model import add_adapters, read_anatomy
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import Recipe
from dsfreeze.setting import Workload
from dsfreeze.strategies import make_plan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from counting import LiveBytes, prepared

#: Plans, and whether their layers recompute.
PLANS: dict[str, tuple[dict[str, Any], bool]] = {
    "full": ({"strategy": "full"}, False),
    "bottom 25 %": ({"strategy": "bottom", "fraction": 0.25}, False),
    "bottom 50 %": ({"strategy": "bottom", "fraction": 0.5}, False),
    "bottom 75 %": ({"strategy": "bottom", "fraction": 0.75}, False),
    "top 50 %": ({"strategy": "top", "fraction": 0.5}, False),
    "interval 50 %": ({"strategy": "interval", "fraction": 0.5}, False),
    "interval 50 %, embedding frozen": ({"strategy": "interval", "fraction": 0.5, "embed": "freeze"}, False),
    "norms": ({"strategy": "norms"}, False),
    "lora": ({"strategy": "lora"}, False),
    "full, checkpointed": ({"strategy": "full"}, True),
    "bottom 50 %, checkpointed": ({"strategy": "bottom", "fraction": 0.5}, True),
}
STAGE, ROUNDS, WARMUP = 2, 15, 2


@dataclass(frozen=True)
class Shape:
    """A model and a batch; fp32."""

    depth: int
    hidden: int
    wide: int
    batch: int
    length: int

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden, intermediate_size=self.wide, num_hidden_layers=self.depth,
            num_attention_heads=self.hidden // 64, num_key_value_heads=self.hidden // 64,
            vocab_size=1024, tie_word_embeddings=False, use_cache=False,
        )  # fmt: skip

    def batch_of(self) -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 1024, (self.batch, self.length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


SHAPES = {
    "llama 12 x 384, batch 4 x 128": Shape(12, 384, 1024, 4, 128),
    "llama 6 x 512, batch 2 x 256": Shape(6, 512, 1408, 2, 256),
}


@dataclass
class Case:
    """One plan, ready to step."""

    engine: Engine
    ended: tuple[float, float] = (0.0, 0.0)
    """When the last forward pass did."""

    def step(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """Seconds of a step by part, the CPU's and the clock's."""
        began = _now()
        self.engine.forward_backward(batch, 1.0)
        passed = _now()
        self.engine.step(1e-4)
        done = _now()
        return {
            "forward": self.ended[0] - began[0],
            "backward": passed[0] - self.ended[0],
            "optimizer": done[0] - passed[0],
            "cpu": done[0] - began[0],
            "clock": done[1] - began[1],
        }

    def forward_ended(self, *_: object) -> None:
        self.ended = _now()


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def planned(shape: Shape, name: str, known: TaskActivations) -> tuple[nn.Module, FreezePlan, Recipe, PlanCost]:
    freeze, checkpointing = PLANS[name]
    values = {"model": "benchmark", "task": "causal_lm", "zero": f"zero{STAGE}", "freeze": freeze}
    recipe = Recipe.model_validate({**values, "train": {"gradient_checkpointing": checkpointing}})
    torch.manual_seed(0)
    module = LlamaForCausalLM(shape.config())
    anatomy = read_anatomy(module, "benchmark")
    plan = make_plan(anatomy, recipe.freeze)
    if plan.adapter:
        add_adapters(module, plan.adapter, 0)
    work = Workload(micro_batch_size=shape.batch, gradient_checkpointing=checkpointing)
    cost = PlanCost(anatomy, plan, known, work, dtype_bytes=4, sequence_length=shape.length)
    return module, plan, recipe, cost


def case_of(shape: Shape, name: str, known: TaskActivations) -> Case:
    module, plan, recipe, cost = planned(shape, name, known)
    engine = build_engine(module, cost.anatomy, recipe, plan)
    engine.enter(plan.phases[0])
    case = Case(engine)
    module.register_forward_hook(case.forward_ended)
    return case


def activation_bytes(shape: Shape, name: str, known: TaskActivations) -> int:
    """The fullest moment of real passes, gradients that wait for the step left out."""
    module, plan, _, cost = planned(shape, name, known)
    modes = prepared(module, cost.anatomy, plan.phases[0].trainable, PLANS[name][1])
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with LiveBytes() as live:
        module(**shape.batch_of()).loss.backward()
    modes.close()
    return live.peak


def measure(shape: Shape, known: TaskActivations) -> dict[str, Any]:
    """What was seen of each plan, which no formula enters."""
    counted = {name: activation_bytes(shape, name, known) for name in PLANS}
    cases = {name: case_of(shape, name, known) for name in PLANS}
    batch = shape.batch_of()
    for case in cases.values():
        for _ in range(WARMUP):
            case.step(batch)
    names = list(cases)
    turns = [[*names[n % len(names) :], *names[: n % len(names)]] for n in range(ROUNDS)]
    rounds = [{name: cases[name].step(batch) for name in turn} for turn in turns]
    for case in cases.values():
        case.engine.close()

    def share(name: str, part: str) -> float:
        return round(median(r[name][part] / r["full"]["cpu"] for r in rounds), 4)

    return {
        name: {
            "time_over_full": spread([r[name]["cpu"] / r["full"]["cpu"] for r in rounds]),
            "clock_over_full": spread([r[name]["clock"] / r["full"]["clock"] for r in rounds]),
            "shares_of_full": {part: share(name, part) for part in ("forward", "backward", "optimizer")},
            "activation_bytes": counted[name],
        }
        for name in PLANS
    }


def compared(seen: dict[str, Any], shape: Shape, known: TaskActivations) -> dict[str, Any]:
    """What was seen beside what the formula says."""
    device = find_device("cpu")
    costs = {name: planned(shape, name, known)[-1] for name in PLANS}
    times = {name: cost.at(STAGE, 1).on(device) for name, cost in costs.items()}
    whole = times["full"].total
    rows = {}
    for name, row in seen.items():
        ours, passes = times[name], costs[name].phases[0].passes
        ratio, most = ours.total / whole, max(passes.forward + passes.backward)
        rows[name] = {
            key: row[key] for key in ("time_over_full", "clock_over_full", "shares_of_full", "activation_bytes")
        } | {
            "predicted": round(ratio, 4),
            "error_percent": round(100 * (ratio / row["time_over_full"]["median"] - 1), 1),
            "predicted_shares": {
                part: round(getattr(ours, part) / whole, 4) for part in ("products", "memory", "optimizer")
            },
            "predicted_activation_bytes": most,
            "activation_error_percent": round(100 * (most / row["activation_bytes"] - 1), 1),
        }
    return rows


def main(again: bool) -> None:
    """Measure and compare; `again` compares what was measured before with the formula as it is now."""
    torch.set_num_threads(1)
    recorded = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")) if again else None
    result = recorded or {
        "machine": machine(), "setting": f"fp32, ZeRO-{STAGE}, 1 rank, calibrated on full", "shapes": {},
    }  # fmt: skip
    with process_group(Recipe(model="benchmark")):
        for name, shape in SHAPES.items():
            read = read_activations(shape.config(), {"causal_lm": LlamaForCausalLM}, attentions=["sdpa"], widths=[4])
            known = read.of("causal_lm", "sdpa", 4)
            seen = recorded["shapes"][name] if recorded else measure(shape, known)
            result["shapes"][name] = compared(seen, shape, known)
            write(__file__, result)


if __name__ == "__main__":
    main(again="--again" in sys.argv[1:])
