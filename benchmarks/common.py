"""What the benchmarks share: the machine's name, medians with spread, and the JSON beside each script."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """What a reader must know to place a figure."""
    import torch

    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "transformers")},
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {"median": round(middle, 5), "q1": round(low, 5), "q3": round(high, 5), "rounds": len(values)}


def write(script: str, result: dict[str, Any]) -> None:
    """Put the result beside the script, and on standard output."""
    text = json.dumps(result, indent=1)
    Path(script).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
