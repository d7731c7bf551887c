"""Devices by name: what a planner must know of one, each number with the place it is from. No torch.

Bytes, bytes a second, FLOP/s. FLOP/s are peaks of dense matrix products, as datasheets give them (where a sheet's number
is "with sparsity", half of it); bandwidths are of one direction. What a device really reaches is for calibration to
say. Numbers that no vendor can give (the network, the storage) are assumptions of ours, and their source says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from dsfreeze.errors import UserError, did_you_mean

_MIB = 2**20
#: Figures of a device that must each have a source.
FIGURES = (
    "memory", "bf16_flops", "fp32_flops", "memory_bandwidth", "link_bandwidth", "network_bandwidth", "host_bandwidth",
    "storage_bandwidth", "per_node",
)  # fmt: skip


@dataclass(frozen=True)
class Device:
    """One accelerator (or, for `cpu`, one machine) and the wires at it."""

    name: str
    memory: int
    """What the vendor's tool shows as total (nvidia-smi, rocm-smi); the framework's context is still within it."""
    bf16_flops: float
    fp32_flops: float
    """Of torch's default fp32 product, that is without TF32."""
    memory_bandwidth: float
    link_bandwidth: float
    """To the other devices of a node, all links of the device together, one direction."""
    network_bandwidth: float
    """To other nodes, this device's share of the node's network cards, one direction."""
    host_bandwidth: float
    """To host memory, one direction."""
    storage_bandwidth: float
    """Reading a cache file, all devices of a node together."""
    per_node: int
    """Devices of a node."""
    shared: bool = field(default=False, kw_only=True)
    """Whether the ranks of a node share its memory and speed, as those of a CPU do."""
    sources: Mapping[str, str] = field(repr=False)
    """Where each of `FIGURES` is from."""
    spellings: tuple[str, ...] = field(default=(), repr=False)
    """Other names of it, first of all torch.cuda.get_device_name's."""

    def sharers(self, ranks: int) -> int:
        """How many of so many ranks share one device's figures."""
        return min(ranks, self.per_node) if self.shared else 1

    def flops(self, dtype_bytes: int) -> float:
        """Peak FLOP/s of a product of matrices of 2 (bf16) or 4 (fp32) bytes an element."""
        return self.bf16_flops if dtype_bytes == 2 else self.fp32_flops

    def ring_bandwidth(self, ranks: int) -> float:
        """Bytes a second that every rank of a ring collective over `ranks` devices sends; ranks fill node after node.

        Within a node that is the link. Across nodes rings leave a node through every card whose device takes part, and
        all that a rank sends also passes from node to node: so it is the slower of the link and of the cards of the
        node with the fewest ranks (of 9 ranks on nodes of 8, a single card's).
        """
        if ranks <= self.per_node:
            return self.link_bandwidth
        fewest = ranks % self.per_node or self.per_node
        return min(self.link_bandwidth, fewest * self.network_bandwidth)


def find_device(name: str) -> Device:
    """The device of that name, upper or lower case, or as torch reports it; UserError when it is not a known one.

    Nothing is guessed: an H100 PCIe is no h100 (which is the SXM5), a 40 GB A100 no a100.
    """
    wanted = _plain(name)
    for device in DEVICES.values():
        if wanted in map(_plain, (device.name, *device.spellings)):
            return device
    nearest = next((known for known in DEVICES if known in wanted), wanted)
    raise UserError(f"There is no device '{name}'.{did_you_mean(nearest, DEVICES)}")


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


#: Dense bf16 products a second of one core at 2.5 GHz: two units, 8 lanes, multiply and add. Without AMX, bf16 is no faster.
_CORE_FLOPS = 2 * 8 * 2 * 2.5e9
#: A server's memory channels over its cores; a desktop has more for each of fewer.
_CORE_BANDWIDTH = 6e9


