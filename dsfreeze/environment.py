"""Where a run took place: versions, platform, device. For the record; never environment variables, which may hold secrets."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

PACKAGES = ("dsfreeze", "torch", "deepspeed", "transformers", "datasets", "peft", "safetensors", "numpy")


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """A JSON-able description of this rank's surroundings."""
    return {
        "versions": {package: _version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "world_size": world_size,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
