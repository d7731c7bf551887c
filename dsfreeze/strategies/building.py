"""From chosen tensors to a plan: the options for the ends, adapters and notes, in one place for every strategy.

A strategy says what trains during which steps (`Stage`); a static one has a single open stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import Adapter, FreezePlan, Mask, Phase, Rate, StateRule
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.adapters import adapter_names, left_out, make_adapter
from dsfreeze.strategies.ends import apply_options, describe_ends


@dataclass(frozen=True)
class Stage:
    """What a strategy trains during these steps, before the options for the ends and adapters are applied."""

    first_step: int
    num_steps: int | None
    trainable: frozenset[str]
    lr_step: int | None = None


def build_plan(
    anatomy: Anatomy, options: FreezeOptions, stages: Sequence[Stage], notes: tuple[str, ...] = (), *,
    state: StateRule = "keep", drop_master: bool = False, rewarmup_steps: int = 0, rates: tuple[Rate, ...] = (),
    adaptable: frozenset[str] = frozenset(), masks: tuple[Mask, ...] = (),
) -> FreezePlan:  # fmt: skip
    """The plan of what the stages and the options train, with adapters in place of matrices where asked; `adaptable`
    tensors get one even if the run ends before they train, so that a longer run has the same adapters.

    Neighbouring stages that train the same tensors become one phase: nothing stops training between them, so no state
    rule has anything to do there.
    """
    wanted = {s: apply_options(anatomy, options, s) for s in dict.fromkeys(stage.trainable for stage in stages)}
    adapter = None
    if options.adapter is not None:
        adapter = make_adapter(anatomy, options.adapter, adaptable.union(*wanted.values()))
        notes += left_out(anatomy, options.adapter)
        wanted, anatomy = _adapted(anatomy, wanted, adapter)
    ordered = {chosen: anatomy.in_order(trainable) for chosen, trainable in wanted.items()}
    if len(stages) > 1:
        _refuse_idle(options, stages, ordered)
    phases = _phases(stages, ordered)
    notes += _described(anatomy, list(wanted.values()))
    return FreezePlan(
        options.strategy, phases, adapter, notes, state, drop_master, rewarmup_steps, rates, masks=_kept(masks, phases)
    )


def _kept(masks: tuple[Mask, ...], phases: tuple[Phase, ...]) -> tuple[Mask, ...]:
    """Those of tensors that train, which the options for the ends may have changed."""
    trained = {name for phase in phases for name in phase.trainable}
    return tuple(mask for mask in masks if mask.tensor in trained)


def _adapted(
    anatomy: Anatomy, wanted: dict[frozenset[str], frozenset[str]], adapter: Adapter
) -> tuple[dict[frozenset[str], frozenset[str]], Anatomy]:
    """The same sets with adapters for the matrices among them, and the anatomy that holds those."""
    outside = frozenset(t.name for layer in anatomy.layers if not layer.is_block for t in layer.tensors)
    adapted = anatomy.with_adapters(adapter.targets, adapter.r, adapter.kind == "dora")
    targets = frozenset(adapter.targets)
    sets = {s: trainable & outside | adapter_names(adapted, targets & trainable) for s, trainable in wanted.items()}
    return sets, adapted


def _refuse_idle(
    options: FreezeOptions, stages: Sequence[Stage], ordered: dict[frozenset[str], tuple[str, ...]]
) -> None:
    idle = next((stage for stage in stages if not ordered[stage.trainable]), None)
    if idle is not None:
        last = "the end" if idle.num_steps is None else f"step {idle.first_step + idle.num_steps - 1}"
        raise UserError(
            f"Strategy '{options.strategy}' trains nothing from step {idle.first_step} to {last}: all that it would "
            "train there is frozen. Look at what freeze.embed, freeze.norm, freeze.head, freeze.adapter and "
            "freeze.step_ranges freeze."
        )


def _phases(stages: Sequence[Stage], ordered: dict[frozenset[str], tuple[str, ...]]) -> tuple[Phase, ...]:
    phases: list[Phase] = []
    for stage in stages:
        names = ordered[stage.trainable]
        before = phases[-1] if phases else None
        if before is not None and before.trainable == names and before.lr_step == stage.lr_step:
            assert before.num_steps is not None, "only the last stage is open"
            length = None if stage.num_steps is None else before.num_steps + stage.num_steps
            phases[-1] = Phase(before.first_step, length, names, before.lr_step)
        else:
            phases.append(Phase(stage.first_step, stage.num_steps, names, stage.lr_step))
    return tuple(phases)


def _described(anatomy: Anatomy, sets: Iterable[frozenset[str]]) -> tuple[str, ...]:
    """The notes on the ends that hold in every phase."""
    first, *others = (describe_ends(anatomy, trainable) for trainable in sets)
    return tuple(note for note in first if all(note in told for told in others))
