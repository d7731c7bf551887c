"""What a measured run says about the formulas' level: seconds of its steps over the seconds predicted for them. No torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.estimate.price import Price
from dsfreeze.hardware import Device, find_device
from dsfreeze.recipe import Recipe
from dsfreeze.record import RecordData, read_record
from dsfreeze.setting import workload_of

#: Steps left out at the start of a run: they compile, allocate, and warm caches.
WARMUP = 2


@dataclass(frozen=True)
class Calibration:
    """`scale` multiplies what a device does itself, links and host apart; `source` says where it is from."""

    scale: float
    source: str


def calibrate(folder: Path, device: Device, price_of: Callable[[Recipe, int, int], Price]) -> Calibration:
    """The scale that makes `price_of(recipe, ranks, positions of a sequence)` take as long as the run in `folder` did.

    UserError when the run has no steps to go by, was on another kind of device, or was so short of work that links took all its time.
    """
    record = read_record(folder)
    world_size = _require_device(record, device)
    steps = record.steps[WARMUP:]
    if not steps:
        raise UserError(
            f"{folder} has {len(record.steps)} steps, and the first {WARMUP} do not count: run 3 or more, best 10."
        )
    recipe = Recipe.model_validate(record.recipe)
    measured = statistics.median(float(step["seconds"]) for step in steps)
    length = _positions(recipe, statistics.median(float(step["tokens"]) for step in steps), world_size)
    predicted = price_of(recipe, world_size, length).on(device)
    own = predicted.products + predicted.memory + predicted.optimizer
    scale = (measured - predicted.links - predicted.host) / own
    if scale <= 0:
        raise UserError(
            f"The steps of {folder} took {measured:.3f} s, and links alone would take {predicted.links + predicted.host:.3f} s by {device.name}'s "
            "figures: it cannot be calibrated by. Measure on one device."
        )
    return Calibration(scale, f"{folder} ({len(steps)} steps, median {measured:.3f} s)")


def _require_device(record: RecordData, device: Device) -> int:
    """The run's ranks, once it is known that it ran on such a device."""
    environment: dict[str, Any] = record.environment
    name = str(environment.get("device", "unknown"))
    if name == "unknown" or find_device(name).name != device.name:
        raise UserError(
            f"{record.folder} ran on {name}, and a calibration holds for its own device alone; --device says {device.name}."
        )
    return int(environment.get("world_size", 1))


def _positions(recipe: Recipe, tokens: float, world_size: int) -> int:
    """Mean length of a sequence, from the tokens of a step."""
    work = workload_of(recipe)
    sequences = work.micro_batch_size * work.gradient_accumulation_steps * world_size
    return max(1, min(recipe.data.max_length, round(tokens / sequences)))
