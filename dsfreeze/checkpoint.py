"""Checkpoints: a portable format of our own, keyed by tensor name.

    checkpoint-N/
      manifest.json        written last: format, step, plan in force, digest of the first plan, base model and its hash, tensors,
                           versions, checksums
      weights.safetensors  every tensor trained so far, in the model's dtype, full
      state.safetensors    `<tensor>/master`, `<tensor>/exp_avg`, `<tensor>/exp_avg_sq`, `<tensor>/step`, fp32, full
      trainer_state.json   where the data stood, and the losses' summary

Nothing in it depends on the ZeRO stage or the world size; tensors that never trained are not in it. A checkpoint is
written under another name and renamed when it is whole; older ones go only after that. Only a checkpoint-N with a
manifest is ours to remove or to rename: transformers' Trainer gives its folders the same names. DeepSpeed's own files
are not used: they load one layer's state into another when the set changed (DeepSpeed #2288, #5439, #5430).

No torch until a tensor is read or written: checksums are made while it loads.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError

from dsfreeze.background import Background
from dsfreeze.errors import UserError
from dsfreeze.files import parse_json, sha256_of
from dsfreeze.plan import FreezePlan

if TYPE_CHECKING:
    from dsfreeze.engine import TensorState
    from dsfreeze.recipe import Recipe

FORMAT_VERSION = 2
WEIGHTS, STATE, TRAINER, MANIFEST = "weights.safetensors", "state.safetensors", "trainer_state.json", "manifest.json"
PREFIX = "checkpoint-"
#: `train.resume_from_checkpoint` of a job that may be started more than once.
AUTO: Literal["auto"] = "auto"


class NotWhole(UserError):
    """A folder that is no checkpoint of ours, or not all of one: a search passes over it."""


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

    @cached_property
    def plan(self) -> FreezePlan:
        """The plan in force when it was written, whose past is what was trained."""
        return FreezePlan.from_json(json.dumps(self.manifest["plan"]))

    @property
    def trainer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = parse_json((self.folder / TRAINER).read_text(encoding="utf-8"))
        return state

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
    first_plan: FreezePlan | None = None,
    keep: int | None = None,
) -> Path:
    """Write checkpoint-`step` (rank 0 alone), then drop all but `keep`: this one and the newest others.

    `plan` is the one in force, `first_plan` the one that the run began with, where an adaptive strategy has revised it.
    Raises UserError when the disk is full or the folder cannot be written; what was there before is untouched then.
    Warns when an old one cannot be removed. A folder of that name that is not ours is renamed, with a warning.
    """
    final = output_dir / f"{PREFIX}{step}"
    aside = output_dir / f".{PREFIX}{step}.tmp"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_files(aside, step, state, plan, first_plan or plan, base, trainer_state)
        if final.exists() and not _is_ours(final):
            warnings.warn(f"{final} is no checkpoint of dsfreeze; it is now {_set_aside(final)}.", stacklevel=2)
        swap(aside, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"Could not write {final}: {error}. Earlier checkpoints are intact; free disk space, or set train.output_dir "
            "to another disk, and resume with train.resume_from_checkpoint=true."
        ) from error
    if keep:
        _prune(output_dir, keep, final)
    return final


def swap(aside: Path, final: Path) -> None:
    """Put `aside` in `final`'s place; there is a whole folder under one of the two names at every moment."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    _sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_files(
    folder: Path,
    step: int,
    state: Mapping[str, TensorState],
    plan: FreezePlan,
    first_plan: FreezePlan,
    base: Base,
    trainer_state: Mapping[str, Any],
) -> None:
    """Write a checkpoint's files into `folder` and sync them, the manifest last; errors are the caller's to word."""
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
        "first_plan": first_plan.digest,
        "base": vars(base),
        "tensors": {n: {"shape": list(e["weight"].shape), "dtype": str(e["weight"].dtype)} for n, e in state.items()},
        "versions": {package: version(package) for package in ("torch", "deepspeed", "transformers")},
        "sha256": {name: sha256_of(folder / name) for name in (WEIGHTS, STATE, TRAINER)},
    }
    for name in (WEIGHTS, STATE, TRAINER):
        _sync(folder / name)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _sync(folder / MANIFEST)
    _sync(folder)


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`; UserError when it is missing, truncated, corrupt or of another format."""
    try:
        return _open(folder)
    except NotWhole as problem:
        raise NotWhole(f"{problem}{_others(folder)}") from None


def _open(folder: Path) -> Checkpoint:
    try:
        manifest = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(f"{folder} has format {manifest['format_version']}; this version reads {FORMAT_VERSION}.")
        _require_whole(manifest)
        step, digests = int(manifest["step"]), manifest["sha256"]
        changed = [
            n for n in (WEIGHTS, STATE, TRAINER) if not (folder / n).is_file() or sha256_of(folder / n) != digests[n]
        ]
    except FileNotFoundError:
        raise NotWhole(f"{folder} is no whole checkpoint: it has no {MANIFEST}.") from None
    except UserError:
        raise
    except OSError as error:
        raise NotWhole(f"{folder} cannot be read: {error}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise NotWhole(f"{folder / MANIFEST} cannot be read: {error}.") from None
    if changed:
        raise NotWhole(f"{folder / changed[0]} is missing, truncated or changed since it was written.")
    return Checkpoint(folder, step, manifest)


def _require_whole(manifest: Mapping[str, Any]) -> None:
    """ValueError unless a manifest has everywhere what belongs there; its plan is checked where it is read."""
    wanted = {"step": int, "plan": dict, "first_plan": str, "base": dict, "tensors": dict, "sha256": dict}
    wrong = [key for key, kind in wanted.items() if not isinstance(manifest[key], kind)]
    base, tensors = manifest["base"], manifest["tensors"]
    if not wrong and not (
        base.keys() == Base.__annotations__.keys() and all(isinstance(v, str) for v in base.values())
    ):
        wrong = ["base"]
    if not wrong and not all(isinstance(t, dict) and {"shape", "dtype"} <= t.keys() for t in tensors.values()):
        wrong = ["tensors"]
    if wrong:
        raise ValueError(f"'{wrong[0]}' is not what a checkpoint has there")


def find_checkpoint(output_dir: Path, wanted: Literal[True] | Path) -> Checkpoint:
    """The checkpoint that `train.resume_from_checkpoint` names: a path, or True for the newest whole one in `output_dir`.

    Warns of each newer one that is not whole; UserError when there is none, or the one named is not whole.
    """
    found = Search(output_dir, wanted).result()
    assert found is not None, "only `auto` and False may find none"
    return found


def seek_start(recipe: Recipe) -> Search:
    """Begin to look for the checkpoint that a run goes on from."""
    return Search(recipe.train.output_dir, recipe.train.resume_from_checkpoint)


class Search:
    """A checkpoint looked for in a thread that begins here, for the checksums of large ones take seconds: do something else, then ask for
    the `result`, once. `wanted` is a `train.resume_from_checkpoint`."""

    def __init__(self, output_dir: Path, wanted: bool | Path | str | None) -> None:
        self.output_dir, self.wanted = output_dir, wanted
        self._found: Checkpoint | None = None
        self._passed_over: list[NotWhole] = []  # told by who asks: a thread's warnings may go astray
        self._work = Background("checksums")
        if wanted:
            self._work.start(self._search)

    def _search(self) -> None:
        if self.wanted not in (True, AUTO):
            self._found = open_checkpoint(Path(str(self.wanted)))
            return
        if self.wanted == AUTO and not list_checkpoints(self.output_dir):
            self.wanted = False  # the run begins anew
            return
        for folder in reversed(numbered(self.output_dir)):
            try:
                self._found = _open(folder)
                return
            except NotWhole as problem:
                self._passed_over.append(problem)

    def result(self) -> Checkpoint | None:
        """None where none is wanted, and with `auto` where there is none; else as `find_checkpoint`, errors and warnings too."""
        self._work.wait()
        for problem in self._passed_over:
            warnings.warn(f"Passed over: {problem}", stacklevel=2)
        if self._found is not None or not self.wanted:
            return self._found
        names = ", ".join(folder.name for folder in numbered(self.output_dir))
        found = f" ({names}: none of them is whole)" if names else f" ({PREFIX}N)"
        raise UserError(
            f"{self.output_dir} holds no checkpoint to go on from{found}. To start anew, drop train.resume_from_checkpoint; "
            "a run writes checkpoints unless train.save_strategy is no."
        )


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Our own checkpoint-N folders, oldest step first; whether their files are whole is not looked at."""
    return [folder for folder in numbered(output_dir) if _is_ours(folder)]


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename our checkpoints after `step` to abandoned-checkpoint-N (rank 0 alone); returns the new folders.

    A run that goes on from `step` leaves them behind: they are of another branch, and would be the newest for ever.
    Call it when the checkpoint to resume from has been read on every rank, and before the first one is written.
    """
    try:
        return [_set_aside(folder) for folder in list_checkpoints(output_dir) if _number(folder) > step]
    except OSError as error:
        raise UserError(
            f"Could not rename the checkpoints after step {step} in {output_dir}, which the run that resumes there "
            f"abandons: {error}. Move them away, or resume into another train.output_dir."
        ) from error


def numbered(output_dir: Path) -> list[Path]:
    folders = [p for p in output_dir.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(folders, key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _is_ours(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _set_aside(folder: Path) -> Path:
    names = chain([f"abandoned-{folder.name}"], (f"abandoned-{folder.name}-{n}" for n in count(2)))
    free = next(folder.with_name(name) for name in names if not os.path.lexists(folder.with_name(name)))
    return folder.rename(free)


def require_same(checkpoint: Checkpoint, plan: FreezePlan, base: Base) -> None:
    """UserError unless the checkpoint belongs to this plan and this base model; says which layers differ."""
    saved = checkpoint.plan
    theirs = Base(**checkpoint.manifest["base"])
    if theirs.anatomy != base.anatomy or theirs.hash != base.hash:
        raise UserError(
            f"{checkpoint.folder} was trained from model '{theirs.name}' ({theirs.hash[:12]}), this recipe says "
            f"'{base.name}' ({base.hash[:12]}). Give the model it was trained from; another one needs another train.output_dir."
        )
    # what was done so far must be the same; what was still to come may have been lengthened, or revised
    step = checkpoint.step
    if checkpoint.manifest["first_plan"] != plan.digest and saved.until(step).digest != plan.until(step).digest:
        only_saved, only_now = (
            sorted(saved.ever_trained - plan.ever_trained),
            sorted(plan.ever_trained - saved.ever_trained),
        )
        raise UserError(
            f"{checkpoint.folder} belongs to another plan (strategy '{saved.strategy}', this recipe: '{plan.strategy}'). "
            f"Trained there but not here: {_some(only_saved)}; here but not there: {_some(only_now)}. "
            "Use the recipe it was made with; another plan starts anew, in another train.output_dir."
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"


def _others(folder: Path) -> str:
    names = [p.name for p in list_checkpoints(folder.parent) if p != folder]
    return f" Others in {folder.parent}: {', '.join(names)}; name one in train.resume_from_checkpoint." if names else ""


def save_file(tensors: dict[str, Any], path: Path) -> None:
    """safetensors' own, and torch with it."""
    from safetensors.torch import save_file as write

    write(tensors, path)


def _load(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}.") from None


def _prune(output_dir: Path, keep: int, newest: Path) -> None:
    others = [folder for folder in list_checkpoints(output_dir) if folder != newest]
    for folder in others[: max(0, len(others) - (keep - 1))]:
        try:
            shutil.rmtree(folder)
        except OSError as error:
            warnings.warn(f"Could not remove the old checkpoint {folder}: {error}.", stacklevel=3)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
