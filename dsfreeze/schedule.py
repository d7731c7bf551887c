"""The learning rate as a function of the step. The loop owns it, so groups that come and go can never be left stale."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import TrainOptions


def warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """`warmup_steps`, or `warmup_ratio` of the run rounded up (transformers' rule)."""
    return options.warmup_steps or math.ceil(options.warmup_ratio * total_steps)


def rates_at(
    plan: FreezePlan, step: int, schedule: Callable[[int], float], peak: float
) -> tuple[float, dict[str, float]]:
    """The learning rate of a step under a plan, and those of layers that have their own.

    `schedule`: `learning_rate_schedule`; `peak`: the rate that a layer's own cosine starts from. After a switch every
    rate rises linearly over `rewarmup_steps` steps, the first of which has 1 / (rewarmup_steps + 1) of it (ours).
    """
    phase = plan.phase_at(step)
    rise = min(1.0, (step - phase.first_step + 1) / (plan.rewarmup_steps + 1)) if phase.first_step else 1.0
    rate = rise * schedule(step if phase.lr_step is None else phase.lr_step)
    own = {r.layer: r.scale * (rate if r.ends is None else rise * peak * half_cosine(step, r.ends)) for r in plan.rates}
    return rate, own


def half_cosine(step: int, ends: int) -> float:
    """(1 + cos(pi step / ends)) / 2 before step `ends`, 0 from there on."""
    return (1 + math.cos(math.pi * step / ends)) / 2 if step < ends else 0.0


def learning_rate_schedule(options: TrainOptions, total_steps: int) -> Callable[[int], float]:
    """f(step) -> learning rate of the step (counted from 0), by transformers' own function of that name."""
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = warmup_steps(options, total_steps)
    scheduler = get_scheduler(options.lr_scheduler_type, carrier, warmup, total_steps)
    (factor,) = scheduler.lr_lambdas
    return lambda step: options.learning_rate * factor(step)
