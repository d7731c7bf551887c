"""Learning-rate schedulers of an engine whose parameter groups change.

torch's and DeepSpeed's schedulers hold lists with one entry per group. Left alone, LambdaLR raises `zip()` and the
WarmupLR family leaves new groups at a stale rate. Our own loop uses none: it writes lr = f(step) to every group.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

#: Attributes that may hold one value per parameter group.
PER_GROUP = (
    "base_lrs", "lr_lambdas", "min_lrs", "max_lrs", "delta_lrs", "org_lrs", "min_lr", "min_moms", "max_moms",
    "base_momentums", "max_momentums",
)  # fmt: skip
_FIRST = "_dsfreeze_first_groups"


def follow_groups(engine: Any, origins: Sequence[int], away: Sequence[bool]) -> None:
    """Stretch the lists of the engine's scheduler, if it has one, to the new groups.

    origins: for each group of the optimizer now, the number of the group that its tensors had when the scheduler was
    made. away: whether nothing of that group trained until now; such a group takes the rate of now, where the scheduler
    can tell it, and the user is warned where it cannot.
    """
    scheduler = getattr(engine, "lr_scheduler", None)
    if scheduler is None:
        return
    scheduler = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    _stretch(scheduler, origins)
    groups = engine.basic_optimizer.param_groups
    rates = _rates_now(scheduler)
    if any(away) and not rates:
        warnings.warn(
            f"{type(scheduler).__name__} does not tell rates as a function of the step: tensors of a parameter group that was away "
            "as a whole go on at the rate with which they left. Write it to engine.optimizer.param_groups, or use a scheduler "
            "with a closed form (LambdaLR, CosineAnnealingLR, DeepSpeed's own).",
            stacklevel=2,
        )
    for group, rate, was_away in zip(groups, rates or [None] * len(groups), away, strict=True):
        if was_away and rate is not None:
            group["lr"] = rate
    if hasattr(scheduler, "_last_lr"):
        scheduler._last_lr = [group["lr"] for group in groups]


def _stretch(scheduler: Any, origins: Sequence[int]) -> None:
    for inner in getattr(scheduler, "_schedulers", ()):  # SequentialLR, ChainedScheduler
        _stretch(inner, origins)
    if not hasattr(scheduler, _FIRST):
        lists = {name: list(v) for name in PER_GROUP if isinstance(v := getattr(scheduler, name, None), list | tuple)}
        setattr(scheduler, _FIRST, lists)
    for name, first in getattr(scheduler, _FIRST).items():
        setattr(scheduler, name, [first[origin] for origin in origins])


def _rates_now(scheduler: Any) -> Sequence[float | Tensor | None]:
    """The rates of all groups, for schedulers that know them as a function of the step; [] for others."""
    if hasattr(scheduler, "_milestones"):  # SequentialLR
        return _rates_now(scheduler._schedulers[bisect_right(scheduler._milestones, scheduler.last_epoch)])
    if isinstance(scheduler, LambdaLR):
        rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        return [base * factor(scheduler.last_epoch) for base, factor in rates]
    if hasattr(scheduler, "_get_closed_form_lr"):
        return list(scheduler._get_closed_form_lr())
    if hasattr(scheduler, "last_batch_iteration"):  # DeepSpeed's
        return list(scheduler.get_lr())
    return []
