"""Learning-rate schedulers of an engine whose parameter groups change.

torch's and DeepSpeed's schedulers hold lists with one entry per group. Left alone, LambdaLR raises `zip()` and the
WarmupLR family leaves new groups at a stale rate. Our own loop uses none: it writes lr = f(step) to every group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

#: Attributes that hold one value per parameter group.
PER_GROUP = ("base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "delta_lrs", "org_lrs", "eta_mins")
_FIRST = "_dsfreeze_first_groups"


def follow_groups(engine: Any, origins: Sequence[int]) -> None:
    """Stretch the lists of the engine's scheduler, if it has one, to the new groups.

    origins: for each group of the optimizer now, the number of the group that its tensors had when the scheduler was
    made. A group that was away takes the rate of now, where the scheduler can tell it.
    """
    scheduler = getattr(engine, "lr_scheduler", None)
    if scheduler is None:
        return
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    if not hasattr(scheduler, _FIRST):
        count = max(len(value) for name in PER_GROUP if isinstance(value := getattr(scheduler, name, None), list))
        lists = {name: list(value) for name in PER_GROUP if isinstance(value := getattr(scheduler, name, None), list)}
        setattr(scheduler, _FIRST, {name: value for name, value in lists.items() if len(value) == count})
    for name, first in getattr(scheduler, _FIRST).items():
        setattr(scheduler, name, [first[origin] for origin in origins])
    for group, rate in zip(engine.basic_optimizer.param_groups, _rates_now(scheduler), strict=False):
        group["lr"] = rate
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in engine.basic_optimizer.param_groups]


def _rates_now(scheduler: Any) -> list[float]:
    """The rates of all groups, for schedulers whose `get_lr` is a function of the step alone."""
    if hasattr(scheduler, "lr_lambdas"):
        return [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
    if hasattr(scheduler, "last_batch_iteration") and hasattr(scheduler, "min_lrs"):
        return list(scheduler.get_lr())
    return []
