"""After AdaGradSelect (arXiv 2512.15764): now the layers with the largest gradients, now a draw that favours those
trained often; exploration fades."""

from __future__ import annotations

import math
from random import Random

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
    """Nothing is known of any layer: the first ones are drawn."""
    options = ground.options
    chosen = generator(options, 0).sample(list(ground.layers), number_active(options, list(ground.layers), ACTIVE))
    return start(ground, ground.train_layers(chosen), state="keep", decide_at=ground.every(EVERY))


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Choose the next layers. Memory: each trained layer's gradient norm when it last trained, and how often it did."""
    options = ground.options
    active = ground.active(plan)
    found = gradients_of(ground, active, evidence)
    norms = {**memory.get("norms", {}), **{name: rms_over_steps(g) for name, g in found.items()}}
    counts = {**memory.get("counts", {})}
    counts |= {name: counts.get(name, 0) + 1 for name in active}
    decision = memory.get("decision", 0) + 1
    random, number = generator(options, decision), number_active(options, list(ground.layers), ACTIVE)
    explores = random.random() < options.epsilon * options.epsilon_decay ** (decision - 1)
    if explores:
        scores = norms
        unknown = shuffled((name for name in ground.layers if name not in norms), random)
        chosen = [*unknown, *sorted(norms, key=lambda name: -norms[name])][:number]
    else:
        scores = {name: float(counts.get(name, 0)) for name in ground.layers}
        chosen = draw(dirichlet(scores, random), number, random)
    decide_at = next_decision(ground, evidence.step, EVERY)
    kept = {"norms": norms, "counts": counts, "decision": decision}
    return Revision(go_on(plan, evidence.step, ground.train_layers(chosen), decide_at), scores, kept)


def dirichlet(counts: dict[str, float], random: Random) -> dict[str, float]:
    """Logarithms of a draw from Dirichlet(count + 1), up to a constant: independent Gamma variates."""
    return {name: math.log(random.gammavariate(count + 1.0, 1.0) or 1e-300) for name, count in counts.items()}


RULE = Rule(frozenset({"gradient"}), begin, decide)
