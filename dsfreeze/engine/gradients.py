"""Where DeepSpeed 0.19.8 holds a step's gradients between backward and step: reduced over ranks, not yet clipped.

What it steps with is, by wrapper: `.grad` of the weights (stage 0), the lists in `averaged_gradients` (stages 1 to 3), and
`.grad` of the masters where the optimizer is offloaded, with norms that were taken when the gradients arrived there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dsfreeze.engine.rebuild import synchronize


def gradient_shares(engine: Any) -> list[torch.Tensor]:
    """This rank's share of the gradient of each of `flats_of`, 1-D (trailing padding left out) or whole."""
    wrapper = engine.optimizer
    masters = _masters(wrapper)
    if masters is None:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in _weights(wrapper)]
    if _offloads(wrapper):
        synchronize()  # copies from a GPU may still be on their way
        return [_offloaded(master) for master in masters]
    held = wrapper.averaged_gradients
    return [torch.cat([g.reshape(-1) for g in held[number]]) for number in range(len(masters))]


def gradient_views(engine: Any) -> list[list[torch.Tensor]]:
    """The same as the tensors themselves, in place: for each of `flats_of` contiguous ones that are, end to end, its share."""
    wrapper = engine.optimizer
    masters = _masters(wrapper)
    if masters is None:
        return [[whole_gradient(p)] for p in _weights(wrapper)]
    if _offloads(wrapper):
        synchronize()
        return [[_offloaded(master)] for master in masters]
    held = wrapper.averaged_gradients
    for number in range(len(masters)):
        held[number] = [g.contiguous() for g in held[number]]
    return [held[number] for number in range(len(masters))]


def renew_norms(engine: Any) -> None:
    """After an edit: with an offloaded optimizer, of each parameter the norm that clipping goes by."""
    wrapper = engine.optimizer
    masters = _masters(wrapper)
    if masters is None or not _offloads(wrapper):
        return
    for param_id, (number, *_, at, numel) in wrapper.grad_position.items():
        wrapper.norm_for_param_grads[param_id] = masters[number].grad.view(-1).narrow(0, at, numel).norm(2)


def whole_gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The parameter's gradient in place, contiguous; zeros are put there where the passes did not reach it."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    parameter.grad = gradient.contiguous()
    return parameter.grad


def view_of(tensors: Sequence[torch.Tensor], at: int, numel: int) -> torch.Tensor:
    """Elements at .. at + numel - 1 of the tensors laid end to end, a 1-D view; they lie within one of them."""
    for tensor in tensors:
        if at < tensor.numel():
            return tensor.view(-1)[at : at + numel]
        at -= tensor.numel()
    raise AssertionError("the layout does not fit the gradients")


def _masters(wrapper: Any) -> list[torch.Tensor] | None:
    ranges = getattr(wrapper, "single_partition_of_fp32_groups", None)
    return ranges or getattr(wrapper, "fp32_partitioned_groups_flat", None)


def _offloads(wrapper: Any) -> bool:
    return bool(getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False))


def _offloaded(master: torch.Tensor) -> torch.Tensor:
    assert master.grad is not None, "where the optimizer is offloaded, masters keep their gradients' buffers"
    return master.grad


def _weights(wrapper: Any) -> list[torch.nn.Parameter]:
    groups = getattr(wrapper, "fp16_groups", None) or [group["params"] for group in wrapper.param_groups]
    return [parameter for group in groups for parameter in group]
