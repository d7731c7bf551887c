"""Where rows come from: a hub id, a folder, a file, or `builtin:nli`; all of them become a `Table`.

Reading is left to `datasets`. What is added here is the answer to a mistake: a missing file, split or column is named
with its nearest neighbour, a broken JSON line with its number.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

import dsfreeze.data.nli as nli
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import READERS, nearest_file, no_file, parse_json, reader_of, why_closed
from dsfreeze.recipe import BUILTIN_ROWS

if TYPE_CHECKING:
    from datasets import IterableDataset

BUILTIN = {BUILTIN_ROWS: nli.generate}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@final
@dataclass(frozen=True)
class Table:
    """Rows, what the user calls them, and each row's number in the source (1 is the first)."""

    rows: Dataset
    name: str
    numbers: Sequence[int] | np.ndarray

    @property
    def columns(self) -> list[str]:
        names: list[str] = self.rows.column_names
        return names

    def where(self, index: int) -> str:
        """How an error names row `index`."""
        return f"{self.name}, row {self.numbers[index]}"

    def take(self, indices: Sequence[int] | np.ndarray) -> Table:
        """These rows, still under their numbers in the source."""
        return Table(self.rows.select(indices), self.name, np.asarray(self.numbers)[np.asarray(indices, dtype=int)])

    def require(self, columns: Sequence[str], key: str) -> list[str]:
        """The columns, if the table has them all; `key` is the recipe's key that names them."""
        for column in columns:
            if column not in self.columns:
                raise UserError(f"{key}: {self.name} has no column '{column}'.{did_you_mean(column, self.columns)}")
        return list(columns)

    def names_of(self, column: str) -> list[str] | None:
        """The class names that the source itself gives to an integer column."""
        feature = self.rows.features[column]
        feature = feature.feature if isinstance(feature, List) else feature
        return list(feature.names) if isinstance(feature, ClassLabel) else None


@dataclass(frozen=True)
class Tables:
    """What a task prepares: the rows to train on and to evaluate on (samples, where the recipe asks for them), and
    `full`, all the training rows (the evaluation's without any), from which columns and labels are read."""

    train: Table | None
    eval: Table | None
    full: Table


def load(source: str, split: str, *, role: str) -> Table:
    """The rows of `source`; `split` counts for a hub id or folder, `role` ("train" or "eval") for built-in data."""
    datasets.disable_progress_bars()  # one bar per rank and step of preparation helps nobody; the run has its own
    key = f"data.{role}"
    if source.startswith("builtin:"):
        rows = _builtin(source, role, key)
    elif (path := Path(source).expanduser()).is_dir():
        rows = _pick(_folder(path, key), split, source, role)
    elif reader_of(path) or path.is_file() or (path.suffix and path.parent.is_dir()):
        rows = _file(path, key)
    else:
        rows = _hub(source, split, role)
    name = source if source.startswith("builtin:") or reader_of(Path(source)) else f"{source} ({split})"
    if len(rows) == 0:
        raise UserError(f"{key}: {name} has no rows.")
    return Table(rows, name, range(1, len(rows) + 1))


def _builtin(source: str, role: str, key: str) -> Dataset:
    if source not in BUILTIN:
        raise UserError(f"{key}: there is no built-in data '{source}'.{did_you_mean(source, BUILTIN)}")
    features = Features(
        premise=Value("string"),
        hypothesis=Value("string"),
        label=ClassLabel(names=list(nli.LABELS)),
        phenomenon=Value("string"),
    )
    return Dataset.from_list(BUILTIN[source]()[role], features=features)


def _file(path: Path, key: str) -> Dataset:
    reader = reader_of(path)
    if not path.is_file():
        raise UserError(f"{key}: {no_file(path)}")
    if reader is None:
        endings = ", ".join(READERS)
        raise UserError(f"{key}: {path} is no data file that we read. Valid endings: {endings}, each also with .gz.")
    if closed := why_closed(path):
        raise UserError(f"{key}: {closed}")
    options = {"sep": "\t"} if path.name.removesuffix(".gz").endswith(".tsv") else {}
    try:
        return datasets.load_dataset(reader, data_files={"train": str(path)}, split="train", **options)
    except (datasets.exceptions.DatasetsError, ValueError, OSError, EOFError, StopIteration, zlib.error) as error:
        raise UserError(f"{key}: {_what_is_wrong(path, reader, error)}") from error


def _what_is_wrong(path: Path, reader: str, error: BaseException) -> str:
    """File and line of what stopped the reader, as far as it can be told."""
    if path.stat().st_size == 0:
        return f"{path} is empty."
    mistake = _json_mistake(path) if reader == "json" else None
    return mistake or f"{path} cannot be read as {reader}: {error.__cause__ or error}."


def _json_mistake(path: Path) -> str | None:
    """What is wrong in a file of JSON lines, or of one JSON document that starts with a lone bracket."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number, line = 0, ""
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if number == 1 and line.strip() in ("[", "{"):
                    parse_json(line + file.read())
                elif line.strip():
                    parse_json(line)
    except json.JSONDecodeError as broken:
        at, text = number - 1 + broken.lineno, broken.doc.splitlines()[broken.lineno - 1]
        return f"{path}, line {at}: broken JSON ({broken.msg}) in '{text[:60]}'. Is the file cut short?"
    except UnicodeDecodeError:
        return f"{path}, after line {number}: not UTF-8 text."
    except (EOFError, zlib.error, gzip.BadGzipFile) as broken:
        return f"{path}, after line {number}: the compressed file is cut short or damaged ({broken})."
    return None


def _folder(path: Path, key: str) -> DatasetDict | Dataset:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():  # written by save_to_disk
        return datasets.load_from_disk(str(path))
    try:
        return datasets.load_dataset(str(path))
    except (datasets.exceptions.DatasetsError, ValueError, OSError, EOFError, StopIteration) as error:
        for file in sorted(entry for entry in path.iterdir() if entry.is_file() and reader_of(entry)):
            _file(file, key)  # names the broken one
        raise UserError(f"{key}: folder {path} cannot be read: {error.__cause__ or error}") from error


def _hub(source: str, split: str, role: str) -> Dataset:
    key = f"data.{role}"
    if not HUB_ID.fullmatch(source) or source.startswith((".", "/", "~")):
        raise UserError(
            f"{key}: '{source}' is no file, no folder, and not of a hub id's form `org/set` or `org/set:config`."
        )
    name, _, config = source.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise UserError(
            f"{key}: '{name}' is no file or folder here and no data set on the hub.{nearest_file(Path(source))}"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{key}: '{name}' is no file or folder here, and the hub cannot be reached ({error})."
        ) from error
    except ValueError as error:  # an unknown or a missing config; the message lists the valid ones
        raise UserError(f"{key}: {error}") from error
    return _pick(loaded, split, source, role)


def _pick(loaded: DatasetDict | Dataset | IterableDataset, split: str, source: str, role: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    if split not in loaded:
        raise UserError(f"data.{role}_split: {source} has no split '{split}'.{did_you_mean(split, loaded)}")
    return loaded[split]
