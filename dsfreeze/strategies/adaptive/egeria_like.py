"""After Egeria (arXiv 2201.06227): the front layer freezes when what it computes has stopped moving away from what it
computed at the start; everything thaws when the learning rate has dropped."""

from __future__ import annotations

from statistics import linear_regression

from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.adaptive.common import (
    Ground,
    Memory,
    Rule,
    check_finite,
    front,
    go_on,
    next_decision,
    start,
    train_from,
)  # fmt: skip
from dsfreeze.strategies.evidence import Evidence, Revision

EVERY = 5


def begin(ground: Ground) -> FreezePlan:
    """All layers train until a window is full and was flat often enough."""
    options = ground.options
    every = ground.every(EVERY)
    earliest = every * (options.window + options.hits - 1)
    trainable = ground.train_layers(ground.layers)
    keys = "freeze.switch_every, freeze.window or freeze.hits"
    return start(ground, trainable, state="clear", decide_at=every, first=earliest, keys=keys)


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Watch the front layer's plasticity; freeze it after enough flat windows in a row; thaw on a drop of the rate.

    Memory: the front layer's plasticities of the window, its flat windows, the learning rate at the first freeze.
    """
    options = ground.options
    first, names = front(ground, plan), list(ground.layers)
    plasticity = {name: evidence.similarities[name].plasticity for name in ground.active(plan)}
    for name, value in plasticity.items():
        check_finite(name, evidence, value)
    trend = [*memory.get("trend", []), plasticity[names[first]]][-options.window :]
    hits = memory.get("hits", 0) + 1 if is_flat(trend, options) else 0
    rate = memory.get("rate")
    if rate is not None and options.thaw_factor and evidence.learning_rate <= rate / options.thaw_factor:
        first, trend, hits, rate = 0, [], 0, None
    elif hits >= options.hits and first + 1 < len(names):
        first, trend, hits = first + 1, [], 0
        rate = evidence.learning_rate if rate is None else rate
    decide_at = next_decision(ground, evidence.step, EVERY)
    kept = {"trend": trend, "hits": hits, "rate": rate}
    return Revision(go_on(plan, evidence.step, train_from(ground, first), decide_at), plasticity, kept)


def is_flat(trend: list[float], options: FreezeOptions) -> bool:
    """Whether the window is full and a straight line through it is flatter than freeze.slope."""
    if len(trend) < options.window:
        return False
    return abs(linear_regression(range(len(trend)), trend).slope) < options.slope


RULE = Rule(frozenset({"activations"}), begin, decide)
