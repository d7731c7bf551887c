"""What is on and off in the module while it trains: the prefix evaluates, layers above it train and may recompute.

The prefix runs in eval mode, so that what leaves it is a function of its input alone (no dropout) and may be cached.
Autograd records nothing there, because nothing in it needs a gradient; what must be avoided for that is transformers'
`enable_input_require_grads`, which its own checkpointing switch calls and which re-opens the graph down to the input.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.engine.groups import by_name
from dsfreeze.errors import UserError


def takes(module: nn.Module, argument: str) -> bool:
    """Whether the module's forward pass has an argument of that name."""
    return argument in inspect.signature(module.forward).parameters


def set_trainable(module: nn.Module, names: Iterable[str]) -> None:
    """Make exactly the named parameters trainable."""
    named = by_name(module)
    train_exactly(module, (named[name] for name in names))


def train_exactly(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Make exactly these parameters trainable; a gradient that one has from before the change is dropped."""
    chosen = {id(parameter) for parameter in parameters}
    for parameter in module.parameters():
        if parameter.requires_grad != (id(parameter) in chosen):
            parameter.requires_grad_(id(parameter) in chosen)
            parameter.grad = None


class Modes:
    """Switches a module between training (prefix in eval mode) and evaluation.

    Modules without parameters that stand beside the layers (GPT-2's `drop`, T5's stack dropout, a classifier's dropout)
    are in eval mode until the last prefix layer has run, and in training mode from there on. Where the prefix's weights are
    evicted, its layers have a place in the anatomy and no tensors.
    """

    def __init__(self, module: nn.Module, anatomy: Anatomy, trainable: Iterable[str], checkpointing: bool) -> None:
        self.module = module
        prefix = anatomy.prefix(trainable)
        self.frozen: list[nn.Module] = []
        self.loose: list[nn.Module] = []
        if prefix:
            named = by_name(module)
            evicted = {id(module.get_submodule(layer.path)) for layer in prefix if layer.is_block and not layer.tensors}
            self._sort(module, {id(named[t.name]) for layer in prefix for t in layer.tensors}, evicted)
        ends = _modules_of(module, prefix[-1]) if self.loose else ()
        self._handles = [m.register_forward_hook(self._leave_prefix) for m in ends]
        self._checkpointed = _checkpoint(module, anatomy.layers[len(prefix) :]) if checkpointing else []

    def _sort(self, module: nn.Module, prefix: set[int], evicted: set[int]) -> None:
        if id(module) in evicted:
            return
        held = {id(p) for p in module.parameters()}
        if not held:
            self.loose.append(module)
        elif held <= prefix:
            self.frozen.append(module)
        elif held & prefix or any(id(part) in evicted for part in module.modules()):
            for child in module.children():
                self._sort(child, prefix, evicted)

    def train(self) -> None:
        """Training mode, whoever called `train()` or `eval()` in between; cheap when nobody did."""
        if not self.module.training or any(m.training for m in self.frozen):
            self.module.train()
            for module in self.frozen:
                module.eval()
        for module in self.loose:
            module.eval()

    def evaluate(self) -> None:
        """Evaluation mode throughout."""
        if self.module.training:
            self.module.eval()

    def _leave_prefix(self, *_: object) -> None:
        for module in self.loose:
            module.train(self.module.training)

    def close(self) -> None:
        """Take every hook and switch away again."""
        for handle in self._handles:
            handle.remove()
        for block in self._checkpointed:
            block.gradient_checkpointing = False


def _modules_of(module: nn.Module, layer: Layer) -> Iterator[nn.Module]:
    paths = [layer.path] if layer.path else dict.fromkeys(t.module for t in layer.tensors)
    return map(module.get_submodule, paths)


def _checkpoint(module: nn.Module, layers: Iterable[Layer]) -> list[Any]:
    """Recompute the given layers' blocks in the backward pass, non-reentrant.

    The switch is set on the blocks themselves: transformers' own would set it on every block and add the input hook.
    """
    blocks: list[Any] = [module.get_submodule(layer.path) for layer in layers if layer.is_block]
    for block in blocks:
        if not hasattr(block, "gradient_checkpointing"):
            raise UserError(
                f"train.gradient_checkpointing: {type(block).__name__} of {type(module).__name__} cannot recompute its "
                "activations. Set train.gradient_checkpointing=false, or lower train.per_device_train_batch_size."
            )
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    return blocks
