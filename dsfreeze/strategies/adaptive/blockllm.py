"""After BlockLLM: the few tensors with the largest gradients for how often they were visited, chosen anew when the loss
stalls."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import mean

from dsfreeze.plan import FreezePlan
from dsfreeze.strategies.adaptive.common import (
    Ground,
    Memory,
    Rule,
    generator,
    go_on,
    gradient_of,
    next_decision,
    rms_over_steps,
    shuffled,
    start,
)  # fmt: skip
from dsfreeze.strategies.ends import end_names
from dsfreeze.strategies.evidence import Evidence, Revision

EVERY = 100


def begin(ground: Ground) -> FreezePlan:
    """Nothing is known of any tensor: the first ones are drawn, as the authors' code does."""
    options = ground.options
    chosen = _take(ground, shuffled(_tensors(ground), generator(options, 0)))
    every = ground.every(EVERY)
    earliest = every * (options.patience // every + 1)  # the first decision that has more losses than the latest
    keys = "freeze.switch_every or freeze.patience"
    return start(ground, _train(ground, chosen), state="clear", decide_at=every, first=earliest, keys=keys)


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Go on while the loss falls, else rank all tensors and choose anew.

    Memory: each visited tensor's gradient norm when it last trained, in how many rounds it did, the number of rounds,
    and of the losses since the last choice the sum, the number and the latest.
    """
    options = ground.options
    tensors = _tensors(ground)
    trained = [name for name in plan.phases[-1].trainable if name in tensors]
    norms = {**memory.get("norms", {}), **{name: rms_over_steps(gradient_of(name, evidence)) for name in trained}}
    visits, rounds = dict(memory.get("visits", dict.fromkeys(trained, 1))), memory.get("rounds", 1)
    total, number = memory.get("total", 0.0) + sum(evidence.losses), memory.get("number", 0) + len(evidence.losses)
    latest = [*memory.get("latest", []), *evidence.losses][-options.patience :]
    scores = {name: norms[name] / (visits[name] / rounds) for name in norms}
    trainable = plan.phases[-1].trainable
    if number > options.patience and total / number <= mean(latest):
        rounds += 1
        unvisited = shuffled((name for name in tensors if name not in norms), generator(options, rounds))
        chosen = _take(ground, [*unvisited, *sorted(norms, key=lambda name: -scores[name])])
        visits |= {name: visits.get(name, 0) + 1 for name in chosen}
        trainable, total, number, latest = _train(ground, chosen), 0.0, 0, []
    decide_at = next_decision(ground, evidence.step, EVERY)
    kept = {"norms": norms, "visits": visits, "rounds": rounds, "total": total, "number": number, "latest": latest}
    return Revision(go_on(plan, evidence.step, trainable, decide_at), scores, kept)


def _tensors(ground: Ground) -> dict[str, int]:
    """The elements of every tensor of the layers."""
    return {t.name: t.numel for tensors in ground.layers.values() for t in tensors}


def _take(ground: Ground, ordered: Iterable[str]) -> list[str]:
    """The first tensors of the list that together hold the share of elements to train; at least one."""
    numel = _tensors(ground)
    wanted, taken = (1 - ground.options.sparsity) * sum(numel.values()), 0
    chosen: list[str] = []
    for name in ordered:
        if chosen and taken >= wanted:
            break
        chosen.append(name)
        taken += numel[name]
    return chosen


def _train(ground: Ground, chosen: Iterable[str]) -> tuple[str, ...]:
    """Of the ends the norm and a task's head train beside the chosen: the method keeps embedding and head frozen."""
    return ground.train(frozenset(chosen), kept=end_names(ground.anatomy, "norm"))


RULE = Rule(frozenset({"gradient"}), begin, decide)
