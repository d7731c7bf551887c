"""What strategies that move have in common: the run's length, the units that take turns, the state rule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, StateRule
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.adapters import make_adapter
from dsfreeze.strategies.building import Stage, build_plan
from dsfreeze.strategies.ends import end_names, is_task_head
from dsfreeze.strategies.selection import Unit, units

#: Adam's first steps after a cleared state are about lr * sign(g); after 1 / (1 - beta1) of them it has found its way.
SETTLED_AFTER = 10


def run_length(options: FreezeOptions, num_steps: int | None) -> int:
    """The steps of the run; UserError when they are not known."""
    if num_steps is None:
        raise UserError(f"strategy '{options.strategy}' must know how long the run is; set train.max_steps")
    return num_steps


def moving_units(anatomy: Anatomy, options: FreezeOptions) -> tuple[Unit, ...]:
    """The layers or matrices that take turns, in model order; with adapters, those that can hold one."""
    if options.adapter is None:
        return units(anatomy, options.granularity)
    everything = frozenset(t.name for t in anatomy.block_tensors)
    return units(anatomy, options.granularity, frozenset(make_adapter(anatomy, options.adapter, everything).targets))


def number_active(options: FreezeOptions, pool: Sequence[object], default: int) -> int:
    """How many units train at once: as asked, else the method's own as far as the model has them."""
    asked = options.active_layers
    if asked is not None and asked > len(pool):
        raise UserError(
            f"freeze.active_layers is {asked}, but there are only {len(pool)} units to choose from "
            f"(freeze.granularity {options.granularity}). Write 1 to {len(pool)}."
        )
    return min(default, len(pool)) if asked is None else asked


def task_head(anatomy: Anatomy) -> frozenset[str]:
    """A head that starts from random numbers, which must train in every phase; nothing when it is not of that kind."""
    return end_names(anatomy, "head") if is_task_head(anatomy) else frozenset()


def shared_out(options: FreezeOptions, num_steps: int, parts: int, what: str) -> list[tuple[int, int]]:
    """The run in equal parts, as (first step, number of steps); they differ by one step at most."""
    if num_steps < parts:
        raise UserError(
            f"strategy '{options.strategy}' has {parts} {what}, but the run has only {num_steps} steps: each needs one "
            "at least. Raise train.max_steps or freeze.active_layers."
        )
    starts = [part * num_steps // parts for part in range(parts + 1)]
    return [(first, after - first) for first, after in pairwise(starts)]


def state_rule(options: FreezeOptions, own: StateRule) -> StateRule:
    """freeze.state, or the method's own rule; UserError when freeze.drop_master does not go with it."""
    rule: StateRule = own if options.state == "auto" else options.state
    if options.drop_master and rule != "clear":
        raise UserError(
            f"freeze.drop_master goes with freeze.state 'clear'; strategy '{options.strategy}' has '{rule}' here. "
            "Write both, or neither."
        )
    return rule


def moving_plan(
    anatomy: Anatomy, options: FreezeOptions, stages: Sequence[Stage], notes: tuple[str, ...] = (), *,
    state: StateRule, pool: Sequence[Unit] = (),
) -> FreezePlan:  # fmt: skip
    """The plan of stages that may bring back what stopped; `state` is the method's own rule, which the options may override; all units of `pool`
    get adapters where adapters are asked for, whether or not their turn comes."""
    return build_plan(
        anatomy, options, stages, notes, state=state_rule(options, state), drop_master=options.drop_master,
        rewarmup_steps=options.rewarmup_steps,
        adaptable=frozenset(name for unit in pool for name in unit.tensors),
    )  # fmt: skip


def unsettled(options: FreezeOptions, state: StateRule, shortest: int) -> tuple[str, ...]:
    """A note when state is cleared so often that Adam hardly leaves its first steps."""
    if state_rule(options, state) != "clear" or shortest >= SETTLED_AFTER:
        return ()
    return (
        f"cleared state and {shortest} steps a turn: Adam's first steps after it are about lr * sign(gradient) on every "
        f"element; give each turn {SETTLED_AFTER} steps or more, or write freeze.state=keep",
    )
