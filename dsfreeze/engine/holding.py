"""Holds elements of trainable tensors back while the others train: they keep their bits, under weight decay too.

Two things are hooked, and nothing of PyTorch or DeepSpeed is replaced:

- **The gradient** of a masked parameter, before anybody adds it up or reduces it: zero where elements are held back, so that the
  gradient norm, and clipping by it, count the trained ones alone, and Adam's moments of the others stay zero.
- **The optimizer's step.** A gradient of zero is not enough: AdamW decays every element, and moments from elsewhere (another
  plan's checkpoint, a projection of the gradient) push it. What the step is about to change is copied before, and put back
  after. DeepSpeed steps its fp32 tensors before it rounds them into the weights and gathers those, at every stage.

**What it costs** on each rank: of every masked tensor a bit an element, on the device, at every stage (the hook sees whole
gradients); while a tensor's gradient is made, the gradient again and a byte an element; while the optimizer steps, 5 bytes for
each element of masked tensors that it steps at once: this rank's share of a layer at stages 1 to 3, which step one
after the other, and of everything that trains at stage 0 and on the local engine.
Nothing where the plan has no masks. Frozen elements save no memory: gradient, master and moments of the whole tensor are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dsfreeze.engine.flats import Flat, Part
from dsfreeze.engine.masks import Bits


class Holding:
    """The masks of one rank, by tensor name; true is trained."""

    def __init__(self, masks: Mapping[str, Bits], device: torch.device) -> None:
        self.masks = {name: bits.to(device) for name, bits in masks.items()}
        self._handles: list[RemovableHandle] = []
        self._flats: dict[int, Flat] = {}
        self._copies: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def follow(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, flats: Iterable[Flat]
    ) -> None:
        """Hold back in these parameters, which train, and in the flats that the optimizer steps; in no others any more."""
        self.close()
        for name, bits in self.masks.items():
            if name in parameters:
                self._handles.append(parameters[name].register_hook(partial(_zero, bits)))
        self._flats = {id(flat.tensor): flat for flat in flats if not self.masks.keys().isdisjoint(flat.names)}
        if self._flats:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def close(self) -> None:
        """Take every hook away again."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._flats, self._copies = [], {}, []

    # -- the optimizer's step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stepped = (tensor for group in optimizer.param_groups for tensor in group["params"])
        flats = (self._flats[id(tensor)] for tensor in stepped if id(tensor) in self._flats)
        self._copies = [copied for flat in flats for copied in self._copied(flat)]

    def _copied(self, flat: Flat) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(view of the flat, which of its elements train, its values now) of every masked tensor."""
        values = flat.tensor.detach().reshape(-1)
        for part in self._masked(flat):
            view = part.of(values)
            yield view, self._trained(part.slot.name, part.first, view), view.clone()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for view, trained, before in self._copies:
            torch.where(trained, view, before, out=view)
        self._copies = []

    def _masked(self, flat: Flat) -> Iterator[Part]:
        return (part for part in flat.parts() if part.slot.name in self.masks)

    # -- what there is to look at ------------------------------------------------------------------------------

    def without_held(self, flat: Flat) -> Iterator[tuple[str, torch.Tensor]]:
        """As `flat.local()`, with zeros where elements are held back."""
        values = flat.tensor.detach().reshape(-1)
        for part in flat.parts():
            name, view = part.slot.name, part.of(values)
            yield name, _only(self._trained(name, part.first, view), view) if name in self.masks else view

    def zero(self, name: str, gradient: torch.Tensor, first: int) -> None:
        """Zero a gradient (1-D, elements from `first` on of a tensor) where its elements are held back, in place."""
        if name in self.masks:
            gradient.masked_fill_(~self._trained(name, first, gradient), 0)

    def held(self, name: str, values: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Elements from `first` on of a masked tensor (1-D; what is beyond its end is padding), with zeros where they train."""
        bits = self.masks[name]
        values = values.detach().reshape(-1)[: max(0, bits.numel - first)]
        return _only(~self._trained(name, first, values), values)

    def _trained(self, name: str, first: int, values: torch.Tensor) -> torch.Tensor:
        """Which of the values, the elements from `first` on, train; on their device."""
        return self.masks[name].between(first, first + len(values), values.device)


def _zero(bits: Bits, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of the elements that train; not in place, for autograd may hold it elsewhere too."""
    return _only(bits.whole(gradient.device), gradient)


def _only(chosen: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A copy with zeros elsewhere, whatever is there."""
    return values.masked_fill(~chosen, 0)
