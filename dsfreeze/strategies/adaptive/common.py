"""What the adaptive rules share: the layers they choose among, the plans they make, what they read from the evidence."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from dsfreeze.anatomy import Anatomy, Tensor
from dsfreeze.errors import UserError
from dsfreeze.plan import Adapter, FreezePlan, Phase, StateRule
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.adapters import adapter_names, left_out, make_adapter
from dsfreeze.strategies.ends import apply_options, auto_ends, describe_ends
from dsfreeze.strategies.evidence import Evidence, Gradient, Measure, Revision
from dsfreeze.strategies.moving import state_rule

Memory = Mapping[str, Any]


@dataclass(frozen=True)
class Ground:
    """What a rule moves on: its options, how long the run is, the adapted anatomy, and of each transformer layer the tensors that may train (with
    adapters, the adapters' own; a layer that holds none is left out)."""

    options: FreezeOptions
    num_steps: int | None
    adapter: Adapter | None
    anatomy: Anatomy
    layers: Mapping[str, tuple[Tensor, ...]]

    @classmethod
    def of(cls, anatomy: Anatomy, options: FreezeOptions, num_steps: int | None) -> Ground:
        """UserError when there is no layer to choose."""
        adapter = own = None
        if options.adapter is not None:
            every = frozenset(t.name for t in anatomy.block_tensors)
            adapter = make_adapter(anatomy, options.adapter, every)
            anatomy = anatomy.with_adapters(adapter.targets, adapter.r, adapter.kind == "dora")
            own = adapter_names(anatomy, adapter.targets)
        layers = {
            layer.name: tuple(t for t in layer.tensors if own is None or t.name in own) for layer in anatomy.blocks
        }
        layers = {name: tensors for name, tensors in layers.items() if tensors}
        if not layers:
            raise UserError(
                f"Strategy '{options.strategy}' chooses among transformer layers, and {anatomy.name} has none. "
                "Use strategy 'full' or 'patterns'."
            )
        return cls(options, num_steps, adapter, anatomy, layers)

    def every(self, default: int) -> int:
        """Steps from one decision to the next."""
        return self.options.switch_every or default

    def numel(self, layer: str) -> int:
        return sum(t.numel for t in self.layers[layer])

    def train_layers(self, layers: Iterable[str]) -> tuple[str, ...]:
        """The tensors that train with those layers: theirs, and the ends as every strategy has them."""
        return self.train(frozenset(t.name for layer in layers for t in self.layers[layer]))

    def train(self, tensors: frozenset[str], kept: frozenset[str] | None = None) -> tuple[str, ...]:
        """The same for tensors; of the ends, `kept` and the task's head alone where it is given."""
        ends = auto_ends(self.anatomy, tensors, kept=kept, adapter=self.adapter is not None)
        return self.anatomy.in_order(apply_options(self.anatomy, self.options, tensors | ends))

    def active(self, plan: FreezePlan) -> list[str]:
        """The layers of which something trains in the last phase."""
        trained = set(plan.phases[-1].trainable)
        return [name for name, tensors in self.layers.items() if any(t.name in trained for t in tensors)]


@dataclass(frozen=True)
class Rule:
    """An adaptive strategy. `begin` makes the plan up to the first decision; at each `plan.decide_at`, `decide` takes that
    plan, what `needs` names measured, and the memory that the last decision left (empty at first)."""

    needs: frozenset[Measure]
    begin: Callable[[Ground], FreezePlan]
    decide: Callable[[Ground, FreezePlan, Evidence, Memory], Revision]

    def initial(self, anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
        return self.begin(Ground.of(anatomy, options, num_steps))

    def revise(
        self, anatomy: Anatomy, options: FreezeOptions, num_steps: int | None, plan: FreezePlan, evidence: Evidence,
        memory: Memory,
    ) -> Revision:  # fmt: skip
        return self.decide(Ground.of(anatomy, options, num_steps), plan, evidence, memory)


# -- plans ---------------------------------------------------------------------------------------------------------


def start(
    ground: Ground, trainable: tuple[str, ...], *, state: StateRule, decide_at: int, first: int | None = None,
    keys: str = "freeze.switch_every",
) -> FreezePlan:  # fmt: skip
    """The plan up to `decide_at`; UserError when the run ends before `first`, when the set may change at the earliest
    (None: at `decide_at`). `keys` are what the user could lower."""
    options, num_steps = ground.options, ground.num_steps
    first = decide_at if first is None else first
    if num_steps is not None and first >= num_steps:
        raise UserError(
            f"Strategy '{options.strategy}' can first change what trains after step {first}, and the run has only "
            f"{num_steps} steps. Lengthen it (train.max_steps), or lower {keys}."
        )
    notes = describe_ends(ground.anatomy, frozenset(trainable))
    if options.adapter is not None:
        notes += left_out(ground.anatomy, options.adapter)
    return FreezePlan(
        options.strategy,
        (Phase(0, None, trainable),),
        ground.adapter,
        notes,
        state=state_rule(options, state),
        drop_master=options.drop_master,
        rewarmup_steps=options.rewarmup_steps,
        decide_at=decide_at,
    )


def go_on(
    plan: FreezePlan, step: int, trainable: tuple[str, ...], decide_at: int | None, notes: tuple[str, ...] = ()
) -> FreezePlan:
    """The plan whose tensors from `step` on are those given; a set that does not change does not begin a phase."""
    assert plan.decide_at == step, "a decision is taken when it is due"
    phases, last = plan.phases, plan.phases[-1]
    if trainable != last.trainable:
        phases = (*phases[:-1], replace(last, num_steps=step - last.first_step), Phase(step, None, trainable))
    return replace(plan, phases=phases, decide_at=decide_at, notes=plan.notes + notes)


def next_decision(ground: Ground, step: int, default: int) -> int | None:
    """The step of the next decision, None when the run is over by then."""
    due = step + ground.every(default)
    return due if ground.num_steps is None or due < ground.num_steps else None


# -- a frozen front ------------------------------------------------------------------------------------------------


def front(ground: Ground, plan: FreezePlan) -> int:
    """How many layers in front of the first one that trains are frozen."""
    return list(ground.layers).index(ground.active(plan)[0])


def train_from(ground: Ground, first: int) -> tuple[str, ...]:
    """The tensors that train when the first so many layers are frozen; the last layer always trains."""
    assert first < len(ground.layers), "a rule stops at the last layer"
    return ground.train_layers(list(ground.layers)[first:])


# -- evidence ------------------------------------------------------------------------------------------------------


def gradients_of(ground: Ground, layers: Iterable[str], evidence: Evidence) -> dict[str, Gradient]:
    """Each layer's gradients, summed over its tensors; UserError when one is no finite number."""
    return {name: _summed([gradient_of(t.name, evidence) for t in ground.layers[name]]) for name in layers}


def gradient_of(tensor: str, evidence: Evidence) -> Gradient:
    """A tensor's gradients, zero where it had none; UserError when they are no finite numbers."""
    gradient = evidence.gradients.get(tensor, Gradient())
    check_finite(tensor, evidence, gradient.l1, gradient.l2, gradient.squared)
    return gradient


def check_finite(name: str, evidence: Evidence, *values: float) -> None:
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"What was measured of {name} by step {evidence.step} is not finite ({values[0]}): the training has "
            "diverged, and no choice of layers can rest on it. Lower train.learning_rate, or add warm-up."
        )


def rms_over_steps(gradient: Gradient) -> float:
    """The root, over the steps, of the mean squared norm."""
    return math.sqrt(gradient.squared / max(1, gradient.steps))


def _summed(parts: Collection[Gradient]) -> Gradient:
    return Gradient(
        sum(p.l1 for p in parts), sum(p.l2 for p in parts), sum(p.squared for p in parts),
        max((p.steps for p in parts), default=0),
    )  # fmt: skip


# -- draws ---------------------------------------------------------------------------------------------------------


def generator(options: FreezeOptions, decision: int) -> Random:
    """A generator of its own for each decision, so that a draw depends on nothing but the seed and its number."""
    return Random(f"{options.seed} {decision}")


def draw(log_weights: Mapping[str, float], number: int, random: Random) -> list[str]:
    """`number` names without replacement, each next one in proportion to its weight among those left.

    Adding Gumbel noise to the logarithms and taking the largest is that very law, and no weight is too small for it.
    """
    keys = {name: value - math.log(random.expovariate(1.0) or 1e-300) for name, value in log_weights.items()}
    return sorted(keys, key=lambda name: -keys[name])[:number]


def shuffled(names: Iterable[str], random: Random) -> list[str]:
    result = list(names)
    random.shuffle(result)
    return result
