"""The folder that a notebook shows: what of it can be read, and why the rest cannot. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsfreeze.errors import UserError
from dsfreeze.record import RecordData, find_records, read_record

#: Folders below the one that is named in which a file is looked for.
DEPTH = 3


@dataclass(frozen=True)
class Runs:
    """Records by their folder's name below the one that was named; `refused` says why others cannot be read."""

    records: dict[str, RecordData]
    refused: dict[str, str]


def records_folder(path: Path | str) -> Path:
    """The folder that a notebook's first cell names; UserError when there is none."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"RECORDS is {folder}, which {what}. Name a folder that holds records: edit the notebook's first cell, or set "
            "DSFREEZE_RECORDS before Jupyter starts."
        )
    return folder


def find_file(folder: Path, patterns: Sequence[str], made_by: str) -> Path:
    """The file of one of these names nearest to `folder`, the newest of equally near ones; UserError says what would make one."""
    for depth in range(DEPTH + 1):
        found = [path for pattern in patterns for path in folder.glob("*/" * depth + pattern) if path.is_file()]
        if found:
            return max(found, key=lambda path: (path.stat().st_mtime, path))
    raise UserError(
        f"{folder} holds no {' or '.join(patterns)}, nor do folders in it. {made_by} writes one; or name another folder in RECORDS."
    )


def find_runs(folder: Path) -> Runs:
    """Every run's record in `folder` and below; UserError when there is none that can be read."""
    records: dict[str, RecordData] = {}
    refused: dict[str, str] = {}
    for path in find_records(folder):
        name = str(path.relative_to(folder)) if path != folder else folder.resolve().name
        try:
            records[name] = read_record(path)
        except UserError as error:
            refused[name] = str(error)
    if not records:
        why = "".join(f"\n  {name}: {reason}" for name, reason in refused.items())
        raise UserError(
            f"{folder} holds no record of a run that can be read. Name the folder of a run (its train.output_dir), or one that "
            f"holds several.{why}"
        )
    return Runs(records, refused)
