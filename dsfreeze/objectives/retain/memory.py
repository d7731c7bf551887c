"""The folder that a task leaves for later ones (`retain.remember`), and reading what earlier ones left (`retain.memory`).

    MEMORY/
      memory.safetensors  what the method keeps, by key; whatever a rank reads in part is 1-D
      examples.jsonl      kept training examples, tokenised, each with the number of its task, counted from 1
      trains.safetensors  packnet alone: of each tensor which elements later tasks may train, for `freeze.mask_file`
      manifest.json       written last: format, method, kind of task, how many tasks, digest of the model's layers, checksums

Nothing in it depends on the ZeRO stage or the world size. Written under another name and renamed when whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dsfreeze.checkpoint import swap
from dsfreeze.engine.process import agree, together
from dsfreeze.errors import UserError
from dsfreeze.files import parse_json, sha256_of
from dsfreeze.job import Job
from dsfreeze.recipe_retain import MASKS_FILE, RETAIN_KEYS
from dsfreeze.strategies.scores_file import model_digest

FORMAT_VERSION = 1
TENSORS, EXAMPLES, MANIFEST = "memory.safetensors", "examples.jsonl", "manifest.json"


@dataclass(frozen=True)
class Memory:
    """What earlier tasks left: a whole folder of this method and this model. `EMPTY`, for a first task, holds nothing."""

    folder: Path = Path()
    num_tasks: int = 0
    examples: Sequence[Mapping[str, Any]] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    sha256: Mapping[str, str] = field(default_factory=dict)

    def read(self, key: str, first: int | None = None, last: int | None = None) -> torch.Tensor:
        """A tensor, or of a 1-D one the elements `first` .. `last - 1`; on the CPU."""
        try:
            with safe_open(self.folder / TENSORS, "pt") as content:
                found: torch.Tensor = content.get_tensor(key) if first is None else content.get_slice(key)[first:last]
                return found
        except (OSError, SafetensorError) as error:
            raise UserError(f"retain.memory: {self.folder / TENSORS} cannot be read: {error}.") from None

    def under(self, kind: str) -> list[str]:
        """What stands behind `kind/` in the keys that begin so."""
        return [key.removeprefix(f"{kind}/") for key in self.shapes if key.startswith(f"{kind}/")]

    @cached_property
    def by_task(self) -> list[list[Mapping[str, Any]]]:
        """The kept examples of each earlier task that left some."""
        return [found for n in range(self.num_tasks) if (found := [e for e in self.examples if e["of_task"] == n + 1])]


EMPTY = Memory()


def open_memory(job: Job) -> Memory:
    """What `retain.memory` holds; UserError when it is missing, damaged, or of another method, task or model."""
    folder = job.recipe.retain.memory
    if folder is None:
        return EMPTY
    manifest = _manifest(folder)
    _require_same(folder, manifest, job)
    for name, digest in manifest["sha256"].items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise UserError(
                f"retain.memory: {folder / name} is missing, cut short or changed since it was written. Put it back, or run "
                "the earlier task again."
            )
    try:
        with safe_open(folder / TENSORS, "pt") as content:
            shapes = {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
        examples = [parse_json(line) for line in (folder / EXAMPLES).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"retain.memory: {folder} cannot be read: {error}.") from None
    return Memory(folder, manifest["num_tasks"], examples, shapes, manifest["sha256"])


def open_alike(job: Job) -> Memory:
    """`open_memory`, the same on every rank (collective); UserError on all of them where one finds no or another memory."""
    memory = together(lambda: open_memory(job))
    agree(hashlib.sha256(json.dumps(memory.sha256, sort_keys=True).encode()).hexdigest(), "retain.memory")
    return memory


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"retain.memory: {folder} has format {manifest['format_version']}; this version reads {FORMAT_VERSION}."
            )
        wanted = {"method": str, "task": str, "model": dict, "num_tasks": int, "sha256": dict}
        wrong = [key for key, kind in wanted.items() if not isinstance(manifest[key], kind)]
        if wrong or set(manifest["sha256"]) - {MASKS_FILE} != {TENSORS, EXAMPLES}:
            raise ValueError(f"'{(wrong or ['sha256'])[0]}' is not what a memory has there")
        return manifest
    except FileNotFoundError:
        raise UserError(
            f"retain.memory: {folder} is no memory: it has no {MANIFEST}. An earlier task writes one with retain.remember."
        ) from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"retain.memory: {folder / MANIFEST} cannot be read: {error!r}.") from None


def _require_same(folder: Path, manifest: Mapping[str, Any], job: Job) -> None:
    recipe = job.recipe
    if manifest["method"] != recipe.retain.method:
        raise UserError(
            f"retain.memory: {folder} was left by method '{manifest['method']}', and this recipe says "
            f"'{recipe.retain.method}'. One method serves a whole sequence."
        )
    if manifest["model"].get("digest") != model_digest(job.plain):
        raise UserError(
            f"retain.memory: {folder} is about the layers of {manifest['model'].get('name')}, which are not those of "
            f"{job.plain.name}. Start from the model that the earlier task exported."
        )
    theirs, ours = (manifest["task"], manifest.get("labels")), (recipe.task, job.data.num_labels)
    if recipe.retain.method in RETAIN_KEYS["memory_examples"] and theirs != ours:
        raise UserError(
            f"retain.memory: {folder} keeps examples of task '{theirs[0]}' (labels: {theirs[1]}), and this is '{ours[0]}' "
            f"(labels: {ours[1]}): they have no common loss."
        )


def require_writable(folder: Path) -> None:
    """UserError when something is there that is no memory, or the folder cannot be made."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
            raise UserError(
                f"retain.remember: {folder} holds something that is no memory of a task. Name another folder."
            )
    except OSError as error:
        raise UserError(f"retain.remember: {folder} cannot be written: {error.strerror}.") from None


def write_memory(
    job: Job,
    earlier: Memory,
    tensors: Mapping[str, torch.Tensor],
    examples: Sequence[Mapping[str, Any]] = (),
    masks: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write `retain.remember` (rank 0 alone): these tensors, examples and masks, and one task more than `earlier`."""
    folder = job.recipe.retain.remember
    assert folder is not None, "there is something to write to"
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({key: value.contiguous() for key, value in tensors.items()}, aside / TENSORS)
        if masks:
            save_file(dict(masks), aside / MASKS_FILE)
        (aside / EXAMPLES).write_text("".join(json.dumps(dict(e)) + "\n" for e in examples), encoding="utf-8")
        files = sorted(path.name for path in aside.iterdir())
        manifest = {
            "format_version": FORMAT_VERSION,
            "method": job.recipe.retain.method,
            "task": job.recipe.task,
            "labels": job.data.num_labels,
            "model": {"name": job.plain.name, "digest": model_digest(job.plain)},
            "num_tasks": earlier.num_tasks + 1,
            "sha256": {name: sha256_of(aside / name) for name in files},
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        swap(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"Could not write {folder} (retain.remember): {error}. Free disk space or name another folder, and resume with "
            "train.resume_from_checkpoint=true."
        ) from error
