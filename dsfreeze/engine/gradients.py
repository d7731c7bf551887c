"""Where DeepSpeed 0.19.8 holds a step's gradients between backward and step: reduced over ranks, not yet clipped."""

from __future__ import annotations

from typing import Any

import torch


def gradient_shares(engine: Any) -> list[torch.Tensor]:
    """This rank's share of the gradient of each of `flats_of`, 1-D (trailing padding left out) or whole."""
    wrapper = engine.optimizer
    masters = getattr(wrapper, "single_partition_of_fp32_groups", None) or getattr(
        wrapper, "fp32_partitioned_groups_flat", None
    )
    if masters is None:
        return [_whole(p) for p in _weights(wrapper)]
    if getattr(wrapper, "cpu_offload", False) or getattr(wrapper, "offload_optimizer", False):
        return [master.grad for master in masters]
    held = wrapper.averaged_gradients
    return [torch.cat([g.reshape(-1) for g in held[number]]) for number in range(len(masters))]


def _weights(wrapper: Any) -> list[torch.nn.Parameter]:
    groups = getattr(wrapper, "fp16_groups", None) or [group["params"] for group in wrapper.param_groups]
    return [parameter for group in groups for parameter in group]


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
