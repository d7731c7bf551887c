"""After Tang 2024 (Electronics 13(11):2140): the front layer freezes when its gradient has become small."""

from __future__ import annotations

from dsfreeze.plan import FreezePlan
from dsfreeze.strategies.adaptive.common import (
    Ground,
    Memory,
    Rule,
    front,
    go_on,
    gradients_of,
    next_decision,
    start,
    train_from,
)  # fmt: skip
from dsfreeze.strategies.evidence import Evidence, Revision

EVERY = 20


def begin(ground: Ground) -> FreezePlan:
    """All layers train. The first measurement is its own maximum, so the earliest switch is at the second."""
    every = ground.every(EVERY)
    trainable = ground.train_layers(ground.layers)
    return start(ground, trainable, state="clear", decide_at=every, first=2 * every)


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Freeze one more layer when the front one's mean |g| is below its share of the largest so far."""
    found = gradients_of(ground, ground.active(plan), evidence)
    now = {name: g.l1 / (max(1, g.steps) * ground.numel(name)) for name, g in found.items()}
    largest = {name: max(value, memory.get("largest", {}).get(name, 0.0)) for name, value in now.items()}
    scores = {name: value / largest[name] if largest[name] else 1.0 for name, value in now.items()}
    first = front(ground, plan)
    if first + 1 < len(ground.layers) and scores[list(ground.layers)[first]] < ground.options.threshold:
        first += 1
    decide_at = next_decision(ground, evidence.step, EVERY)
    return Revision(go_on(plan, evidence.step, train_from(ground, first), decide_at), scores, {"largest": largest})


RULE = Rule(frozenset({"gradient"}), begin, decide)
