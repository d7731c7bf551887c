"""The plan: which tensors train, and when. An immutable value with a digest and a JSON form.

A plan is made before anything is built, is compared across ranks by digest, is stored in every record and
checkpoint, and is what a resumed run is held against.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError


@dataclass(frozen=True)
class Phase:
    """Steps `first_step` .. `first_step + num_steps - 1` train exactly the tensors named, in model order.

    `num_steps` None, allowed on the last phase alone, means "to the end of the run", so that a static plan does not
    change when a run is lengthened.
    """

    first_step: int
    num_steps: int | None
    trainable: tuple[str, ...]

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
class FreezePlan:
    """Phases that tile the run, in order, none empty; the strategy's name and notes for people.

    Tensor names are those of `anatomy.with_adapters(...)` where there is an adapter. `notes` (decisions the strategy took:
    rounding, ties) are not part of the digest.
    """

    strategy: str
    phases: tuple[Phase, ...]
    adapter: Adapter | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.phases, "a plan has at least one phase"
        step = 0
        for phase in self.phases:
            assert phase.first_step == step, f"phase starts at {phase.first_step}, not at {step}"
            assert phase.num_steps is None or phase.num_steps > 0, "a phase has at least one step"
            assert (phase.num_steps is None) <= (phase is self.phases[-1]), "only the last phase may be open"
            if not phase.trainable:
                raise UserError(
                    f"Strategy '{self.strategy}' leaves nothing to train from step {phase.first_step} on: "
                    "every tensor is frozen. Lower freeze.fraction, or name what shall train in freeze.trainable."
                )
            step = phase.end or 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what trains when; equal on every rank of a run, and on resuming it."""
        value = {"phases": [asdict(p) for p in self.phases], "adapter": self.adapter and asdict(self.adapter)}
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    @cached_property
    def ever_trained(self) -> frozenset[str]:
        return frozenset(name for phase in self.phases for name in phase.trainable)

    def phase_at(self, step: int) -> Phase:
        """The phase that holds `step` (counted from 0)."""
        for phase in self.phases:
            if phase.end is None or step < phase.end:
                return phase
        return self.phases[-1]

    def adapted(self, anatomy: Anatomy) -> Anatomy:
        """The anatomy whose names the phases use: the model's own, or with the adapters in place."""
        if self.adapter is None:
            return anatomy
        return anatomy.with_adapters(self.adapter.targets, self.adapter.r, self.adapter.kind == "dora")

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "digest": self.digest}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> FreezePlan:
        """Read `to_json`'s form; UserError when it is not one or its digest does not match."""
        try:
            raw = json.loads(text)
            digest = raw.pop("digest")
            phases = tuple(Phase(p["first_step"], p["num_steps"], tuple(p["trainable"])) for p in raw["phases"])
            adapter = raw["adapter"]
            if adapter is not None:
                adapter = Adapter(**{**adapter, "targets": tuple(adapter["targets"])})
            plan = cls(str(raw["strategy"]), phases, adapter, tuple(raw["notes"]))
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError) as error:
            raise UserError(f"Not a freeze plan: {error}.") from None
        if plan.digest != digest:
            raise UserError("The freeze plan was changed by hand: its digest does not match its phases.")
        return plan
