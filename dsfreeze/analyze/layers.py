"""Watching and replacing the transformer layers of any model, from outside: by hooks, whatever its forward pass looks like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError


@dataclass
class Recording:
    """What the layers took and gave in the last forward pass: `inputs[k]` (batch, positions, d); `outputs[k]` as the layer
    gave it, a tensor or a tuple that begins with one."""

    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)

    def spaces(self) -> list[torch.Tensor]:
        """The latent spaces 0 .. L of a model with one stack of layers."""
        return [self.inputs[0], *(state_of(self.outputs[k]) for k in range(len(self.outputs)))]


def state_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def with_state(output: Any, state: torch.Tensor) -> Any:
    """The same output with another state."""
    return state if isinstance(output, torch.Tensor) else (state, *output[1:])


def blocks_of(module: nn.Module, anatomy: Anatomy) -> list[nn.Module]:
    return [module.get_submodule(layer.path) for layer in anatomy.blocks]


def require_one_stack(anatomy: Anatomy, what: str) -> None:
    """UserError for an encoder-decoder, whose layers are no single chain, and for a model without layers."""
    if not anatomy.blocks or len({layer.stack for layer in anatomy.blocks}) > 1:
        raise UserError(
            f"{what} follows states from layer to layer through one stack, and {anatomy.name} has "
            f"{'two' if anatomy.blocks else 'none'}. Choose scores of the families change, gradient or spectrum."
        )


@contextmanager
def recording(module: nn.Module, anatomy: Anatomy) -> Iterator[Recording]:
    """Within it the recording holds what the last forward pass moved through the layers."""
    found = Recording()
    with ExitStack() as stack:
        for k, block in enumerate(blocks_of(module, anatomy)):

            def note(_: nn.Module, args: Any, kwargs: Any, output: Any, k: int = k) -> None:
                found.inputs[k] = args[0] if args else kwargs["hidden_states"]
                found.outputs[k] = output

            stack.callback(block.register_forward_hook(note, with_kwargs=True).remove)
        yield found


@contextmanager
def replaced(module: nn.Module, anatomy: Anatomy, outputs: Sequence[Any]) -> Iterator[None]:
    """Within it layer k gives `outputs[k]` and computes nothing, unless that is None."""
    blocks = [(block, out) for block, out in zip(blocks_of(module, anatomy), outputs, strict=True) if out is not None]
    before = [vars(block).get("forward") for block, _ in blocks]
    try:
        for block, output in blocks:
            block.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for (block, _), forward in zip(blocks, before, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


@contextmanager
def head_inputs(head: nn.Linear) -> Iterator[list[torch.Tensor]]:
    """Within it the list collects what reaches the output head, which itself computes nothing."""
    found: list[torch.Tensor] = []

    def forward(states: torch.Tensor) -> torch.Tensor:
        found.append(states)
        return states.new_zeros(1).expand(*states.shape[:-1], head.out_features)

    cast(nn.Module, head).forward = forward
    try:
        yield found
    finally:
        del head.forward


def output_head(module: nn.Module, anatomy: Anatomy) -> tuple[str, nn.Linear]:
    """(name of its matrix, module) of the linear map from states to labels or words; UserError when there is none."""
    embeddings = getattr(module, "get_output_embeddings", lambda: None)()
    own = [t for layer in anatomy.layers if layer.name == "head" for t in layer.tensors if len(t.shape) == 2]
    head = embeddings if embeddings is not None else module.get_submodule(own[-1].module) if own else None
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"The deviation is measured against the output head's rows, and {anatomy.name} has no linear output head. Leave "
            "the family 'deviation' out of analyze.scores."
        )
    name = next(n for n, p in module.named_parameters(remove_duplicate=False) if p is head.weight)
    return anatomy.by_name[name].name, head
