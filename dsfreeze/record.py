"""The record: a run's directory, written so that a run killed at any moment leaves a readable one.

    runs/<name>/
      recipe.yaml        the resolved recipe, every key
      plan.json          the freeze plan that the run began with
      deepspeed.json     the DeepSpeed configuration as it was used; absent with zero: local
      environment.json   format version, versions, platform, device of the run's start
      steps.jsonl        a line per step, written as it ends
      events.jsonl       evaluations, checkpoints, resumptions, phases entered
      revisions.jsonl    the plans that an adaptive strategy decided on, each with the scores that caused it
      reference.safetensors  of a preference run: log-probabilities of its pairs under the model before the first step
      summary.json       at the end; absent while a run goes on, or was killed

Whole files appear by renaming. Nothing of the process's environment variables or of any credential goes in.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.files import parse_json
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import Recipe
from dsfreeze.recipe_yaml import dump_yaml, parse_yaml, read_file

FORMAT_VERSION = 2
RECIPE, PLAN, DEEPSPEED, ENVIRONMENT = "recipe.yaml", "plan.json", "deepspeed.json", "environment.json"
STEPS, EVENTS, REVISIONS, SUMMARY = "steps.jsonl", "events.jsonl", "revisions.jsonl", "summary.json"
#: Of a preference run (`dsfreeze.reference`).
REFERENCE = "reference.safetensors"
#: Folder of the exported model, beside the record.
MODEL = "model"


@dataclass(frozen=True)
class RecordData:
    """What a record says. `steps` are in order, each step once: a resumed run's lines replace those it repeats."""

    folder: Path
    recipe: dict[str, Any]
    plan: FreezePlan
    environment: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    revisions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] | None = None


class Record:
    """Writes a run's record; one process (rank 0) holds one. Every method raises UserError when the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(
        cls,
        folder: Path | str,
        recipe: Recipe,
        plan: FreezePlan,
        environment: Mapping[str, Any],
        *,
        deepspeed_config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
    ) -> Record:
        """Start a record in `folder`, or go on after `resume_step` with the one that is there (there may be none).

        A record that is gone on with keeps its first environment and its steps; the new environment is an event.
        """
        record = cls(Path(folder))
        require_free(record.folder, plan, resume_step=resume_step)
        going_on = holds_record(record.folder)
        record._make_folder()
        record._write(RECIPE, dump_yaml(recipe.model_dump(mode="json")))
        record._write(PLAN, plan.to_json())
        if deepspeed_config is not None:
            record._write(DEEPSPEED, _dump(deepspeed_config, indent=1))
        if going_on:
            for name in (STEPS, EVENTS, REVISIONS):
                record._mend(name)
            (record.folder / SUMMARY).unlink(missing_ok=True)
            record.event("resumed", environment=dict(environment))
        else:
            described = {"format_version": FORMAT_VERSION, "started": _now(), **environment}
            record._write(ENVIRONMENT, _dump(described, indent=1))
        return record

    @classmethod
    def open(cls, folder: Path | str) -> Record:
        """The record that `folder` holds, to add to; UserError when it holds none."""
        if not holds_record(Path(folder)):
            raise UserError(_no_record(Path(folder)))
        return cls(Path(folder))

    def step(self, line: Mapping[str, Any]) -> None:
        """Add a step's line: `step` (counted from 1) and its figures. Numbers that are not finite become null."""
        self._append(STEPS, line)

    def event(self, kind: str, **fields: Any) -> None:
        """Add an event, with the time."""
        self._append(EVENTS, {"event": kind, "time": _now(), **fields})

    def revision(self, step: int, plan: FreezePlan, scores: Mapping[str, float]) -> None:
        """Add a plan that an adaptive strategy decided on after `step` steps, with the scores that caused it."""
        self._append(REVISIONS, {"step": step, "scores": scores, "plan": json.loads(plan.to_json())})

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: the run is over."""
        self._write(SUMMARY, _dump({"format_version": FORMAT_VERSION, **summary}, indent=1))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot make the run's folder {self.folder} (train.output_dir): {error.strerror}."
            ) from None

    def _append(self, name: str, value: Mapping[str, Any]) -> None:
        try:
            with (self.folder / name).open("a", encoding="utf-8") as file:
                file.write(_dump(value) + "\n")
        except OSError as error:
            raise UserError(f"Cannot write {self.folder / name}: {error.strerror}.") from None

    def _write(self, name: str, text: str) -> None:
        aside = self.folder / f".{name}.tmp"
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.folder / name)
        except OSError as error:
            raise UserError(f"Cannot write {self.folder / name}: {error.strerror}.") from None

    def _mend(self, name: str) -> None:
        """Cut off half a last line, which a killed run may leave."""
        path = self.folder / name
        if not path.is_file():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            with path.open("r+b") as file:
                file.truncate(len(whole))


def holds_record(folder: Path) -> bool:
    """Whether a run has left its record in `folder`."""
    return (folder / RECIPE).is_file() and (folder / PLAN).is_file()


def find_records(folder: Path, beside: str = "", on_error: Callable[[OSError], object] | None = None) -> Iterator[Path]:
    """Folders at and below `folder` that hold a record, or a part of one, at any depth and in order; and files named `beside`, outside them.
    `on_error` is told of folders that cannot be read. Hidden folders are passed over."""
    for here, folders, files in os.walk(folder, onerror=on_error):
        if {RECIPE, PLAN, STEPS} & set(files):
            yield Path(here)
            folders.clear()  # its checkpoints and its model
            continue
        if beside in files:
            yield Path(here, beside)
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def require_free(folder: Path, plan: FreezePlan, *, resume_step: int | None = None) -> None:
    """UserError when `folder` cannot take this run's record; cheap enough to ask on every rank before building."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"train.output_dir {folder} is a file; name a folder.")
    if not holds_record(folder):
        return
    if resume_step is None:
        going_on = "continue that run with train.resume_from_checkpoint=true, "
        raise UserError(
            f"{folder} holds the record of another run. Name another train.output_dir, "
            f"{going_on if any(folder.glob('checkpoint-*')) else ''}or remove the folder."
        )
    recorded, step = FreezePlan.from_json(_read_text(folder / PLAN)), max(1, resume_step)
    if recorded.until(step).digest != plan.until(step).digest:
        raise UserError(
            f"{folder} holds the record of a run with another freeze plan, and one record tells of one plan. "
            "Name another train.output_dir."
        )


