"""`dsfreeze check`: is all that a run left there, and is it what was written? Nothing is loaded on a device.

A run's record, its checkpoints, its exported model, the reference of a preference task, and what a killed run left behind. Checksums
are those that were written beside the data; a file without any is read as far as its own header goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from dsfreeze.checkpoint import MANIFEST, STATE, WEIGHTS, Checkpoint, NotWhole, numbered, open_checkpoint
from dsfreeze.errors import UserError
from dsfreeze.export import MANIFEST as DELTA
from dsfreeze.export import PLAN, SUMS, sums_of
from dsfreeze.plan import FreezePlan
from dsfreeze.record import MODEL, REFERENCE, SUMMARY, find_records, holds_record, read_object, read_record
from dsfreeze.stopping import BEST

Verdict = Literal["whole", "damaged", "left over", "unfinished"]


@dataclass(frozen=True)
class Finding:
    """A thing on disk: its path below the folder that was asked about, and what is known of it."""

    path: str
    verdict: Verdict
    told: str


def verify(folder: Path) -> list[Finding]:
    """Everything in a run's folder, a checkpoint, a model, or a folder of runs. UserError when there is nothing to check."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. Name a run's, a checkpoint's or a model's.")
    if (folder / MANIFEST).is_file():
        return [_tried(".", lambda: _checkpoint(folder))]
    if ((folder / PLAN).is_file() and not holds_record(folder)) or (folder / DELTA).is_file():
        return [_tried(".", lambda: _model(folder))]
    runs = list(find_records(folder))
    if not runs:
        raise UserError(
            f"{folder} holds no run, checkpoint or exported model. Name the folder that train.output_dir named, or one above."
        )
    return [finding for run in runs for finding in _run(run, folder)]


def resumed_from(folder: Path) -> str | None:
    """The checkpoint that `train.resume_from_checkpoint=true` would take; None where none is whole."""
    for found in reversed(numbered(folder)):
        try:
            return open_checkpoint(found).folder.name
        except NotWhole:
            continue
    return None


def _run(run: Path, above: Path) -> Iterator[Finding]:
    def name(path: Path) -> str:
        return path.relative_to(above).as_posix()

    yield _tried(name(run), lambda: _record(run))
    for found in numbered(run):
        if (found / MANIFEST).is_file():
            yield _tried(name(found), partial(_checkpoint, found))
        else:
            yield Finding(
                name(found), "damaged", f"no {MANIFEST}: no checkpoint of ours, or half of one; it is passed over"
            )
    if (run / MODEL).is_dir():
        yield _tried(name(run / MODEL), lambda: _model(run / MODEL))
    for file in (REFERENCE, BEST):
        if (run / file).is_file():
            yield _tried(name(run / file), partial(_tensors, run / file))
    for found in sorted(run.iterdir()):
        if found.name.startswith(".") and found.suffix in (".tmp", ".old"):
            yield Finding(name(found), "left over", "of a save that was killed; it may be removed")
        elif found.name.startswith("abandoned-"):
            yield Finding(name(found), "left over", "of a branch that a resumed run left; it may be removed")


def _tried(path: str, look: Callable[[], tuple[Verdict, str]]) -> Finding:
    try:
        return Finding(path, *look())
    except UserError as error:
        return Finding(path, "damaged", str(error))


def _record(run: Path) -> tuple[Verdict, str]:
    record = read_record(run)
    done = record.steps[-1]["step"] if record.steps else 0
    if record.summary is None:
        return "unfinished", f"a record of {done} steps without {SUMMARY}: the run goes on, or was stopped"
    return "whole", f"a record of {done} steps, finished"


def _checkpoint(folder: Path) -> tuple[Verdict, str]:
    found = open_checkpoint(folder)
    _require_tensors(found)
    return "whole", f"step {found.step}, {len(found.manifest['tensors'])} tensors, plan {found.plan.digest[:12]}"


def _require_tensors(found: Checkpoint) -> None:
    """UserError unless the files hold the tensors that the manifest names, in its shapes, and the loop's state is of its step."""
    described: dict[str, Any] = found.manifest["tensors"]
    shapes = _shapes(found.folder / WEIGHTS)
    for name in sorted(described.keys() ^ shapes.keys()):
        raise UserError(f"{found.folder / WEIGHTS} and its {MANIFEST} disagree about '{name}'.")
    for name, shape in shapes.items():
        if shape != list(described[name]["shape"]):
            raise UserError(
                f"{found.folder / WEIGHTS} has '{name}' in shape {shape}, its {MANIFEST} says {described[name]['shape']}."
            )
    strange = sorted({key.rpartition("/")[0] for key in _shapes(found.folder / STATE)} - described.keys())
    if strange:
        raise UserError(f"{found.folder / STATE} has state of '{strange[0]}', which is no tensor of the checkpoint.")
    if found.trainer_state.get("global_step") != found.step:
        raise UserError(
            f"{found.folder} is of step {found.step}, and the loop's state of step {found.trainer_state.get('global_step')}."
        )


def _model(folder: Path) -> tuple[Verdict, str]:
    """An exported model, or a delta: its files against SHA256SUMS, its index against its files."""
    files = sorted(folder.glob("*.safetensors"))
    held = {file.name: set(_shapes(file)) for file in files}
    if not files:
        raise UserError(f"{folder} holds no .safetensors file.")
    for index in folder.glob("*.safetensors.index.json"):
        for name, file in read_object(index).get("weight_map", {}).items():
            if name not in held.get(file, ()):
                raise UserError(f"{index} says that '{name}' is in {file}, and it is not.")
    if (folder / PLAN).is_file():
        FreezePlan.from_json(_text(folder / PLAN))
    tensors = sum(map(len, held.values()))
    if not (folder / SUMS).is_file():
        return "whole", f"{tensors} tensors; without {SUMS}, so that a flipped bit would not be seen"
    lines = (line.split("  ", 1) for line in _text(folder / SUMS).splitlines() if "  " in line)
    written = {name: digest for digest, name in lines}
    for line in sums_of(folder).splitlines():
        digest, name = line.split("  ", 1)
        if written.pop(name, None) != digest:
            raise UserError(
                f"{folder / name} is not what was written: its SHA-256 is not that of {SUMS}. Export it again."
            )
    for name in sorted(written):
        raise UserError(f"{folder / name} is missing; {SUMS} names it. Export it again.")
    return "whole", f"{tensors} tensors"


def _tensors(path: Path) -> tuple[Verdict, str]:
    return "whole", f"{len(_shapes(path))} tensors"


def _shapes(path: Path) -> dict[str, list[int]]:
    """Shapes by name, from the header; UserError when the file is cut short or no safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}.") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
