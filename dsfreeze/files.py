"""Files that appear whole or not at all, and what they hold. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsfreeze.errors import did_you_mean

#: Endings of data files, each also with .gz, and which reader of `datasets` reads them.
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def write_whole(path: Path, text: str) -> None:
    """Write beside the path, then rename; the folder is made. OSError as the disk gives it, and then nothing is left behind."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads`, for which a file of nothing but brackets is a RecursionError: here a JSONDecodeError, as every other refusal."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text if isinstance(text, str) else "", 0) from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits; OSError as the disk gives it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def why_closed(path: Path) -> str | None:
    """What keeps a file from being opened, as a sentence that names it; None where nothing does."""
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return f"{path} cannot be opened: {error.strerror}."


def reader_of(path: Path) -> str | None:
    """Which reader of `datasets` a file name asks for; None when it is no data file's name."""
    name = path.name.removesuffix(".gz")
    return READERS.get(Path(name).suffix)


def no_file(path: Path) -> str:
    """What to say of a data file that is not there."""
    return f"no file {path}.{nearest_file(path)}"


def nearest_file(path: Path) -> str:
    """The name that was meant, or which folder on the way is missing; empty where nothing is near."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    if folder != path.parent:
        missing = path.parent.relative_to(folder).parts[0]
        siblings = [entry.name for entry in folder.iterdir() if entry.is_dir()]
        return f" The folder '{missing}' is not in {folder.resolve()}.{did_you_mean(missing, siblings)}"
    return did_you_mean(path.name, sorted(entry.name for entry in folder.iterdir() if reader_of(entry)))