def read_record(folder: Path | str) -> RecordData:
    """Read a record, of a finished, running or killed run; UserError when `folder` holds none or it is damaged."""
    folder = Path(folder)
    if not holds_record(folder):
        raise UserError(_no_record(folder))
    document = parse_yaml(read_file(folder / RECIPE, "recipe"), str(folder / RECIPE))
    environment = _read_object(folder / ENVIRONMENT) or {}
    version = environment.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} is a record of format {version}, and this dsfreeze reads format {FORMAT_VERSION}: use the version that wrote it, or upgrade."
        )
    try:
        plan = FreezePlan.from_json(_read_text(folder / PLAN))
    except UserError as error:
        raise UserError(f"{folder / PLAN}: {error}") from None
    steps = _in_order(folder / STEPS)
    done = steps[-1]["step"] if steps else 0
    # a run that went back to a checkpoint may have left decisions that it has not come to again
    revisions = [line for line in _in_order(folder / REVISIONS) if line["step"] <= done]
    return RecordData(
        folder, document.values, plan, environment, steps=steps,
        events=list(_read_lines(folder / EVENTS)), revisions=revisions, summary=_read_object(folder / SUMMARY),
    )  # fmt: skip


def _no_record(folder: Path) -> str:
    if not folder.is_dir():
        return f"There is no folder {folder}."
    inside = sorted(path.parent.name for path in folder.glob(f"*/{RECIPE}"))
    hint = f" Runs in it: {', '.join(inside[:12])}." if inside else ""
    return f"{folder} holds no record of a run ({RECIPE} and {PLAN} are missing).{hint}"


def _in_order(path: Path) -> list[dict[str, Any]]:
    """The steps of the run that counts: where a resumed run started over from an earlier step, later lines stand."""
    steps: list[dict[str, Any]] = []
    for line in _read_lines(path):
        if not isinstance(line.get("step"), int):
            raise UserError(f"{path} has a line without a step: {_dump(line):.80}")
        while steps and steps[-1]["step"] >= line["step"]:
            steps.pop()
        steps.append(line)
    return steps


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a JSONL file; half a last line is a killed run's and is passed over."""
    if not path.is_file():
        return
    lines = _read_text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            value = parse_json(line)
        except ValueError:
            if number == len(lines):
                return
            raise UserError(f"{path}:{number} is not a line of JSON; remove the line to read the rest.") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number} is not an object; remove the line to read the rest.")
        yield value


def _read_object(path: Path) -> dict[str, Any] | None:
    return read_object(path) if path.is_file() else None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; UserError when it cannot be read or holds none."""
    try:
        value = parse_json(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object.")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.") from None


def _dump(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    """JSON's own types: paths as text, numpy's and torch's scalars as numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
