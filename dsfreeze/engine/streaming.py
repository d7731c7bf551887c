"""A backward pass that holds one gradient at a time: each is handed on as the pass reaches it, and dropped.

Activations are recomputed layer by layer where the model can, so that beside the weights there are one layer's activations,
one state a layer, and one tensor's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine.groups import by_name
from dsfreeze.engine.memory import freed_memory_given_back
from dsfreeze.engine.modes import Modes, set_trainable

Take = Callable[[str, torch.Tensor], None]


@contextmanager
def streamed_gradients(module: nn.Module, anatomy: Anatomy, names: Iterable[str], take: Take) -> Iterator[None]:
    """Within it, backward passes give `take(name, gradient)` each named tensor's whole gradient, once a pass."""
    names = anatomy.in_order(names)
    named: dict[str, Any] = by_name(module)
    can_recompute = all(hasattr(module.get_submodule(layer.path), "gradient_checkpointing") for layer in anatomy.blocks)
    set_trainable(module, names)
    modes = Modes(module, anatomy, names, checkpointing=can_recompute)
    handles = [named[n].register_post_accumulate_grad_hook(partial(_hand_on, n, take)) for n in names]
    try:
        modes.train()
        with freed_memory_given_back():
            yield
    finally:
        for handle in handles:
            handle.remove()
        modes.close()
        set_trainable(module, ())
        module.eval()


def _hand_on(name: str, take: Take, parameter: nn.Parameter) -> None:
    gradient, parameter.grad = parameter.grad, None
    assert gradient is not None, "the hook runs when a gradient has been added"
    take(name, gradient)
