"""What an engine can say of itself: how far tensors and gradients have moved, that frozen ones have not, and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dsfreeze.engine import Memory, Movement
from dsfreeze.engine.core import MOMENTS, Core
from dsfreeze.engine.memory import nbytes, spanned_bytes
from dsfreeze.engine.movement import Checksums, changed, checksums, merge


class Measured(Core):
    """The part of an engine that measures."""

    @torch.no_grad()
    def watch(self, *, gradients: bool = False, changes: bool = False) -> None:
        self._watches_gradients = gradients
        shares = (pair for flat in self.flats for pair in flat.local()) if changes else ()
        # a copy in host memory, of this rank's shares alone
        self._start = {name: value.to("cpu", copy=True) for name, value in shares}

    def host_bytes(self) -> int:
        return sum(t.nbytes for t in self._start.values())

    def gradients(self) -> dict[str, tuple[float, float]]:
        return self._gradients

    @torch.no_grad()
    def changes(self) -> dict[str, tuple[float, float]]:
        pairs = {}
        for flat in self.flats:
            for name, value in flat.local():
                start = self._start[name].to(value.device)
                pairs[name] = (_squared(value - start), _squared(start))
        return self._over_ranks(pairs)

    @torch.no_grad()
    def _measure_gradients(self) -> dict[str, tuple[float, float]]:
        pairs = {}
        for flat, share in zip(self.flats, self._gradient_shares(), strict=True):
            for name, value in flat.local(share):
                pairs[name] = (value.abs().sum(dtype=torch.float64), _squared(value))
        return self._over_ranks(pairs)

    def _over_ranks(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[float, float]]:
        """Of every trained tensor two numbers, summed over the ranks' shares; where every rank holds the whole, its own."""
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        held = [torch.stack(pairs[name]).to(self.device) if name in pairs else nothing for name in self._trainable]
        totals = self.sum_over_pieces(torch.cat(held).tolist())  # one transfer for all of them
        return dict(zip(self._trainable, zip(totals[::2], totals[1::2], strict=True), strict=True))

    # -- what moved, and bytes -------------------------------------------------------------------------------------

    def movement(self, *, frozen: bool = True) -> Movement:
        assert self._trainable, "enter a phase first"
        thawed = changed(self._frozen, self._frozen_checksums(set(self._named))) if frozen else []
        found = self.gather((thawed, changed(self._trained, self._trained_checksums())))
        order = [t.name for t in self.anatomy.tensors]
        return merge(order, [f for f, _ in found], [m for _, m in found], set(self._trainable))

    def _frozen_checksums(self, names: set[str]) -> Checksums:
        """Of what is frozen of the named tensors: the whole, or of a masked one that trains the elements held back."""
        return checksums((n, value) for n, p in self._parameters if n in names for value in self._frozen_of(n, p))

    def _frozen_of(self, name: str, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        if not parameter.requires_grad:
            yield self._held(parameter)
        elif name in self.holding.masks:
            yield self.holding.held(name, self._held(parameter), self._first_held(parameter))

    def _trained_checksums(self) -> Checksums:
        return checksums(pair for flat in self.flats for pair in self.holding.without_held(flat))

    def memory(self, *, reset_peak: bool = False) -> Memory:
        """Bytes of this rank. Step counts (0-dim), communication and staging buffers are in `allocated` alone, as is
        what a gradient keeps alive beyond its own elements (at stage 1, the rest of a tensor that a shard's end cuts).
        """
        allocated, peak = self._meter.read(reset_peak=reset_peak)
        masters = [flat.tensor for flat in self.flats if not isinstance(flat.tensor, nn.Parameter)]
        moments = [flat_state.get(kind) for flat_state in self._optimizer_states() for kind in MOMENTS]
        return Memory(
            weights=nbytes(t for _, p in self._parameters for t in self._copies(p)),
            gradients=spanned_bytes([p.grad for _, p in self._parameters] + list(self._gradient_buffers())),
            masters=nbytes(masters),
            optimizer_state=nbytes(moments),
            parked=nbytes(t for parcel in self._parked() for t in parcel.shares().values()),
            allocated=allocated,
            peak=peak,
        )

    def _optimizer_states(self) -> Iterator[Mapping[str, torch.Tensor]]:
        yield from self.optimizer.state.values() if self._modes else ()


def _squared(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().square().sum()
