"""Seconds of an optimizer step by a roofline of products, memory and links, and what a measured run says about it.

    products       FLOPs / (0.5 peak), a backward one's as a forward one's
    memory         bytes / (0.8 bandwidth), added to the products, since kernels run one after another:
                   weights b P a forward, b P_above a backward and a recomputation; b P_t gradients written, and `REDUCED` b P_t through the bucket (copied
                   in, flattened, divided, copied back, cut out, each a read and a write: DeepSpeed's `stage_1_and_2.py`);
                   of a layer's activations (all it could store) 2 x in a forward pass (written, read), 3 x in a backward one
                   (stored ones read, gradients written and read); of an adapter's sides `_adapter_bytes`, by operation
    optimizer      48 bytes an element stepped in fp32, 52 in bf16 (AdamW 28; gradient flattened, measured and clipped; the rounded weight written)
    links          bytes sent (`communication`) / ring bandwidth. Gathers of stage 3 hide behind a pass of equal length; the rest is
                   waited for, as in our configurations (overlap_comm is on at stage 3 alone)
    host           bytes to and from host memory / PCIe, the offloaded optimizer's 40 bytes an element at `HOST_STEP`, and a prefix
                   cache's bytes at the rank's share of the storage, or of the way to host memory; none of it hides

The two efficiencies are assumptions of ours, and so is `HOST_STEP`. A calibration replaces the absolute level: the factor between
one measured run and this formula at the same setting multiplies everything that the device does itself, links and host
apart. So ratios between plans come from the formula, and seconds from the run.

Measured (benchmarks/planner.py: one CPU thread, fp32, stage 2, one rank; Llamas of 12 x 384 and 6 x 512; calibrated on full
tuning): step times of ten other plans over full tuning's are off by -4.6 to +3.9 %, and by -7.7 and -5.3 % for LoRA, whose
thin products are slower than their bytes. Why the formula is this one: of single products, those of a backward pass take
0.86 to 1.08 times as long as a forward one of equal FLOPs; without DeepSpeed a backward pass takes 1.9 times a forward
one, within it 2.1 to 2.3 times, and the difference, 4 to 5 ns an element, is what the formula's way through the bucket
takes; adapters of rank 8 make a forward pass 1.2 times as long, though they add 3 % of FLOPs. The optimizer's share of
full tuning is 7 %, and the formula's 9 %. bf16, several ranks, other stages and accelerators: not measured.

Left out: kernel launches (small models on accelerators are slower than this), stragglers, evaluation, data loading, padding;
DoRA's norms and scaling.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsfreeze.estimate.communication import Communication
from dsfreeze.hardware import Device

EFFICIENCY, BANDWIDTH = 0.5, 0.8
#: Times that a gradient is read or written on its way through the bucket.
REDUCED = 10
#: Bytes a second at which a node's host steps an offloaded optimizer, all ranks together (assumption).
HOST_STEP = 100e9
#: Bytes that a step moves an element, by the model's bytes an element; offloaded ones see no rounding.
STEPPED = {2: 52, 4: 48}
HOST_STEPPED = 40


@dataclass(frozen=True)
class Work:
    """What one rank's device does in one optimizer step: FLOPs of forward (recomputation included) and backward products, bytes
    moved by the passes, elements that it steps, on the device or on the host, and bytes that it reads from a prefix cache, on disk
    or in host memory."""

    forward_flops: float
    backward_flops: float
    pass_bytes: float
    stepped: int
    on_host: bool = False
    cache_bytes: float = 0.0
    cache_in_memory: bool = False


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step on one rank. `links` is what is waited for."""

    products: float
    memory: float
    optimizer: float
    links: float
    host: float

    @property
    def total(self) -> float:
        return self.products + self.memory + self.optimizer + self.links + self.host


def seconds(
    device: Device,
    work: Work,
    sent: Communication,
    *,
    stage: int,
    world_size: int,
    dtype_bytes: int,
    scale: float = 1.0,
) -> Seconds:
    """The formula above; `scale` is a calibration's factor."""
    part = 1 / device.sharers(world_size)
    peak, bandwidth = part * EFFICIENCY * device.flops(dtype_bytes), part * BANDWIDTH * device.memory_bandwidth
    products = scale * (work.forward_flops + work.backward_flops) / peak
    memory = scale * work.pass_bytes / bandwidth
    stepped = (
        HOST_STEPPED / HOST_STEP * min(world_size, device.per_node)
        if work.on_host
        else scale * STEPPED[dtype_bytes] / bandwidth
    )
    ring = device.ring_bandwidth(world_size)
    hidden = sent.forward_weights + sent.backward_weights if stage == 3 else 0
    waited = (sent.sent - hidden) / ring + max(0.0, hidden / ring - products - memory)
    host = (sent.to_host + sent.from_host) / device.host_bandwidth
    reading = reading_seconds(device, work.cache_bytes, world_size, in_memory=work.cache_in_memory)
    return Seconds(products, memory, work.stepped * stepped, waited, host + reading)


def reading_seconds(device: Device, size: float, world_size: int, *, in_memory: bool = False) -> float:
    """Seconds in which each of a node's ranks reads `size` bytes of a prefix cache: from storage, which they share, or from host
    memory over the device's own way, which only the ranks of a CPU share."""
    if in_memory:
        return size * device.sharers(world_size) / device.host_bandwidth
    return size * min(world_size, device.per_node) / device.storage_bandwidth