def _this_machine() -> Device:
    """The CPU that this runs on: cores and memory as the operating system says, times nominal figures of a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    nominal = "nominal figure a core x cores that the operating system gives this process; calibrate it"
    return Device(
        name="cpu",
        memory=psutil.virtual_memory().total,
        bf16_flops=cores * _CORE_FLOPS,
        fp32_flops=cores * _CORE_FLOPS,
        memory_bandwidth=cores * _CORE_BANDWIDTH,
        link_bandwidth=1e9,
        network_bandwidth=1e9,
        host_bandwidth=cores * _CORE_BANDWIDTH,
        storage_bandwidth=0.5e9,
        per_node=cores,
        shared=True,
        sources={
            "memory": "physical memory, from the operating system",
            "bf16_flops": f"{nominal} (as fp32: no AMX)",
            "fp32_flops": f"{nominal} (AVX2, two FMA units, 2.5 GHz)",
            "memory_bandwidth": f"{nominal} (6 GB/s)",
            "link_bandwidth": "assumption: gloo between processes of a machine, 1 GB/s; calibrate it",
            "network_bandwidth": "assumption: 10 Gb/s Ethernet, 1 GB/s; calibrate it",
            "host_bandwidth": "the memory bandwidth: host memory is the device's own",
            "storage_bandwidth": "assumption: a SATA SSD, 0.5 GB/s",
            "per_node": "a rank a core; the ranks of a machine share its figures",
        },
    )


_STORAGE = "assumption: one NVMe SSD, PCIe Gen4 x4, reading in sequence at 3.5 GB/s"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet, SXM5"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet, SXM"
_A100 = "NVIDIA A100 80GB Tensor Core GPU datasheet, SXM4"
_L40S = "NVIDIA L40S datasheet"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A, GeForce RTX 4090"
_MI300X = "AMD Instinct MI300X accelerator data sheet"

DEVICES: dict[str, Device] = {
    "h200": Device(
        name="h200",
        memory=143771 * _MIB,
        bf16_flops=989.5e12,
        fp32_flops=67e12,
        memory_bandwidth=4.8e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        storage_bandwidth=3.5e9,
        per_node=8,
        spellings=("NVIDIA H200", "H200 SXM", "NVIDIA H200 141GB HBM3e"),
        sources={
            "memory": "nvidia-smi, total memory of an NVIDIA H200 (141 GB HBM3e): 143771 MiB",
            "bf16_flops": f"{_H200}: 1,979 TFLOPS with sparsity, halved",
            "fp32_flops": f"{_H200}: FP32 67 TFLOPS",
            "memory_bandwidth": f"{_H200}: 4.8 TB/s",
            "link_bandwidth": f"{_H200}: NVLink 900 GB/s both ways, halved",
            "network_bandwidth": "assumption: one 400 Gb/s card a GPU, as in a DGX H200",
            "host_bandwidth": f"{_H200}: PCIe Gen5 x16, 128 GB/s both ways, halved",
            "storage_bandwidth": _STORAGE,
            "per_node": "HGX H200, 8 GPUs",
        },
    ),
    "h100": Device(
        name="h100",
        memory=81559 * _MIB,
        bf16_flops=989.5e12,
        fp32_flops=67e12,
        memory_bandwidth=3.35e12,
        link_bandwidth=450e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        storage_bandwidth=3.5e9,
        per_node=8,
        spellings=("NVIDIA H100 80GB HBM3", "NVIDIA H100", "H100 SXM", "H100 SXM5", "NVIDIA H100 SXM5 80GB"),
        sources={
            "memory": "nvidia-smi, total memory of an NVIDIA H100 80GB HBM3: 81559 MiB",
            "bf16_flops": f"{_H100}: 1,979 TFLOPS with sparsity, halved",
            "fp32_flops": f"{_H100}: FP32 67 TFLOPS",
            "memory_bandwidth": f"{_H100}: 3.35 TB/s",
            "link_bandwidth": f"{_H100}: NVLink 900 GB/s both ways, halved",
            "network_bandwidth": "assumption: one 400 Gb/s card a GPU, as in a DGX H100",
            "host_bandwidth": f"{_H100}: PCIe Gen5 x16, 128 GB/s both ways, halved",
            "storage_bandwidth": _STORAGE,
            "per_node": "HGX H100, 8 GPUs",
        },
    ),
    "a100": Device(
        name="a100",
        memory=81920 * _MIB,
        bf16_flops=312e12,
        fp32_flops=19.5e12,
        memory_bandwidth=2.039e12,
        link_bandwidth=300e9,
        network_bandwidth=25e9,
        host_bandwidth=32e9,
        storage_bandwidth=3.5e9,
        per_node=8,
        spellings=("NVIDIA A100-SXM4-80GB", "A100 80GB SXM", "A100 SXM4 80GB"),
        sources={
            "memory": "nvidia-smi, total memory of an NVIDIA A100-SXM4-80GB: 81920 MiB",
            "bf16_flops": f"{_A100}: 312 TFLOPS, dense",
            "fp32_flops": f"{_A100}: FP32 19.5 TFLOPS",
            "memory_bandwidth": f"{_A100}: 2,039 GB/s",
            "link_bandwidth": f"{_A100}: NVLink 600 GB/s both ways, halved",
            "network_bandwidth": "assumption: one 200 Gb/s card a GPU, as in a DGX A100",
            "host_bandwidth": f"{_A100}: PCIe Gen4 x16, 64 GB/s both ways, halved",
            "storage_bandwidth": _STORAGE,
            "per_node": "HGX A100, 8 GPUs",
        },
    ),
    "l40s": Device(
        name="l40s",
        memory=46068 * _MIB,
        bf16_flops=362.05e12,
        fp32_flops=91.6e12,
        memory_bandwidth=864e9,
        link_bandwidth=32e9,
        network_bandwidth=12.5e9,
        host_bandwidth=32e9,
        storage_bandwidth=3.5e9,
        per_node=8,
        spellings=("NVIDIA L40S",),
        sources={
            "memory": "nvidia-smi, total memory of an NVIDIA L40S (48 GB, ECC on): 46068 MiB",
            "bf16_flops": f"{_L40S}: 362.05 TFLOPS, dense",
            "fp32_flops": f"{_L40S}: FP32 91.6 TFLOPS",
            "memory_bandwidth": f"{_L40S}: 864 GB/s",
            "link_bandwidth": f"{_L40S}: no NVLink; PCIe Gen4 x16, 64 GB/s both ways, halved, which the node shares",
            "network_bandwidth": "assumption: one 200 Gb/s card for two GPUs",
            "host_bandwidth": f"{_L40S}: PCIe Gen4 x16, 64 GB/s both ways, halved",
            "storage_bandwidth": _STORAGE,
            "per_node": "assumption: a PCIe server of 8 cards",
        },
    ),
    "rtx4090": Device(
        name="rtx4090",
        memory=24564 * _MIB,
        bf16_flops=165.2e12,
        fp32_flops=82.6e12,
        memory_bandwidth=1008e9,
        link_bandwidth=32e9,
        network_bandwidth=1.25e9,
        host_bandwidth=32e9,
        storage_bandwidth=3.5e9,
        per_node=4,
        spellings=("NVIDIA GeForce RTX 4090", "GeForce RTX 4090", "NVIDIA RTX 4090", "4090"),
        sources={
            "memory": "nvidia-smi, total memory of an NVIDIA GeForce RTX 4090 (24 GB): 24564 MiB",
            "bf16_flops": f"{_ADA}: BF16 with FP32 accumulation, 165.2 TFLOPS, dense",
            "fp32_flops": f"{_ADA}: FP32 82.6 TFLOPS",
            "memory_bandwidth": f"{_ADA}: 1008 GB/s",
            "link_bandwidth": f"{_ADA}: no NVLink; PCIe Gen4 x16, by way of the host, since it has no peer access",
            "network_bandwidth": "assumption: a 40 Gb/s card for four GPUs",
            "host_bandwidth": f"{_ADA}: PCIe Gen4 x16, 64 GB/s both ways, halved",
            "storage_bandwidth": _STORAGE,
            "per_node": "assumption: a workstation of 4 cards",
        },
    ),
    "mi300x": Device(
        name="mi300x",
        memory=196592 * _MIB,
        bf16_flops=1307.4e12,
        fp32_flops=163.4e12,
        memory_bandwidth=5.3e12,
        link_bandwidth=448e9,
        network_bandwidth=50e9,
        host_bandwidth=64e9,
        storage_bandwidth=3.5e9,
        per_node=8,
        spellings=("AMD Instinct MI300X", "AMD Instinct MI300X OAM", "AMD Instinct MI300X VF", "Instinct MI300X"),
        sources={
            "memory": "rocm-smi, total memory of an AMD Instinct MI300X (192 GB HBM3): 196592 MiB",
            "bf16_flops": f"{_MI300X}: bfloat16 1307.4 TFLOPs, dense",
            "fp32_flops": f"{_MI300X}: FP32 163.4 TFLOPs",
            "memory_bandwidth": f"{_MI300X}: 5.3 TB/s",
            "link_bandwidth": f"{_MI300X}: 7 Infinity Fabric links of 128 GB/s both ways, halved",
            "network_bandwidth": "assumption: one 400 Gb/s card a GPU",
            "host_bandwidth": f"{_MI300X}: PCIe Gen5 x16, 128 GB/s both ways, halved",
            "storage_bandwidth": _STORAGE,
            "per_node": "AMD Instinct MI300X platform, 8 GPUs",
        },
    ),
    "cpu": _this_machine(),
}
