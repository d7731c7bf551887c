"""What DeepSpeed's collectives carry: its own calls, counted where they reach torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import deepspeed.comm.comm as deepspeed_comm
import torch

#: operation: (our name, index of the tensor that counts: the one that is whole)
_COUNTED = {
    "all_reduce": ("all_reduce", 0), "reduce": ("reduce", 0), "broadcast": ("broadcast", 0),
    "all_gather_into_tensor": ("all_gather", 0), "reduce_scatter_tensor": ("reduce_scatter", 1),
    "all_gather": ("other", 0), "reduce_scatter": ("other", 0), "all_to_all_single": ("other", 0),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    operation: str
    numel: int
    dtype: torch.dtype


@contextmanager
def counted() -> Iterator[list[Call]]:
    """The collectives of more than one element that DeepSpeed starts within; ours go past deepspeed.comm and do not count,
    nor do norms and overflow flags, which are single elements."""
    backend, calls = deepspeed_comm.cdb, []
    kept = {name: getattr(backend, name) for name in _COUNTED}

    def wrap(name, call):
        operation, index = _COUNTED[name]

        def counting(*args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            whole = tensors[index]
            if prod(whole.shape) > 1:
                calls.append(Call(operation, whole.numel(), whole.dtype))
            return call(*args, **kwargs)

        return counting

    for name, call in kept.items():
        setattr(backend, name, wrap(name, call))
    try:
        yield calls
    finally:
        for name in kept:
            delattr(backend, name)


def carried(calls: list[Call], operation: str) -> int:
    """Elements x bytes of an operation's calls."""
    return sum(c.numel * c.dtype.itemsize for c in calls if c.operation == operation)
