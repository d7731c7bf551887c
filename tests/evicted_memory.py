"""Prints what a run with (argument 2: true) or without its prefix holds, in bytes, as JSON; argument 1 is the folder of its model and data.

A small run of the same kind goes before, so that what is imported on the way is not counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from evicted_kit import Stepper, evicted
from tiny_runs import tiny_recipe

from dsfreeze.engine.memory import Meter, freed_memory_given_back

LAYERS, HIDDEN = 12, 768


def measure(folder: Path, evicts: bool) -> dict[str, int]:
    meter = Meter(torch.device("cpu"))
    recipe = tiny_recipe(folder, freeze={"strategy": "bottom", "fraction": 0.84})  # 10 of 12
    recipe = evicted(recipe) if evicts else recipe
    start, _ = meter.read(reset_peak=True)
    stepper = Stepper(recipe)
    _, building = meter.read()
    with freed_memory_given_back():  # gradients, between steps
        for number in range(3):
            stepper.step(number)
        held, _ = meter.read()
    return {"start": start, "building": building - start, "held": held - start}


def main(folder: Path, evicts: bool) -> None:
    small = tiny_recipe(folder / "small")
    warm = Stepper(evicted(small) if evicts else small)
    for number in range(2):
        warm.step(number)
    del warm
    print(json.dumps(measure(folder / "large", evicts)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "true")
