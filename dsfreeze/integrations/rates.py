"""The learning rate in a trainer whose parameter groups come and go.

The trainer's scheduler goes on over a stand-in that has the groups as the trainer made them, so that it never sees one
come or go; before every step, what it says is written to the groups of the moment (lr = f(step) x the layer's scale).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine.schedulers import PER_GROUP
from dsfreeze.errors import UserError
from dsfreeze.integrations.grouping import Grouping
from dsfreeze.plan import FreezePlan
from dsfreeze.schedule import rates_at


class Rates:
    """Takes over a trainer's scheduler: torch's, transformers' or DeepSpeed's, with or without accelerate's wrapper."""

    def __init__(self, scheduler: Any, grouping: Grouping, known: Sequence[int], plan: FreezePlan, anatomy: Anatomy):
        """`known`: the numbers of the trainer's groups that the scheduler was made with, in its order."""
        self.scheduler = getattr(scheduler, "scheduler", scheduler)
        self.plan, self.anatomy, self.grouping = plan, anatomy, grouping
        self._stand_in = _stand_in(grouping)
        if any(phase.lr_step is not None for phase in plan.phases) and not hasattr(self.scheduler, "lr_lambdas"):
            raise UserError(
                f"The plan reads the learning rate of other steps (strategy '{plan.strategy}'), which "
                f"{type(self.scheduler).__name__} cannot tell. Use one of transformers' lr_scheduler_type."
            )
        self._take_over([known.index(n) if n in known else 0 for n in range(len(grouping.hyper))])

    def _take_over(self, origins: Sequence[int]) -> None:
        for name in PER_GROUP:
            if isinstance(values := getattr(self.scheduler, name, None), list):
                setattr(self.scheduler, name, [values[origin] for origin in origins])
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs = self.peaks
        self.scheduler.optimizer = self._stand_in
        self._tell()

    @property
    def peaks(self) -> list[float]:
        return [hyper.get("initial_lr", hyper["lr"]) for hyper in self.grouping.hyper]

    def _tell(self) -> None:
        """Make the stand-in's rates those of the scheduler's step, after it was taken over or loaded."""
        scheduler, groups = self.scheduler, self._stand_in.param_groups
        if hasattr(scheduler, "lr_lambdas"):
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * factor(scheduler.last_epoch) for base, factor in pairs]
        elif hasattr(scheduler, "last_batch_iteration"):
            scheduler._last_lr = list(scheduler.get_lr())
        for group, rate in zip(groups, getattr(scheduler, "_last_lr", ()), strict=False):
            group["lr"] = float(rate)

    def write(self, groups: Sequence[dict[str, Any]], members: Sequence[str], step: int) -> None:
        """The step's learning rate into every group; `members` names a tensor of each."""
        for group, name in zip(groups, members, strict=True):
            number = self.grouping.number[name]
            rate, own = rates_at(self.plan, step, partial(self._at, number, now=step), self.peaks[number])
            group["lr"] = own.get(self.anatomy.layer_of[name].name, rate)

    def write_plain(self, groups: Sequence[dict[str, Any]], members: Sequence[str]) -> None:
        """What the scheduler says and nothing of the plan, so that groups differ in nothing that passes."""
        for group, name in zip(groups, members, strict=True):
            group["lr"] = self._stand_in.param_groups[self.grouping.number[name]]["lr"]

    def _at(self, number: int, step: int, now: int) -> float:
        if step == now:
            return float(self._stand_in.param_groups[number]["lr"])
        return float(self.scheduler.base_lrs[number] * self.scheduler.lr_lambdas[number](step))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)
        self._tell()


def _stand_in(grouping: Grouping) -> torch.optim.Optimizer:
    """An optimizer of one number a group, with the trainer's learning rates; nobody steps it."""
    groups = [{"params": [torch.zeros(1)], "lr": hyper["lr"]} for hyper in grouping.hyper]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    for group, hyper in zip(optimizer.param_groups, grouping.hyper, strict=True):
        group["initial_lr"] = hyper.get("initial_lr", hyper["lr"])
    # torch's schedulers warn of an optimizer that was not stepped before them, or whose step they did not wrap
    stepped: Any = optimizer
    stepped._opt_called, stepped.step = True, _Stepped
    return optimizer


class _Stepped:
    _wrapped_by_lr_sched = True
