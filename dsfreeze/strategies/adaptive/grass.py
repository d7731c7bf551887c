"""After GRASS (arXiv 2604.07808): layers are drawn in proportion to the softmax of the size of their gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import mean

from dsfreeze.plan import FreezePlan
from dsfreeze.strategies.adaptive.common import (
    Ground,
    Memory,
    Rule,
    draw,
    generator,
    go_on,
    gradients_of,
    next_decision,
    rms_over_steps,
    shuffled,
    start,
)  # fmt: skip
from dsfreeze.strategies.evidence import Evidence, Revision
from dsfreeze.strategies.moving import number_active

EVERY = 20
ACTIVE = 2


def begin(ground: Ground) -> FreezePlan:
    """The first layers of the sweep that visits each once."""
    chosen = _sweep(ground)[: number_active(ground.options, list(ground.layers), ACTIVE)]
    return start(ground, ground.train_layers(chosen), state="offload", decide_at=ground.every(EVERY))


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Update the sizes of the layers that trained; those not yet visited come first, the rest is drawn."""
    options = ground.options
    sizes = dict(memory.get("sizes", {}))
    for name, gradient in gradients_of(ground, ground.active(plan), evidence).items():
        size = rms_over_steps(gradient) / math.sqrt(ground.numel(name))
        sizes[name] = options.ema * sizes[name] + (1 - options.ema) * size if name in sizes else size
    decision = memory.get("decision", 0) + 1
    number = number_active(options, list(ground.layers), ACTIVE)
    chosen = [name for name in _sweep(ground) if name not in sizes][:number]
    logs = scaled(sizes, options.temperature)
    chosen += draw(logs, number - len(chosen), generator(options, decision))
    scores = probabilities(logs)
    decide_at = next_decision(ground, evidence.step, EVERY)
    kept = {"sizes": sizes, "decision": decision}
    return Revision(go_on(plan, evidence.step, ground.train_layers(chosen), decide_at), scores, kept)


def scaled(sizes: Mapping[str, float], temperature: float | None) -> dict[str, float]:
    """m / tau in the order of the sizes; without a temperature it is their mean."""
    tau = temperature or mean(sizes.values()) or 1.0
    return {name: size / tau for name, size in sizes.items()}


def probabilities(logs: Mapping[str, float]) -> dict[str, float]:
    """Their softmax."""
    largest = max(logs.values())
    weights = {name: math.exp(value - largest) for name, value in logs.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _sweep(ground: Ground) -> list[str]:
    return shuffled(ground.layers, generator(ground.options, 0))


RULE = Rule(frozenset({"gradient"}), begin, decide)
