"""The plan: which tensors train, and when. An immutable value with a digest and a JSON form.

A plan is made before anything is built, is compared across ranks by digest, is stored in every record and
checkpoint, and is what a resumed run is held against.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

from dsfreeze.anatomy import Anatomy, Tensor
from dsfreeze.errors import UserError
from dsfreeze.files import parse_json

#: What happens to Adam's state of a tensor that stops training; `refreeze` defines the three.
StateRule = Literal["keep", "clear", "offload"]


@dataclass(frozen=True)
class Phase:
    """Steps `first_step` .. `first_step + num_steps - 1` train exactly the tensors named, in model order.

    `num_steps` None, allowed on the last phase alone, means "to the end of the run", so that a static plan does not
    change when a run is lengthened. `lr_step`: the learning-rate schedule is read at that step throughout the phase
    (HiFT: one rate a sweep); None reads it at each step.
    """

    first_step: int
    num_steps: int | None
    trainable: tuple[str, ...]
    lr_step: int | None = None

    @property
    def end(self) -> int | None:
        """The first step after the phase, None when it is open."""
        return None if self.num_steps is None else self.first_step + self.num_steps


@dataclass(frozen=True)
class Adapter:
    """Low-rank adapters (peft) on the matrices named in `targets`, whose own weights stay frozen."""

    kind: str  # "lora" | "dora"
    r: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Rate:
    """A layer's own learning rate: `scale` times the schedule's, or, with `ends`, times the run's peak rate annealed by
    a half cosine that reaches zero at step `ends` (FreezeOut)."""

    layer: str
    scale: float = 1.0
    ends: int | None = None


@dataclass(frozen=True)
class Mask:
    """Of a tensor the elements that train when it does; the others keep their bits (`engine/masks.py` sees to it).

    Said in one of three ways: `rows`, blocks [first, last) of a fused matrix's outputs (and of its bias); `share` of the elements,
    drawn from `seed` and the tensor's name, or with `inverted` all but those; `file`, safetensors of booleans by tensor name, whose content has that `sha256`.
    `trained` is the number of elements that train.
    """

    tensor: str
    trained: int
    rows: tuple[tuple[int, int], ...] = ()
    share: float | None = None
    seed: int | None = None
    inverted: bool = False
    file: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class FreezePlan:
    """Phases that tile the run, in order, none empty; the strategy's name and notes for people.

    Tensor names are those of `anatomy.with_adapters(...)` where there is an adapter. `notes` (decisions the strategy took:
    rounding, ties) are not part of the digest. `state` and `drop_master` are `refreeze`'s; after a switch the learning
    rate rises linearly for `rewarmup_steps`; layers in `rates` have their own. Of tensors in `masks` some elements alone train, in
    every phase that names them. An adaptive plan is revised after
    `decide_at` steps: its last phase is open until then.
    """

    strategy: str
    phases: tuple[Phase, ...]
    adapter: Adapter | None = None
    notes: tuple[str, ...] = ()
    state: StateRule = "keep"
    drop_master: bool = False
    rewarmup_steps: int = 0
    rates: tuple[Rate, ...] = ()
    decide_at: int | None = None
    masks: tuple[Mask, ...] = ()

    def __post_init__(self) -> None:
        """UserError unless the phases tile the run: from step 0, without gaps or overlaps, none of them empty."""
        if not self.phases:
            raise UserError("A plan needs at least one phase, such as Phase(0, None, names).")
        step = 0
        for number, phase in enumerate(self.phases):
            self._check(number, phase, step)
            step = phase.end or 0
        if self.drop_master and self.state != "clear":
            raise UserError(
                f"drop_master goes with state 'clear', which drops the moments too; state is '{self.state}'."
            )
        assert self.decide_at is None or self.phases[-1].num_steps is None, "what is to be revised is still open"

    def _check(self, number: int, phase: Phase, step: int) -> None:
        where = f"Phase {number} of strategy '{self.strategy}'"
        if phase.first_step != step:
            what = "overlaps the one before" if phase.first_step < step else "leaves a gap after the one before"
            raise UserError(f"{where} starts at step {phase.first_step} and {what}; write first_step {step}.")
        if phase.num_steps is not None and phase.num_steps < 1:
            raise UserError(f"{where} has {phase.num_steps} steps; a phase has at least one.")
        if phase.num_steps is None and number < len(self.phases) - 1:
            raise UserError(f"{where} has no end (num_steps None), which the last phase alone may have.")
        if not phase.trainable:
            raise UserError(
                f"Strategy '{self.strategy}' leaves nothing to train from step {phase.first_step} on: "
                "every tensor is frozen. Lower freeze.fraction, or name what shall train in freeze.trainable."
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what trains when and how; equal on every rank of a run, and on resuming it."""
        value = {key: entry for key, entry in self._plain().items() if key not in ("strategy", "notes")}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @cached_property
    def ever_trained(self) -> frozenset[str]:
        return frozenset(name for chosen in dict.fromkeys(p.trainable for p in self.phases) for name in chosen)

    @cached_property
    def held_back(self) -> dict[str, Mask]:
        """The masks by tensor."""
        return {mask.tensor: mask for mask in self.masks}

    def elements_of(self, tensor: Tensor) -> int:
        """How many elements of a tensor train when it does."""
        mask = self.held_back.get(tensor.name)
        return tensor.numel if mask is None else mask.trained

    @cached_property
    def _starts(self) -> list[int]:
        return [phase.first_step for phase in self.phases]

    def phase_at(self, step: int) -> Phase:
        """The phase that holds `step` (counted from 0); the last one beyond the end."""
        return self.phases[bisect_right(self._starts, step) - 1]

    def until(self, step: int) -> FreezePlan:
        """The plan of the first `step` steps (at least one) alone, for comparing what two plans did so far."""
        phases = [p for p in self.phases if p.first_step < step]
        last = phases[-1]
        phases[-1] = Phase(last.first_step, step - last.first_step, last.trainable, last.lr_step)
        trained = {name for phase in phases for name in phase.trainable}
        masks = tuple(mask for mask in self.masks if mask.tensor in trained)  # a longer run may have more
        return replace(self, phases=tuple(phases), decide_at=None, masks=masks)

    def adapted(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy whose names the phases use: the model's own, or with the adapters in place."""
        if self.adapter is None:
            return anatomy
        return anatomy.with_adapters(self.adapter.targets, self.adapter.r, self.adapter.kind == "dora")

    def to_json(self) -> str:
        return json.dumps({**self._plain(), "digest": self.digest})

    def _plain(self) -> dict[str, Any]:
        """Plain values; every distinct set of tensors is written once (`sets`), and phases refer to it by number."""
        sets = list(dict.fromkeys(phase.trainable for phase in self.phases))
        number = {chosen: n for n, chosen in enumerate(sets)}
        phases = [[p.first_step, p.num_steps, number[p.trainable], p.lr_step] for p in self.phases]
        apart = ("phases", "adapter", "rates", "masks")
        others = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        masks = (
            {"masks": [_plain(mask) for mask in self.masks]} if self.masks else {}
        )  # plans without keep their digest
        return {
            **others,
            **masks,
            "adapter": self.adapter and asdict(self.adapter),
            "rates": [asdict(rate) for rate in self.rates],
            "sets": sets,
            "phases": phases,
        }

    @classmethod
    def from_json(cls, text: str) -> FreezePlan:
        """Read `to_json`'s form; UserError when it is not one or its digest does not match."""
        try:
            raw = parse_json(text)
            digest, sets = raw.pop("digest"), [tuple(map(str, chosen)) for chosen in raw.pop("sets")]
            raw["phases"] = tuple(Phase(first, num, sets[n], lr) for first, num, n, lr in raw["phases"])
            if raw["adapter"] is not None:
                raw["adapter"] = Adapter(**{**raw["adapter"], "targets": tuple(raw["adapter"]["targets"])})
            raw["masks"] = tuple(_mask(mask) for mask in raw.get("masks", ()))
            raw["rates"], raw["notes"] = tuple(Rate(**rate) for rate in raw["rates"]), tuple(raw["notes"])
            plan = cls(**raw)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError) as error:
            raise UserError(f"Not a freeze plan: {error}.") from None
        if plan.digest != digest:
            raise UserError("The freeze plan was changed by hand: its digest does not match its phases.")
        return plan


def _plain(mask: Mask) -> dict[str, Any]:
    return {key: value for key, value in asdict(mask).items() if value is not False}


def _mask(raw: dict[str, Any]) -> Mask:
    return Mask(**{**raw, "rows": tuple((first, last) for first, last in raw["rows"])})
