"""Checkpoints: a portable format of our own, keyed by tensor name.

    checkpoint-N/
      manifest.json        written last: format, step, plan and its digest, base model and its hash, tensors, versions, checksums
      weights.safetensors  every tensor trained so far, in the model's dtype, full
      state.safetensors    `<tensor>/master`, `<tensor>/exp_avg`, `<tensor>/exp_avg_sq`, `<tensor>/step`, fp32, full
      trainer_state.json   where the data stood, and the losses' summary

Nothing in it depends on the ZeRO stage or the world size; tensors that never trained are not in it. A checkpoint is
written under another name and renamed when it is whole; older ones go only after that. DeepSpeed's own files are not
used: they load one layer's state into another when the set changed (DeepSpeed #2288, #5439, #5430).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan

if TYPE_CHECKING:
    from dsfreeze.engine import TensorState

FORMAT_VERSION = 1
WEIGHTS, STATE, TRAINER, MANIFEST = "weights.safetensors", "state.safetensors", "trainer_state.json", "manifest.json"


@dataclass(frozen=True)
class Base:
    """What a run started from: the model's name, the hash of its weights and the digest of its anatomy."""

    name: str
    hash: str
    anatomy: str


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk, its manifest read and its files' checksums verified."""

    folder: Path
    step: int
    manifest: Mapping[str, Any]

    @property
    def trainer_state(self) -> dict[str, Any]:
        return json.loads((self.folder / TRAINER).read_text(encoding="utf-8"))

    def state(self) -> dict[str, TensorState]:
        """State by tensor name, as `Engine.load_state` takes it; CPU tensors."""
        state: dict[str, TensorState] = {
            name: {"weight": weight} for name, weight in _load(self.folder / WEIGHTS).items()
        }
        for key, value in _load(self.folder / STATE).items():
            name, _, kind = key.rpartition("/")
            state.setdefault(name, {})[kind] = value
        missing = sorted(set(self.manifest["tensors"]) ^ set(state))
        if missing:
            raise UserError(f"Checkpoint {self.folder} does not hold tensor '{missing[0]}' as its manifest says.")
        return state


def save(
    output_dir: Path,
    step: int,
    state: Mapping[str, TensorState],
    plan: FreezePlan,
    base: Base,
    trainer_state: Mapping[str, Any],
    *,
    keep: int | None = None,
) -> Path:
    """Write checkpoint-`step` (rank 0 alone), then drop all but the newest `keep`.

    Raises UserError when the disk is full or the folder cannot be written; what was there before is untouched then.
    """
    final = output_dir / f"checkpoint-{step}"
    aside = output_dir / f".checkpoint-{step}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        _write(aside, step, state, plan, base, trainer_state)
        _swap(aside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"Could not write {final}: {error}. Earlier checkpoints are intact; free disk space, or set train.output_dir "
            "to another disk, and resume with train.resume_from_checkpoint=true."
        ) from error
    _prune(output_dir, keep)
    return final


def _swap(aside: Path, final: Path) -> None:
    """Put `aside` in `final`'s place; there is a whole folder under one of the two names at every moment."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    folder: Path,
    step: int,
    state: Mapping[str, TensorState],
    plan: FreezePlan,
    base: Base,
    trainer_state: Mapping[str, Any],
) -> None:
    save_file({name: entry["weight"].contiguous() for name, entry in state.items()}, folder / WEIGHTS)
    moments = {
        f"{name}/{kind}": value.contiguous()
        for name, entry in state.items()
        for kind, value in entry.items()
        if kind != "weight"
    }
    save_file(moments, folder / STATE)
    (folder / TRAINER).write_text(json.dumps({"global_step": step, **trainer_state}, indent=1), encoding="utf-8")
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "plan": json.loads(plan.to_json()),
        "base": vars(base),
        "tensors": {n: {"shape": list(e["weight"].shape), "dtype": str(e["weight"].dtype)} for n, e in state.items()},
        "versions": {package: version(package) for package in ("torch", "deepspeed", "transformers")},
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS, STATE, TRAINER)},
    }
    for name in (WEIGHTS, STATE, TRAINER):
        _sync(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; UserError when it is missing, truncated, corrupt or of another format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        step, digests = int(manifest["step"]), dict(manifest["sha256"])
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{folder} has format {manifest['format_version']}; this version reads {FORMAT_VERSION}.")
    except FileNotFoundError:
        raise UserError(f"{folder} is no whole checkpoint: it has no {MANIFEST}.{_others(folder)}") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read: {error}.{_others(folder)}") from None
    for name in (WEIGHTS, STATE, TRAINER):
        if not (folder / name).is_file() or _sha256(folder / name) != digests.get(name):
            raise UserError(f"{folder / name} is missing, truncated or changed since it was written.{_others(folder)}")
    return Checkpoint(folder, step, manifest)


def find_checkpoint(output_dir: Path, wanted: bool | Path) -> Checkpoint:
    """The checkpoint that `train.resume_from_checkpoint` names: a path, or True for the newest in `output_dir`."""
    if wanted is not True:
        return open_checkpoint(Path(str(wanted)))
    folders = list_checkpoints(output_dir)
    if not folders:
        raise UserError(
            f"{output_dir} holds no checkpoint (checkpoint-N). To start there, drop train.resume_from_checkpoint; "
            "a run writes checkpoints unless train.save_strategy is no."
        )
    return open_checkpoint(folders[-1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest step first."""
    folders = [p for p in output_dir.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def require_same(checkpoint: Checkpoint, plan: FreezePlan, base: Base) -> None:
    """UserError unless the checkpoint belongs to this plan and this base model; says which layers differ."""
    saved = FreezePlan.from_json(json.dumps(checkpoint.manifest["plan"]))
    theirs = Base(**checkpoint.manifest["base"])
    if theirs.anatomy != base.anatomy or theirs.hash != base.hash:
        raise UserError(
            f"{checkpoint.folder} was trained from model '{theirs.name}' ({theirs.hash[:12]}), this recipe says "
            f"'{base.name}' ({base.hash[:12]}). Give the same model, or another train.output_dir."
        )
    if saved.digest != plan.digest:
        only_saved, only_now = (
            sorted(saved.ever_trained - plan.ever_trained),
            sorted(plan.ever_trained - saved.ever_trained),
        )
        raise UserError(
            f"{checkpoint.folder} belongs to another plan (strategy '{saved.strategy}', this recipe: '{plan.strategy}'). "
            f"Trained there but not here: {_some(only_saved)}; here but not there: {_some(only_now)}. "
            "Resume with the recipe it was made with, or start anew in another train.output_dir."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def _others(folder: Path) -> str:
    whole = [p.name for p in list_checkpoints(folder.parent) if p != folder and (p / MANIFEST).is_file()]
    return f" Others in {folder.parent}: {', '.join(whole)}; name one in train.resume_from_checkpoint." if whole else ""


def _load(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}.") from None


def _prune(output_dir: Path, keep: int | None) -> None:
    for folder in list_checkpoints(output_dir)[: -keep if keep else None] if keep else ():
        shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
