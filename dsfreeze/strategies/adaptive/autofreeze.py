"""AutoFreeze (arXiv 2102.01386): the front layers whose gradient has stopped changing freeze."""

from __future__ import annotations

from collections.abc import Collection

from dsfreeze.errors import UserError
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

#: Intervals in a run where freeze.switch_every does not say how long one is (the authors' code; their README has 20).
INTERVALS = 10


def begin(ground: Ground) -> FreezePlan:
    """All layers train for the two intervals that the first decision compares."""
    every = _every(ground)
    trainable = ground.train_layers(ground.layers)
    return start(ground, trainable, state="clear", decide_at=every, first=2 * every)


def decide(ground: Ground, plan: FreezePlan, evidence: Evidence, memory: Memory) -> Revision:
    """Freeze everything in front of the first layer whose relative change reaches the percentile.

    Only layers that still train count: a frozen one has no change, which would pull the threshold to zero.
    """
    now = {name: g.l1 for name, g in gradients_of(ground, ground.active(plan), evidence).items()}
    before = memory.get("l1", {})
    change = {name: relative_change(before[name], value) for name, value in now.items() if name in before}
    first = front(ground, plan)
    if change:
        threshold = percentile(change.values(), ground.options.percentile)
        first = next(i for i, name in enumerate(ground.layers) if change.get(name, -1.0) >= threshold)
    decide_at = next_decision(ground, evidence.step, _every(ground))
    return Revision(go_on(plan, evidence.step, train_from(ground, first), decide_at), change or now, {"l1": now})


def _every(ground: Ground) -> int:
    if ground.options.switch_every is not None:
        return ground.options.switch_every
    if ground.num_steps is None:
        raise UserError(
            f"Strategy 'autofreeze' divides the run into {INTERVALS} intervals and must know how long it is; "
            "set train.max_steps, or the steps of an interval, freeze.switch_every."
        )
    return max(1, ground.num_steps // INTERVALS)


def relative_change(before: float, now: float) -> float:
    """|before - now| / before; a gradient that comes out of nothing has changed wholly."""
    return abs(before - now) / before if before else float(now > 0)


def percentile(values: Collection[float], percent: float) -> float:
    """The percentile, linear between neighbours as numpy's; never above the largest value."""
    ordered = sorted(values)
    below, part = divmod(percent / 100 * (len(ordered) - 1), 1)
    low, high = ordered[int(below)], ordered[min(int(below) + 1, len(ordered) - 1)]
    return min(high, low + (high - low) * part)


RULE = Rule(frozenset({"gradient"}), begin, decide)
