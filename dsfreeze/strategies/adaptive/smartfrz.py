"""The label rule of SmartFRZ (arXiv 2401.16720): front layers freeze when their similarity to the start model holds still."""

from __future__ import annotations

from statistics import pvariance

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
    """All layers train until a window is full."""
    every = ground.every(EVERY)
    trainable = ground.train_layers(ground.layers)
    earliest, keys = every * ground.options.window, "freeze.switch_every or freeze.window"
    return start(ground, trainable, state="clear", decide_at=every, first=earliest, keys=keys)


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Freeze from the front on while the CKA of a full window varies little and is not low."""
    options = ground.options
    history = {n: [*memory.get("cka", {}).get(n, []), _cka(n, evidence)] for n in ground.active(plan)}
    history = {name: values[-options.window :] for name, values in history.items()}
    scores = {name: pvariance(values) for name, values in history.items()}
    first, names = front(ground, plan), list(ground.layers)
    while first + 1 < len(names) and is_settled(history[names[first]], options):
        first += 1
    kept = {name: values for name, values in history.items() if name in names[first:]}
    decide_at = next_decision(ground, evidence.step, EVERY)
    return Revision(go_on(plan, evidence.step, train_from(ground, first), decide_at), scores, {"cka": kept})


def is_settled(values: list[float], options: FreezeOptions) -> bool:
    full = len(values) == options.window
    return full and pvariance(values) < options.variance and values[-1] > options.min_cka


def _cka(layer: str, evidence: Evidence) -> float:
    value = evidence.similarities[layer].cka
    check_finite(layer, evidence, value)
    return value


RULE = Rule(frozenset({"activations"}), begin, decide)
