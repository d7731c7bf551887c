"""What a plan costs before anything runs: bytes per rank for model states (`states`), FLOPs per token against full tuning (`flops`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate.caching import evicted_tensors
from dsfreeze.estimate.flops import flops
from dsfreeze.estimate.states import check_setting, on_device, parked_bytes, state_bytes
from dsfreeze.plan import FreezePlan, Phase


@dataclass(frozen=True)
class Estimate:
    """A plan's cost: bytes on one rank, elements, and FLOPs of one token through forward and backward."""

    weights: int
    gradients: int
    masters: int
    optimizer_state: int
    parked: int
    """State of tensors that trained in an earlier phase and do not in this one."""
    on_host: int
    """Of the bytes above, those in host memory (optimizer offload, parked state)."""
    held: int
    """Elements of the tensors that train: what gradients, masters and optimizer state are of."""
    trainable: int
    """Of these, the elements that train; fewer where the plan has masks."""
    total: int
    forward_flops: int
    backward_flops: int
    full_forward_flops: int
    full_backward_flops: int

    @property
    def percent(self) -> float:
        """Trainable elements, in percent of all."""
        return 100 * self.trainable / self.total

    @property
    def flops_per_token(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def full_flops_per_token(self) -> int:
        """The same for tuning everything, without adapters."""
        return self.full_forward_flops + self.full_backward_flops

    @property
    def flops_ratio(self) -> float:
        return self.flops_per_token / self.full_flops_per_token


def estimate(
    anatomy: Anatomy, plan: FreezePlan, *, stage: int = 2, world_size: int = 1, dtype_bytes: int = 4,
    offload: bool = False, sequence_length: int = 512, phase: Phase | None = None, num_steps: int | None = None,
    evict_prefix: bool = False,
) -> Estimate:  # fmt: skip
    """Price a plan (formulas and what they leave out: above).

    Bytes and elements are those of `phase`, by default the one that holds most on the device, among equals in host
    memory. FLOPs are those of the phase, or the mean over the plan's steps; an open last phase ends at `num_steps`, and counts alone without it.
    `anatomy` may have the plan's adapters in place or not; `dtype_bytes` is that of weights and gradients (2 or 4);
    `sequence_length` is in positions; with `evict_prefix` what lies below all that ever trains is not on the device. UserError for a stage, a world size or an offload that does not exist.
    """
    check_setting(stage, world_size, offload)
    adapted = as_trained(anatomy, plan)
    own = [t for t in adapted.tensors if t.category != "adapter"]
    full_forward, full_backward = flops(adapted, own, frozenset(t.name for t in own), sequence_length)
    forward, backward = _mean_flops(adapted, plan if phase is None else _only(plan, phase), sequence_length, num_steps)
    return Estimate(
        **held_bytes(
            adapted, plan, stage=stage, world_size=world_size, dtype_bytes=dtype_bytes, offload=offload, phase=phase,
            evict_prefix=evict_prefix,
        ),
        total=adapted.numel,
        forward_flops=forward,
        backward_flops=backward,
        full_forward_flops=full_forward,
        full_backward_flops=full_backward,
    )  # fmt: skip


def held_bytes(
    adapted: Anatomy, plan: FreezePlan, *, stage: int, world_size: int, dtype_bytes: int, offload: bool,
    phase: Phase | None = None, evict_prefix: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Those fields of an `Estimate` that depend on stage and ranks, of the phase or of the one that holds most."""
    numel = {t.name: t.numel for t in adapted.tensors}
    trained_of = {t.name: plan.elements_of(t) for t in adapted.tensors}

    def count(names: Iterable[str]) -> int:
        return sum(numel[name] for name in names)

    resident = adapted.numel - (count(evicted_tensors(adapted, plan.ever_trained)) if evict_prefix else 0)

    def bytes_of(priced: Phase, idle: int) -> dict[str, int]:
        trained = count(priced.trainable)
        held = state_bytes(resident, trained, stage, world_size, dtype_bytes, offload)
        parked = parked_bytes(plan, -(-idle // world_size) if stage else idle, dtype_bytes)
        held["on_host"] += parked if offload or plan.state != "keep" else 0
        return {**held, "parked": parked, "held": trained, "trainable": sum(trained_of[n] for n in priced.trainable)}

    chosen = _distinct(plan, count) if phase is None else [(phase, _idle(plan, phase, count))]
    return max((bytes_of(*pair) for pair in chosen), key=lambda held: (on_device(held), held["on_host"]))


def _idle(plan: FreezePlan, phase: Phase, count: Callable[[Iterable[str]], int]) -> int:
    """Elements that trained before the phase and do not train in it."""
    before = {name for earlier in plan.phases if earlier.first_step < phase.first_step for name in earlier.trainable}
    return count(before.difference(phase.trainable))


def _distinct(plan: FreezePlan, count: Callable[[Iterable[str]], int]) -> list[tuple[Phase, int]]:
    """Phases that differ in what they hold, and the elements that each finds trained before and leaves idle."""
    found: dict[tuple[tuple[str, ...], int], Phase] = {}
    before: set[str] = set()
    for phase in plan.phases:
        idle = count(before.difference(phase.trainable))
        found.setdefault((phase.trainable, idle), phase)
        before.update(phase.trainable)
    return [(phase, idle) for (_, idle), phase in found.items()]


def _only(plan: FreezePlan, phase: Phase) -> FreezePlan:
    return replace(plan, phases=(Phase(0, None, phase.trainable),), decide_at=None)


def _mean_flops(anatomy: Anatomy, plan: FreezePlan, sequence_length: int, num_steps: int | None) -> tuple[int, int]:
    """(forward, backward) FLOPs of a token, averaged over the plan's steps."""
    steps: Counter[tuple[str, ...]] = Counter()
    for phase in plan.phases:
        end = num_steps if phase.end is None else phase.end
        if end is None:
            steps = Counter({phase.trainable: 1})
        else:
            steps[phase.trainable] += max(0, end - phase.first_step)
    total = steps.total() or 1
    priced = {chosen: flops(anatomy, anatomy.tensors, frozenset(chosen), sequence_length) for chosen in steps}
    return (
        round(sum(steps[chosen] * pair[0] for chosen, pair in priced.items()) / total),
        round(sum(steps[chosen] * pair[1] for chosen, pair in priced.items()) / total),
    )


def as_trained(anatomy: Anatomy, plan: FreezePlan) -> Anatomy:
    """The anatomy with the plan's adapters, whether or not it came with them."""
    return anatomy if any(t.category == "adapter" for t in anatomy.tensors) else plan.adapted(anatomy)
