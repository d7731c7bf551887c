"""What a trained tensor takes along when the trainable set changes: its share of the fp32 master and of Adam's state.

A parcel is one flat with the optimizer's entry for it. While its tensors train, both belong to the optimizer; when they
stop, the parcel is parked by one of three rules, and it is put back, by reference where the new flat is laid out alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from dsfreeze.engine.flats import Flat, Slot, lay_out
from dsfreeze.plan import StateRule

#: Key under which a parcel's master is listed beside the optimizer's own ("exp_avg", ...).
MASTER = "master"


@dataclass(frozen=True, eq=False)
class Parcel:
    """`flat.tensor` is the master share, of which only the shape counts when `has_master` is False (in fp32 the weight is
    its own master); `state` is the optimizer's entry: tensors of one value per element, and scalars ("step") that hold
    for all its tensors; `live`: its tensors train."""

    flat: Flat
    state: dict[str, Any] = field(default_factory=dict)
    has_master: bool = True
    live: bool = False

    @property
    def step(self) -> float | None:
        """Adam's step count; None where there is no state, 0 where the state has no count (SGD's momentum)."""
        return float(self.state.get("step", 0)) if self.state else None

    def shares(self) -> dict[str, torch.Tensor]:
        """Every per-element tensor: the master, if any, and the optimizer's."""
        own = {MASTER: self.flat.tensor.detach()} if self.has_master else {}
        return own | {key: value for key, value in self.state.items() if _is_share(value)}

    def scalars(self) -> dict[str, Any]:
        return {key: value for key, value in self.state.items() if not _is_share(value)}


def _is_share(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def park(parcel: Parcel, rule: StateRule, *, drop_master: bool) -> Parcel | None:
    """What is left of a parcel whose tensors stop training, None when nothing is; one that is parked stays as it is."""
    if not parcel.live:
        return parcel
    has_master = parcel.has_master and not (rule == "clear" and drop_master)
    state = {} if rule == "clear" else dict(parcel.state)
    if not (has_master or state):
        return None
    if not has_master:
        tensor = torch.empty_like(parcel.flat.tensor, device="meta")
    else:
        tensor = parcel.flat.tensor.detach() if rule == "keep" else to_host(parcel.flat.tensor.detach())
    if rule == "offload":
        state = {key: to_host(value) if _is_share(value) else value for key, value in state.items()}
    return Parcel(replace(parcel.flat, tensor=tensor), state, has_master)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in CPU memory, pinned where there is a device to pin it for."""
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=torch.cuda.is_available())
    return copied.copy_(tensor)


@torch.no_grad()
def put_back(parcel: Parcel, flat: Flat, optimizer: torch.optim.Optimizer) -> None:
    """Give a flat of the optimizer the parcel's master and state: by reference, unless they come from another device."""
    device = flat.tensor.device
    if parcel.has_master:
        flat.tensor.data = parcel.flat.tensor.detach().to(device).view(flat.tensor.shape)
    if parcel.state:
        optimizer.state[flat.tensor] = {k: v.to(device) if _is_share(v) else v for k, v in parcel.state.items()}


# -- from one layout to another ------------------------------------------------------------------------------------


def spread(sources: Iterable[Parcel], targets: Iterable[Parcel], device: torch.device) -> None:
    """Copy every source's shares into the targets that hold the same tensors, by name (collective, every rank the same
    lists). Tensor by tensor: no rank holds more than one full tensor at a time. `device` is what the ranks talk over."""
    places = {name: target for target in targets for name in target.flat.names}
    for source in sources:
        for slot in source.flat.slots:
            target = places.get(slot.name)
            if target is None:
                continue
            wanted = target.shares()
            for kind, share in source.shares().items():
                if kind in wanted:
                    _write(wanted[kind], target.flat, slot.name, full(source.flat, share, slot, device))


def full(flat: Flat, share: torch.Tensor, slot: Slot, device: torch.device) -> torch.Tensor:
    """The whole of one tensor, 1-D on `device`, from every rank's share of its flat (collective where it is sharded)."""
    whole = torch.zeros(slot.numel, dtype=share.dtype, device=device)
    for part in flat.parts():
        if part.slot.name == slot.name:
            whole[part.first : part.last] = part.of(share.reshape(-1)).to(device)
    if flat.world_size > 1:
        dist.all_reduce(whole)  # every element comes from one rank, the others add zero: exact
    return whole


def _write(share: torch.Tensor, flat: Flat, name: str, whole: torch.Tensor) -> None:
    for part in flat.parts():
        if part.slot.name == name:
            part.of(share.view(-1)).copy_(whole[part.first : part.last])


def blank(flat: Flat, like: Parcel) -> Parcel:
    """A parcel on `flat` with zero shares of the optimizer's kinds that `like` holds, and its scalars."""
    state = {key: torch.zeros_like(flat.tensor, requires_grad=False) for key in like.shares() if key != MASTER}
    scalars = {key: v.clone() if isinstance(v, torch.Tensor) else v for key, v in like.scalars().items()}
    return Parcel(flat, state | scalars)


def blank_rest(parcel: Parcel, names: Iterable[str]) -> Parcel:
    """A zero parcel of the same kinds for some of a parcel's tensors, with a layout of its own."""
    chosen = set(names)
    slots = [slot for slot in parcel.flat.slots if slot.name in chosen]
    device = next((share.device for share in parcel.shares().values()), torch.device("meta"))
    flat = lay_out(type(parcel.flat), slots, parcel.flat.rank, parcel.flat.world_size, device)
    made = replace(blank(flat, parcel), has_master=parcel.has_master, live=parcel.live)
    if parcel.has_master:
        return made
    return replace(made, flat=replace(flat, tensor=torch.empty_like(flat.tensor, device="meta")))
