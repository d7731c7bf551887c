"""Models made without training, and how far a model has moved. One process's work; the arithmetic of merging is merging.py's."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from dsfreeze.job import load_task
from dsfreeze.model import load_tokenizer
from dsfreeze.recipe import Recipe


def start_folder(recipe: Recipe, folder: Path) -> Path:
    """The recipe's model as a folder, written once."""
    if not folder.is_dir():
        aside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        _, _, module = load_task(recipe)
        module.save_pretrained(aside)
        load_tokenizer(recipe.model).save_pretrained(aside)
        os.replace(aside, folder)
    return folder


def interpolated(start: Path, end: Path, alpha: float, out: Path) -> None:
    """(1 - alpha) start + alpha end."""
    from dsfreeze.merging import interpolate

    interpolate(start, end, alpha, out)


def averaged(folders: Sequence[Path], out: Path) -> None:
    """The uniform mean."""
    from dsfreeze.merging import average

    average(folders, out)


def half_reset(start: Path, end: Path, recipe: Recipe, out: Path) -> None:
    """`end` with everything put back to `start` that the recipe's plan freezes."""
    from dsfreeze.merging import reset_frozen

    reset_frozen(start, end, recipe, out)


def update_norm(start: Path, end: Path) -> float:
    """The L2 norm of end - start over all weights of two model folders, a tied one once; summed in float64, tensor by tensor."""
    one, other = _tensors(start), _tensors(end)
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    squares = []
    for name in one:
        before, after = (_read(files[name], name).double() for files in (one, other))
        squares.append(float((after - before).square().sum()))
    return math.sqrt(math.fsum(squares))


def _tensors(folder: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
