"""`freeze.mask_file`: safetensors of booleans by tensor name, true where an element may train. Laid over any strategy's plan.

Such files are written by hand, or by `retain.method packnet`. Read without torch: a header of JSON, then a byte an element.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import parse_json, sha256_of
from dsfreeze.plan import FreezePlan, Mask

#: Longest header that safetensors allows, in bytes.
LONGEST = 100_000_000


@dataclass(frozen=True)
class Entry:
    """A tensor in the file: its shape, and how many of its elements are true."""

    shape: tuple[int, ...]
    count: int


def with_masks(plan: FreezePlan, anatomy: Anatomy, file: Path) -> FreezePlan:
    """The plan, in which of the tensors that the file names the true elements alone train. A tensor without any does not train at
    all; one of which all are true needs no mask. UserError when the file is none, or is not about this model."""
    if plan.adapter is not None:
        raise UserError("freeze.mask_file masks a model's own weights, and freeze.adapter trains others; keep one.")
    entries = read_entries(file)
    for name, entry in entries.items():
        if name not in anatomy.by_name:
            raise UserError(
                f"freeze.mask_file: {file} masks '{name}', which {anatomy.name} lacks.{did_you_mean(name, anatomy.by_name)}"
            )
        if entry.shape != (shape := tuple(anatomy.by_name[name].shape)):
            raise UserError(
                f"freeze.mask_file: {file} masks '{name}' as {list(entry.shape)}, and the tensor is {list(shape)}."
            )
    names = {anatomy.by_name[name].name: entry for name, entry in entries.items()}
    both = [mask.tensor for mask in plan.masks if mask.tensor in names]
    if both:
        raise UserError(
            f"freeze.mask_file masks '{both[0]}', of which strategy '{plan.strategy}' trains a part by itself."
        )
    whole = {name for name, entry in names.items() if entry.count == 0}
    phases = tuple(
        replace(phase, trainable=tuple(name for name in phase.trainable if name not in whole)) for phase in plan.phases
    )
    trained, digest = {name for phase in phases for name in phase.trainable}, sha256_of(file)
    masks = tuple(
        Mask(t.name, names[t.name].count, file=str(file), sha256=digest)
        for t in anatomy.tensors
        if t.name in trained and t.name in names and names[t.name].count < t.numel
    )
    return replace(plan, phases=phases, masks=(*plan.masks, *masks))


def read_entries(file: Path) -> dict[str, Entry]:
    """What the file holds; UserError unless it is safetensors of booleans."""
    try:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if len(content) < 8 or length > min(LONGEST, len(content) - 8):
            raise ValueError("it is cut short, or no safetensors file")
        header, data = parse_json(content[8 : 8 + length]), memoryview(content)[8 + length :]
        return {name: _entry(name, value, data) for name, value in header.items() if name != "__metadata__"}
    except FileNotFoundError:
        raise UserError(f"freeze.mask_file: there is no file '{file}'.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"freeze.mask_file: '{file}' cannot be read: {error}. It is a safetensors file of booleans by tensor name."
        ) from None


def _entry(name: str, value: dict[str, Any], data: memoryview) -> Entry:
    if value["dtype"] != "BOOL":
        raise ValueError(f"'{name}' is {value['dtype']}, not BOOL")
    shape, (first, last) = tuple(map(int, value["shape"])), map(int, value["data_offsets"])
    mask, numel = bytes(data[first:last]), prod(shape)
    if len(mask) != numel or mask.count(0) + mask.count(1) != numel:
        raise ValueError(f"'{name}' is not {numel} booleans")
    return Entry(shape, mask.count(1))
