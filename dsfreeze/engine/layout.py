"""Where DeepSpeed 0.19.8's wrappers keep a rank's masters and gradients, as our layouts. Reads private attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dsfreeze.engine.flats import Flat, Pieces, Range, Slot, whole


def flats_of(engine: Any, rank: int, world_size: int) -> list[Flat]:
    """The tensors that a DeepSpeed engine's AdamW steps on this rank, in model order."""
    wrapper, names = engine.optimizer, engine.param_names
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3
        return list(_pieces(wrapper, names, rank, world_size))
    if hasattr(wrapper, "single_partition_of_fp32_groups"):  # stages 1 and 2
        return list(_ranges(wrapper, names, rank, world_size))
    if hasattr(wrapper, "fp32_groups"):  # stage 0 in bf16
        pairs = [
            p for lp, hp in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True) for p in zip(lp, hp, strict=True)
        ]
        return [whole(names[weight], master) for weight, master in pairs]
    return [whole(names[p], p) for group in wrapper.param_groups for p in group["params"]]


def group_numbers(engine: Any) -> list[int]:
    """For each of `flats_of`, the number of its parameter group."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "sub_group_to_group_id"):
        return [wrapper.sub_group_to_group_id[n] for n in range(len(wrapper.fp32_partitioned_groups_flat))]
    return [number for number, group in enumerate(wrapper.param_groups) for _ in group["params"]]


def holds_gradients(engine: Any) -> bool:
    """Whether there were backward passes since the last optimizer step. The engine's own count of micro-steps does not
    tell: it counts calls of `step`, of which accelerate and unmanaged accumulation make but one."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):  # stage 3 counts at the next forward pass
        return bool(wrapper.micro_step_id > 0 or wrapper._epilogue_ran_this_backward)
    if hasattr(wrapper, "single_partition_of_fp32_groups"):
        return bool(wrapper.micro_step_id >= 0)
    return any(p.grad is not None for p in engine.module.parameters() if p.requires_grad)


def _ranges(wrapper: Any, names: dict, rank: int, world_size: int) -> Iterator[Flat]:
    # round_robin_gradients reorders the tensors of a group; the offsets are those of the reordered list
    layouts = zip(
        wrapper.single_partition_of_fp32_groups,
        wrapper.round_robin_bit16_groups,
        wrapper.round_robin_bit16_offsets,
        strict=True,
    )
    for master, parameters, offsets in layouts:
        slots = tuple(Slot(names[p], tuple(p.shape), at) for p, at in zip(parameters, offsets, strict=True))
        yield Range(master, slots, rank, world_size)


def _pieces(wrapper: Any, names: dict, rank: int, world_size: int) -> Iterator[Flat]:
    for master, parameters in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True):
        slots, at = [], 0
        for parameter in parameters:
            slots.append(Slot(names[parameter], tuple(parameter.ds_shape), at))
            at += parameter.partition_numel()
        yield Pieces(master, tuple(slots), rank, world_size)


def gradient_buffers(engine: Any) -> Iterator[torch.Tensor | None]:
    """Gradients that DeepSpeed holds outside `.grad` of the parameters; communication buckets are not among them."""
    wrapper = engine.optimizer
    yield getattr(wrapper, "grad_partitions_flat_buffer", None)
    for held in ("averaged_gradients", "all_grad_tensors", "accumulated_grads_in_cpu"):
        for tensors in getattr(wrapper, held, {}).values():
            yield from [tensors] if isinstance(tensors, torch.Tensor) else tensors or ()
    for held in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups"):
        for masters in getattr(wrapper, held, ()):
            yield from [m.grad for m in ([masters] if isinstance(masters, torch.Tensor) else masters)]
    for group in getattr(wrapper, "bit16_groups", ()):
        yield from [getattr(parameter, "grad_accum", None) for parameter in group]
