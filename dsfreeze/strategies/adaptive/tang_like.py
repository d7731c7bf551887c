"""After Tang 2024 (Electronics 13(11):2140): the front layer freezes when its gradient has become small."""

from __future__ import annotations

from dsfreeze.anatomy import Anatomy
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
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


def initial(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """All layers train. The first measurement is its own maximum, so the earliest switch is at the second."""
    ground = Ground.of(anatomy, options)
    every = options.switch_every or EVERY
    trainable = ground.train_layers(ground.layers)
    return start(ground, trainable, num_steps, state="clear", decide_at=every, first=2 * every)


def revise(
    anatomy: Anatomy, options: FreezeOptions, num_steps: int | None, plan: FreezePlan, evidence: Evidence,
    memory: Memory,
) -> Revision:  # fmt: skip
    """Freeze one more layer when the front one's mean |g| is below its share of the largest so far."""
    ground = Ground.of(anatomy, options)
    found = gradients_of(ground, ground.active(plan), evidence)
    now = {name: g.l1 / (max(1, g.steps) * ground.numel(name)) for name, g in found.items()}
    largest = {name: max(value, memory.get("largest", {}).get(name, 0.0)) for name, value in now.items()}
    scores = {name: value / largest[name] if largest[name] else 1.0 for name, value in now.items()}
    first = front(ground, plan)
    if first + 1 < len(ground.layers) and scores[list(ground.layers)[first]] < options.threshold:
        first += 1
    decide_at = next_decision(evidence.step, options.switch_every or EVERY, num_steps)
    return Revision(go_on(plan, evidence.step, train_from(ground, first), decide_at), scores, {"largest": largest})


RULE = Rule(frozenset({"gradient"}), initial, revise)
