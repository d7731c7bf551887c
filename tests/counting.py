"""Counts what passes really store and hold, from live tensors: the oracle of the planner's activations."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine.modes import Modes, set_trainable


def batch_of(task: str, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Token ids, none of them padding, with labels."""
    ids = 2 + torch.arange(batch * length).reshape(batch, length) % 20
    labels = torch.zeros(batch, dtype=torch.long) if task == "classification" else ids.clone()
    return {"input_ids": ids, "labels": labels}


class _Packed:
    """What autograd keeps in place of a tensor; it goes when its operation goes."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


def stored_bytes(module: nn.Module, batch: dict[str, torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd still keeps at the end of a forward pass, parameters and buffers apart."""
    outside = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    packed: weakref.WeakSet[_Packed] = weakref.WeakSet()

    def pack(value: torch.Tensor) -> _Packed:
        kept = _Packed(value)
        packed.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.value):
        loss = module(**batch).loss
    storages = {p.value.untyped_storage()._cdata: p.value.untyped_storage().nbytes() for p in packed}
    del loss
    return sum(size for key, size in storages.items() if key not in outside)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made within it that are alive: now, and at the fullest moment."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._known:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def prepared(module: nn.Module, anatomy: Anatomy, trainable: tuple[str, ...], checkpointing: bool) -> Modes:
    """The module as the engines train it: exactly these tensors, the prefix in eval mode, layers above it recomputed."""
    module.eval()  # an earlier set's prefix is switched to training with everything else
    set_trainable(module, trainable)
    modes = Modes(module, anatomy, trainable, checkpointing)
    modes.train()
    return modes
