"""A few hundred made-up files for every reader of untrusted ones; many more by hand: python tests/fuzz/run.py 100000.

Oracle: a reader reads, or refuses with a UserError; the same seed makes the same files."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "fuzz"))

from mutate import mutated
from run import fuzz
from targets import TARGETS, seeds_of

from dsfreeze.errors import UserError


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_reads_or_refuses(tmp_path: Path, name: str) -> None:
    read, refused = fuzz(name, 60, tmp_path)
    assert read + refused == 60
    assert refused or name in ("environment", "summary"), "gathered records are refused one by one, in a list"


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "manifest"])  # whose files a whole one would need
def test_what_it_starts_from_is_read(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    for seed in seeds_of(name):
        target.prepare(tmp_path)
        (tmp_path / target.file).write_bytes(seed)
        target.read(tmp_path / target.file)
        for path in tmp_path.iterdir():
            path.unlink()


def test_made_up_files_follow_from_the_seed() -> None:
    first, second, third = ([mutated(b"a: 1\nb: 2\n", random.Random(seed)) for _ in range(3)] for seed in (1, 1, 2))
    assert first == second != third


def test_a_reader_that_breaks_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself can fail."""
    from dataclasses import replace

    monkeypatch.setitem(TARGETS, "plan", replace(TARGETS["plan"], read=lambda path: path.read_bytes()[10_000_000]))
    with pytest.raises(IndexError):
        fuzz("plan", 3, tmp_path)
    with pytest.raises(UserError):
        TARGETS["manifest"].read(tmp_path / "manifest.json")
