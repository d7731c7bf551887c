"""The learning rate as a function of the step. The loop owns it, so groups that come and go can never be left stale."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from transformers import get_scheduler

from dsfreeze.recipe import TrainOptions


def warmup_steps(options: TrainOptions, total_steps: int) -> int:
    """`warmup_steps`, or `warmup_ratio` of the run rounded up (transformers' rule)."""
    return options.warmup_steps or math.ceil(options.warmup_ratio * total_steps)


def learning_rate_schedule(options: TrainOptions, total_steps: int) -> Callable[[int], float]:
    """f(step) -> learning rate of the step (counted from 0), by transformers' own function of that name."""
    carrier = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup = warmup_steps(options, total_steps)
    scheduler = get_scheduler(options.lr_scheduler_type, carrier, warmup, total_steps)
    (factor,) = scheduler.lr_lambdas
    return lambda step: options.learning_rate * factor(step)
