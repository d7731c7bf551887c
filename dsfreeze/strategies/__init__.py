"""Strategies: which tensors train, and when, as pure functions from an anatomy and options to a plan.

`STRATEGIES` is the list of them; `make_plan` is how everything else calls them. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.setting import Setting
from dsfreeze.strategies import budgeted, half, progressive, rotating, salf, static
from dsfreeze.strategies.adaptive import ADAPTIVE
from dsfreeze.strategies.mask_file import with_masks

#: (anatomy without adapters, options, optimizer steps of the run or None) -> plan
Strategy = Callable[[Anatomy, FreezeOptions, int | None], FreezePlan]

STRATEGIES: dict[str, Strategy] = {
    "full": static.full,
    "head": static.head,
    "bottom": static.bottom,
    "top": static.top,
    "interval": static.interval,
    "random": static.random,
    "middle": static.middle,
    "ranked": static.ranked,
    "budget": budgeted.budget,
    "salf": salf.salf,
    "half": half.half,
    "patterns": static.patterns,
    "bitfit": static.bitfit,
    "norms": static.norms,
    "attention": static.attention,
    "lora": static.lora,
    "dora": static.dora,
    "lisa": rotating.lisa,
    "badam": rotating.badam,
    "hift": rotating.hift,
    "owlore": rotating.owlore,
    "sweep": progressive.sweep,
    "gradual_unfreezing": progressive.gradual_unfreezing,
    "freezeout": progressive.freezeout,
    "step_ranges": progressive.step_ranges,
    **{name: rule.initial for name, rule in ADAPTIVE.items()},
}


def make_plan(
    anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None, setting: Setting | None = None
) -> FreezePlan:
    """The plan that the options ask for; UserError when they contradict the model (among each other, `FreezeOptions`
    has checked them).

    `num_steps`, the length of the run, matters to strategies that move; a static plan has one open phase. `setting`, where
    it runs, matters to `budget` alone.
    """
    if options.strategy not in STRATEGIES:
        raise UserError(f"There is no strategy '{options.strategy}'.{did_you_mean(options.strategy, STRATEGIES)}")
    if options.strategy == "budget":
        plan = budgeted.budget(anatomy, options, num_steps, setting)
    else:
        plan = STRATEGIES[options.strategy](anatomy, options, num_steps)
    return plan if options.mask_file is None else with_masks(plan, anatomy, options.mask_file)
