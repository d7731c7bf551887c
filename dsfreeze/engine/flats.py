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
class Part:
    """Elements `first` .. `last - 1` of a tensor (flattened) that this rank holds, from `at` on in its share."""

    slot: Slot
    first: int
    last: int
    at: int

    def of(self, share: torch.Tensor) -> torch.Tensor:
        """The part as a 1-D view of a (1-D) share."""
        return share[self.at : self.at + self.last - self.first]


@dataclass(frozen=True)
class Flat(ABC):
    """One tensor the optimizer steps: this rank's share of its slots. `tensor` is the key into optimizer.state."""

    tensor: torch.Tensor
    slots: tuple[Slot, ...]
    rank: int
    world_size: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(slot.name for slot in self.slots)

    @abstractmethod
    def join(self, shares: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Full tensors by name from every rank's share (1-D, in rank order)."""

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """What this rank holds of each slot; slots it holds nothing of are left out."""

    def cut(self, full: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """This rank's share (1-D) of full tensors; padding is zero."""
        share = torch.zeros(self.tensor.numel(), dtype=full[self.slots[0].name].dtype)
        for part in self.parts():
            part.of(share).copy_(full[part.slot.name].reshape(-1)[part.first : part.last])
        return share

    def local(self, share: torch.Tensor | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The elements of each slot that this rank holds, as 1-D views of `share` (by default of the tensor itself)."""
        values = (self.tensor if share is None else share).detach().reshape(-1)
        for part in self.parts():
            yield part.slot.name, part.of(values)

    def alike(self, other: Flat) -> bool:
        """Whether a share of the other can stand for one of this."""
        mine, theirs = (
            (type(f), f.slots, f.rank, f.world_size, f.tensor.numel(), tuple(f.tensor.shape)) for f in (self, other)
        )
        return mine == theirs


class Range(Flat):
    """Rank r holds elements r*n .. (r+1)*n of the flattened group. With world size 1 this is the whole tensor."""

    def join(self, shares: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        whole = shares[0] if len(shares) == 1 else torch.cat(list(shares))
        return {s.name: whole.narrow(0, s.start, s.numel).view(s.shape) for s in self.slots}

    def parts(self) -> Iterator[Part]:
        size = self.tensor.numel()
        begin = self.rank * size
        for slot in self.slots:
            first, last = max(begin, slot.start), min(begin + size, slot.start + slot.numel)
            if first < last:
                yield Part(slot, first - slot.start, last - slot.start, first - begin)


class Pieces(Flat):
    """Every tensor is cut into `world_size` equal pieces (the last padded); a rank holds its pieces, end to end."""

    def join(self, shares: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        full = {}
        for slot, size in self._sizes():
            pieces = torch.cat([share.narrow(0, slot.start, size) for share in shares])
            full[slot.name] = pieces[: slot.numel].view(slot.shape)
        return full

    def parts(self) -> Iterator[Part]:
        for slot, size in self._sizes():
            first, last = self.rank * size, min((self.rank + 1) * size, slot.numel)
            if first < last:
                yield Part(slot, first, last, slot.start)

    def _sizes(self) -> Iterator[tuple[Slot, int]]:
        ends = [slot.start for slot in self.slots[1:]] + [self.tensor.numel()]
        for slot, end in zip(self.slots, ends, strict=True):
            yield slot, end - slot.start


def whole(name: str, tensor: torch.Tensor) -> Range:
    """The layout of a tensor that is not sharded."""
    return Range(tensor, (Slot(name, tuple(tensor.shape), 0),), 0, 1)


def lay_out(kind: type[Flat], slots: Sequence[Slot], rank: int, world_size: int, device: torch.device) -> Flat:
    """A new, zero fp32 share of tensors (their `start` is set here), laid out as DeepSpeed would lay their group out."""
    placed, at = [], 0
    for slot in slots:
        placed.append(Slot(slot.name, slot.shape, at))
        at += slot.numel if kind is Range else -(-slot.numel // world_size)
    align = 2 * world_size  # stages 1 and 2 pad a group to it
    size = -(-at // align) * 2 if kind is Range else at
    return kind(torch.zeros(size, device=device), tuple(placed), rank, world_size)
