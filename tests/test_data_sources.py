"""Sources: every file kind gives the same rows; every mistake is named with its place and its mend."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from dsfreeze.data import sources
from dsfreeze.errors import UserError

ROWS = [{"text": f"line {i}", "label": i % 2} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    table = Dataset.from_list(ROWS)
    if kind == "jsonl":
        path.write_text(LINES)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(LINES.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "csv":
        table.to_csv(path)
    elif kind == "tsv":
        table.to_csv(path, sep="\t")
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        saved = folder / "saved"
        table.save_to_disk(saved)
        (saved / "data-00000-of-00001.arrow").rename(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "csv", "tsv", "parquet", "arrow"])
def test_every_kind_of_file_gives_the_rows_written(tmp_path: Path, kind: str) -> None:
    table = sources.load(str(write(tmp_path, kind)), "train", role="train")
    assert table.rows.to_list() == ROWS
    assert table.where(2).endswith(f"rows.{kind}, row 3")


def test_folders_by_file_name_and_from_save_to_disk(tmp_path: Path) -> None:
    """Oracle: the rows written, by split."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "train.jsonl").write_text(LINES)
    (files / "validation.jsonl").write_text(LINES.splitlines()[0])
    DatasetDict(train=Dataset.from_list(ROWS), validation=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "disk")
    for folder in (files, tmp_path / "disk"):
        assert sources.load(str(folder), "train", role="train").rows.to_list() == ROWS
        assert sources.load(str(folder), "validation", role="eval").rows.to_list() == ROWS[:1]
        with pytest.raises(UserError, match=r"data.eval_split.*'validatoin'.*Did you mean 'validation'"):
            sources.load(str(folder), "validatoin", role="eval")


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_truncated_line_is_named_with_file_and_number(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"cut.{ending}"
    text = (LINES[:-12]).encode()
    path.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    with pytest.raises(UserError, match=rf"cut\.{ending}, line 5: broken JSON"):
        sources.load(str(path), "train", role="train")


def test_a_broken_document_and_a_cut_archive_are_named(tmp_path: Path) -> None:
    document = tmp_path / "rows.json"
    document.write_text(json.dumps(ROWS, indent=1)[:-20])
    with pytest.raises(UserError, match=r"rows\.json, line \d\d: broken JSON"):
        sources.load(str(document), "train", role="train")
    archive = tmp_path / "rows.jsonl.gz"
    archive.write_bytes(gzip.compress(LINES.encode())[:-20])
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz, after line \d: the compressed file is cut short"):
        sources.load(str(archive), "train", role="train")


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(LINES[:-12])
    with pytest.raises(UserError, match=r"train\.jsonl, line 5"):
        sources.load(str(tmp_path), "train", role="train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("rows.jsnl", "no file.*Did you mean 'rows.jsonl'"),
        ("row.jsonl", "no file.*Did you mean 'rows.jsonl'"),
        ("dta/rows.jsonl", "folder 'dta' is not in .*Did you mean 'data'"),
        ("notes.txt", "no data file that we read.*jsonl"),
        ("empty.jsonl", "is empty"),
        ("builtin:nil", "no built-in data 'builtin:nil'.*Did you mean 'builtin:nli'"),
        ("some/where/deep", "no file, no folder, and not of a hub id's form"),
    ],
)
def test_missing_and_unreadable_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "rows.jsonl").write_text(LINES)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match=message):
        sources.load(source, "train", role="train")


def test_a_missing_column_is_named_with_the_nearest(tmp_path: Path) -> None:
    table = sources.load(str(write(tmp_path, "jsonl")), "train", role="train")
    with pytest.raises(UserError, match=r"data.text: .*no column 'txt'.*Did you mean 'text'"):
        table.require(["txt"], "data.text")


def test_a_sample_keeps_the_rows_own_numbers(tmp_path: Path) -> None:
    table = sources.load(str(write(tmp_path, "jsonl")), "train", role="train").take([1, 4])
    assert table.rows["text"][:] == ["line 1", "line 4"]
    assert table.where(1).endswith("row 5")
