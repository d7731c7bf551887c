"""State by tensor name: what an engine writes into a checkpoint and takes from one, at any stage and number of ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from dsfreeze.engine import TensorState
from dsfreeze.engine.core import MOMENTS
from dsfreeze.engine.flats import Flat, whole
from dsfreeze.engine.measured import Measured
from dsfreeze.engine.parcels import Parcel
from dsfreeze.errors import UserError, did_you_mean


class Saved(Measured):
    """The part of an engine that moves state out and in; what was loaded is where movement is counted from."""

    @torch.no_grad()
    def export_state(self) -> dict[str, TensorState]:
        names = self.anatomy.in_order(self._ever_trained) if self._ever_trained else ()
        state: dict[str, TensorState] = {n: {"weight": w} for n, w in self.export_weights(names).items()}
        for parcel in (*self._live(), *self._parked()):
            for kind, share in parcel.shares().items():
                gathered = self._collect(share, parcel.flat.world_size)
                for name, value in (parcel.flat.join(gathered) if gathered else {}).items():
                    state[name][kind] = value.clone()
            for name in parcel.flat.names if self.rank == 0 and parcel.step is not None else ():
                state[name]["step"] = torch.tensor(parcel.step, dtype=torch.float32)
        return state

    def _live(self) -> list[Parcel]:
        rounded = self.dtype != torch.float32
        return [
            Parcel(f, dict(self.optimizer.state.get(f.tensor, {})), has_master=rounded, live=True) for f in self.flats
        ]

    @torch.no_grad()
    def load_state(self, state: Mapping[str, TensorState]) -> None:
        unknown = [name for name in state if name not in self._named]
        if unknown:
            raise UserError(
                f"The state holds '{unknown[0]}', which the model lacks.{did_you_mean(unknown[0], self._named)}"
            )
        missing = [name for name in self._trainable if name not in state]
        if missing:
            raise UserError(f"The state does not hold '{missing[0]}', which the plan trains.")
        self.write_weights({name: _precise(e, self.dtype) for name, e in state.items()})
        self._prepare_groups({name: float(e["step"]) if "step" in e else None for name, e in state.items()})
        self._hold_back()
        for flat in self.flats:
            entries = {slot.name: state[slot.name] for slot in flat.slots}
            self._write(flat.tensor, flat, {n: _precise(e, torch.float32) for n, e in entries.items()})
            self._load_moments(flat, entries)
        self._ever_trained.update(state)
        self._park({name: entry for name, entry in state.items() if name not in self._trainable})
        self._frozen, self._trained = self._frozen_checksums(set(self._named)), self._trained_checksums()

    def _place(self, name: str) -> tuple[torch.device, tuple[int, ...]]:
        """Where the parked state of a tensor lies, and the tensor's shape."""
        return self.device if self.rule == "keep" else torch.device("cpu"), tuple(self.anatomy.by_name[name].shape)

    def _parcel_of(self, flat: Flat, state: Mapping[str, TensorState]) -> Parcel:
        """This rank's share of the parked state of the tensors that `flat`, new and zero, has room for."""
        entries = {name: state[name] for name in flat.names}
        first = entries[flat.names[0]]
        shares = {kind: torch.zeros_like(flat.tensor) for kind in MOMENTS if kind in first}
        for kind, share in shares.items():
            self._write(share, flat, {n: e[kind].float() for n, e in entries.items()})
        has_master = "master" in first
        if has_master:
            self._write(flat.tensor, flat, {n: e["master"].float() for n, e in entries.items()})
        else:
            flat = replace(flat, tensor=torch.empty_like(flat.tensor, device="meta"))
        step = {"step": first["step"].to(self.device, copy=True)} if "step" in first else {}
        return Parcel(flat, {**shares, **step}, has_master)

    def _whole_parcels(self, state: Mapping[str, TensorState]) -> list[Parcel]:
        """Parcels of tensors that no rank shares with another."""
        parked = {name: self._place(name) for name, entry in state.items() if set(entry) - {"weight"}}
        return [
            self._parcel_of(whole(name, torch.zeros(shape, device=device)), state)
            for name, (device, shape) in parked.items()
        ]

    def _load_moments(self, flat: Flat, entries: Mapping[str, TensorState]) -> None:
        (step,) = {float(e["step"]) if "step" in e else None for e in entries.values()}
        if step is None:
            self.optimizer.state.pop(flat.tensor, None)
            return
        entry = self.optimizer.state[flat.tensor]
        # fused Adam keeps its step counts on the tensors' device
        entry["step"] = torch.tensor(step, dtype=torch.float32, device=flat.tensor.device)
        for kind in MOMENTS:
            entry[kind] = (
                flat.cut({n: e[kind].float() for n, e in entries.items()}).view(flat.tensor.shape).to(flat.tensor)
            )

    @staticmethod
    def _write(target: torch.Tensor, flat: Flat, full: Mapping[str, torch.Tensor]) -> None:
        target.copy_(flat.cut(full).view(target.shape))

    def export_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self.read_weight(name) for name in names} if self.rank == 0 else {}

    def write_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            self._named[name].data.copy_(value)


def _precise(entry: TensorState, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's value in `dtype`: from the master where fp32 is wanted and there is one, else from the weight."""
    return (entry.get("master", entry["weight"]) if dtype == torch.float32 else entry["weight"]).to(dtype)
