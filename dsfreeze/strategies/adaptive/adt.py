"""ADT (Hwang et al. 2025): every layer trains for a few steps, then those that moved most (`adt_h`) or least (`adt_l`)
freeze for the rest of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.ranking import STABLE, spearman
from dsfreeze.strategies.adaptive.common import Ground, Memory, Rule, check_finite, go_on, gradients_of, start
from dsfreeze.strategies.evidence import Evidence, Revision
from dsfreeze.strategies.selection import number_frozen


def begin(ground: Ground) -> FreezePlan:
    """All layers train until the tracking ends, or until the middle of it where stability is checked."""
    options = ground.options
    _number(ground)
    end = options.track_steps
    middle = math.ceil(end / 2) if options.stability_check else end
    trainable = ground.train_layers(ground.layers)
    return start(ground, trainable, state="clear", decide_at=middle, first=end, keys="freeze.track_steps")


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Rank the layers by how far they moved; at the end of the tracking, freeze."""
    options = ground.options
    squared = _squared(ground, evidence, memory.get("squared", {}))
    scores = {name: _score(ground, name, squared[name], evidence) for name in ground.layers}
    if evidence.step < options.track_steps:
        same = go_on(plan, evidence.step, plan.phases[-1].trainable, options.track_steps)
        return Revision(same, scores, {"squared": squared, "scores": scores})
    direction = -1 if options.strategy == "adt_h" else 1
    ranked = sorted(ground.layers, key=lambda name: direction * scores[name])  # stable: ties freeze from the bottom
    kept = set(ranked[_number(ground) :])
    notes = _stability(memory.get("scores", {}), scores, options.track_steps)
    return Revision(go_on(plan, evidence.step, ground.train_layers(kept), None, notes), scores)


def _number(ground: Ground) -> int:
    """How many layers freeze; UserError when none would be left."""
    total = len(ground.layers)
    number = number_frozen(ground.options, total, "the model's list of layers", 0.5)
    if number == total:
        raise UserError(
            f"Strategy '{ground.options.strategy}' would freeze all {total} layers of {ground.anatomy.name}. "
            f"Write a freeze.count below {total}; strategy 'bottom' with fraction 1.0 freezes them all without tracking."
        )
    return number


def _squared(ground: Ground, evidence: Evidence, before: Mapping[str, float]) -> dict[str, float]:
    """Each layer's squared distance from its start, or its squared gradients since the start of the run."""
    if ground.options.measure == "grad_l2":
        found = gradients_of(ground, ground.layers, evidence)
        return {name: before.get(name, 0.0) + gradient.squared for name, gradient in found.items()}
    result = {n: sum(evidence.changes[t.name].squared for t in tensors) for n, tensors in ground.layers.items()}
    for name, value in result.items():
        check_finite(name, evidence, value)
    return result


def _score(ground: Ground, layer: str, squared: float, evidence: Evidence) -> float:
    if ground.options.measure == "rms":
        return math.sqrt(squared / ground.numel(layer))
    if ground.options.measure != "rel_l2":
        return math.sqrt(squared)
    at_start = sum(evidence.changes[t.name].start_squared for t in ground.layers[layer])
    if not at_start:
        raise UserError(
            f"freeze.measure is 'rel_l2', but {layer} starts at zero, so nothing can be relative to it. Use 'rms'."
        )
    return math.sqrt(squared / at_start)


def _stability(before: Mapping[str, float], now: Mapping[str, float], steps: int) -> tuple[str, ...]:
    """A note when the ranking halfway through the tracking was another one."""
    if not before:
        return ()
    agreement = spearman([before[name] for name in now], list(now.values()))
    if agreement >= STABLE:
        return ()
    return (
        f"the ranking of layers is not stable: Spearman {agreement:.2f} between the steps {math.ceil(steps / 2)} and "
        f"{steps}, below {STABLE}; a larger freeze.track_steps may help",
    )


RULE = Rule(frozenset({"change"}), begin, decide)
