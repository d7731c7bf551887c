"""Plain PyTorch in one process: the reference that every other engine is held against.

In bf16 it keeps what ZeRO keeps: bf16 weights and gradients (summed over micro-steps in bf16), and fp32 masters of the
trained tensors, which AdamW steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import TensorState
from dsfreeze.engine.base import BaseEngine
from dsfreeze.engine.flats import Flat, whole
from dsfreeze.engine.gradients import whole_gradient
from dsfreeze.engine.groups import make_adamw
from dsfreeze.engine.modes import set_trainable
from dsfreeze.engine.parcels import Parcel, park, put_back
from dsfreeze.engine.ranks import device_of
from dsfreeze.recipe import Recipe


class LocalEngine(BaseEngine):
    """One process, one device, no distributed code."""

    rank, world_size = 0, 1
    config: Mapping[str, Any] | None = None

    def __init__(self, module: nn.Module, anatomy: Anatomy, recipe: Recipe, **rule: Any) -> None:
        super().__init__(module, anatomy, recipe, device_of(0), **rule)
        self._stepped: dict[str, torch.Tensor] = {}
        self._idle: list[Parcel] = []

    def _build(self) -> list[Flat]:
        parameters = {name: self._named[name] for group in self.groups for name in group.tensors}
        if self.dtype != torch.float32:
            self._stepped = {n: p.detach().float().requires_grad_() for n, p in parameters.items()}
        else:
            self._stepped = dict(parameters)
        self.optimizer = make_adamw(self.groups, self._stepped, self.recipe.train)
        return [whole(name, tensor) for name, tensor in self._stepped.items()]

    def _refreeze(self, names: tuple[str, ...]) -> None:
        pool = {parcel.flat.names[0]: parcel for parcel in (*self._idle, *self._live())}
        set_trainable(self.module, names)
        self.flats = self._build()
        for flat in self.flats:
            if parcel := pool.pop(flat.names[0], None):
                put_back(parcel, flat, self.optimizer)
        kept = (park(parcel, self.rule, drop_master=self.drop_master) for parcel in pool.values())
        self._idle = [parcel for parcel in kept if parcel]

    def _prepare_groups(self, steps: Mapping[str, float | None]) -> None:
        """Every tensor has a flat of its own."""

    def _parked(self) -> list[Parcel]:
        return self._idle

    def _park(self, state: Mapping[str, TensorState]) -> None:
        self._idle = self._whole_parcels(state)

    def _gradient_shares(self) -> list[torch.Tensor]:
        gradients = {name: self._named[name].grad for name in self._stepped}
        return [torch.zeros_like(self._named[n]) if g is None else g for n, g in gradients.items()]

    def _gradient_views(self) -> list[list[torch.Tensor]]:
        return [[whole_gradient(self._named[name])] for name in self._stepped]

    def _forward(self, **batch: Any) -> Any:
        return self.module(**batch)

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def _update(self) -> float:
        for name, stepped in self._stepped.items():
            # a tensor the forward pass did not reach has a zero gradient, as under ZeRO: it decays all the same
            gradient = self._named[name].grad
            stepped.grad = torch.zeros_like(stepped) if gradient is None else gradient.to(stepped.dtype)
        norm = get_total_norm([t.grad for t in self._stepped.values() if t.grad is not None])
        limit = self.recipe.train.max_grad_norm
        if limit > 0:
            clip_grads_with_norm_(self._stepped.values(), limit, norm)
        if math.isfinite(norm):
            self.optimizer.step()
        for name, stepped in self._stepped.items():
            stepped.grad = self._named[name].grad = None
            if stepped is not self._named[name]:
                self._named[name].data.copy_(stepped)
        return float(norm) if math.isfinite(norm) else math.inf

    def sum(self, values: list[float]) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        """Nobody to wait for."""

    def _agree(self, value: str, what: str) -> None:
        """Nobody to disagree with."""

    def _collect(self, share: torch.Tensor, world_size: int) -> list[torch.Tensor]:
        return [share.reshape(-1).cpu()]
