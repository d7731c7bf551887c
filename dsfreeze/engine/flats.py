"""How a rank's share of the trained tensors lies in the flat fp32 tensors that the optimizer steps, and back again.

Pure tensor code, no communication: `join` makes full tensors of all ranks' shares, `cut` makes this rank's share of
full tensors. Three layouts exist: whole (plain PyTorch, stage 0), ranges of a flattened group (stages 1 and 2), and
pieces of every tensor laid end to end (stage 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Slot:
    """A tensor's place: `start` elements into the flattened group (ranges) or into a rank's share (pieces)."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Flat(ABC):
    """One tensor the optimizer steps: this rank's share of its slots. `tensor` is the key into optimizer.state."""

    tensor: torch.Tensor
    slots: tuple[Slot, ...]
    rank: int
    world_size: int

    @abstractmethod
    def join(self, shares: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Full tensors by name from every rank's share (1-D, in rank order)."""

    @abstractmethod
    def cut(self, full: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """This rank's share (1-D) of full tensors; padding is zero."""

    @abstractmethod
    def local(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The elements of each slot that this rank holds, as 1-D views; slots it holds nothing of are left out."""


class Range(Flat):
    """Rank r holds elements r*n .. (r+1)*n of the flattened group. With world size 1 this is the whole tensor."""

    def join(self, shares: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = shares[0] if len(shares) == 1 else torch.cat(list(shares))
        return {s.name: whole.narrow(0, s.start, s.numel).view(s.shape) for s in self.slots}

    def cut(self, full: Mapping[str, torch.Tensor]) -> torch.Tensor:
        share = torch.zeros(self.tensor.numel(), dtype=full[self.slots[0].name].dtype)
        for slot, first, last in self._overlaps():
            source = full[slot.name].reshape(-1)[first - slot.start : last - slot.start]
            share[first - self._first : last - self._first] = source
        return share

    def local(self) -> Iterator[tuple[str, torch.Tensor]]:
        values = self.tensor.detach().reshape(-1)
        for slot, first, last in self._overlaps():
            yield slot.name, values[first - self._first : last - self._first]

    @property
    def _first(self) -> int:
        return self.rank * self.tensor.numel()

    def _overlaps(self) -> Iterator[tuple[Slot, int, int]]:
        for slot in self.slots:
            first = max(self._first, slot.start)
            last = min(self._first + self.tensor.numel(), slot.start + slot.numel)
            if first < last:
                yield slot, first, last


class Pieces(Flat):
    """Every tensor is cut into `world_size` equal pieces (the last padded); a rank holds its pieces, end to end."""

    def join(self, shares: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        full = {}
        for slot, size in self._sizes():
            pieces = torch.cat([share.narrow(0, slot.start, size) for share in shares])
            full[slot.name] = pieces[: slot.numel].view(slot.shape)
        return full

    def cut(self, full: Mapping[str, torch.Tensor]) -> torch.Tensor:
        share = torch.zeros(self.tensor.numel(), dtype=full[self.slots[0].name].dtype)
        for slot, size in self._sizes():
            piece = full[slot.name].reshape(-1)[self.rank * size : (self.rank + 1) * size]
            share[slot.start : slot.start + len(piece)] = piece
        return share

    def local(self) -> Iterator[tuple[str, torch.Tensor]]:
        values = self.tensor.detach()
        for slot, size in self._sizes():
            held = min(size, slot.numel - self.rank * size)
            if held > 0:
                yield slot.name, values[slot.start : slot.start + held]

    def _sizes(self) -> Iterator[tuple[Slot, int]]:
        ends = [slot.start for slot in self.slots[1:]] + [self.tensor.numel()]
        for slot, end in zip(self.slots, ends, strict=True):
            yield slot, end - slot.start


def whole(name: str, tensor: torch.Tensor) -> Range:
    """The layout of a tensor that is not sharded."""
    return Range(tensor, (Slot(name, tuple(tensor.shape), 0),), 0, 1)
