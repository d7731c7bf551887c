"""Who this process is among its peers, and what it computes on; from the environment, which launchers set."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from dsfreeze.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Who this process is: `rank` of `world_size`, number `local_rank` on its machine, computing on `device`."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def read_ranks() -> Ranks:
    """From RANK, WORLD_SIZE and LOCAL_RANK, which launchers set; alone without them. UserError when they are absurd."""
    rank, world_size, local_rank = (_number(n, d) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if not 0 <= rank < world_size:
        raise UserError(
            f"RANK={rank} is not below WORLD_SIZE={world_size}: start with deepspeed, torchrun, or neither set."
        )
    return Ranks(rank, world_size, local_rank, device_of(local_rank))


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit():
        raise UserError(
            f"The environment variable {variable} is '{text}', not a number. A launcher sets it; unset it to run alone."
        )
    return int(text)


def device_of(local_rank: int) -> torch.device:
    """The GPU of that number, or the CPU where there is none (or DS_ACCELERATOR=cpu says so)."""
    if os.environ.get("DS_ACCELERATOR", "cuda") != "cuda" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError(
            f"LOCAL_RANK={local_rank}, but this machine shows {count} GPUs. Launch at most that many ranks here."
        )
    return torch.device("cuda", local_rank)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, had no room."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
