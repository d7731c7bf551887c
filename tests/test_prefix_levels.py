"""Levels of one process. Oracles: what lies in the folders afterwards; a process that has ended, for what the dead left behind.

Several ranks: tests/distributed/test_prefix_cache_ranks.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dsfreeze.engine.ranks import Ranks
from dsfreeze.prefix import folder as folder_module
from dsfreeze.prefix import levels, shards
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.levels import Level, open_level

MANIFEST = {"fingerprint": "0123456789abcdef" + "0" * 48, "model": "tiny", "stored": "fp32", "cut": 1}
WIDTH = 4
ALONE = Ranks(0, 1, 0, torch.device("cpu"))
#: Rank 0 of two; without a process group it hears of itself alone.
FIRST = Ranks(0, 2, 0, torch.device("cpu"))
KEY, STATES = b"k" * 16, torch.ones(3, WIDTH)


def opened(tier: str, root: Path | None = None, ranks: Ranks = ALONE) -> Level:
    return open_level(tier, 1, ("digest",), MANIFEST, WIDTH, ranks, root)


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Path:
    """A folder that takes /dev/shm's place."""
    monkeypatch.setattr(levels, "SHARED_MEMORY", tmp_path / "shm")
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- memory


def test_states_in_memory_stop_at_what_was_free(monkeypatch):
    monkeypatch.setattr(levels, "free_memory", lambda _: 3 * WIDTH * 4)
    store = opened("memory").store
    store.add(KEY, STATES)
    assert KEY in store
    assert store.failure is None
    store.add(b"l" * 16, STATES)
    assert len(store) == 1
    assert store.failure


def test_folders_in_shared_memory_tell_whose_they_are_and_go_with_the_level(memory):
    level = opened("memory", ranks=FIRST)
    (name,) = names(memory)
    assert name.startswith(f"dsfreeze-{shards._host()}-{os.getpid()}-")
    level.close()
    assert names(memory) == []


def test_a_level_in_shared_memory_writes_nothing_when_it_closes(memory, monkeypatch):
    level = opened("memory", ranks=FIRST)
    level.store.add(KEY, STATES)
    monkeypatch.setattr("dsfreeze.prefix.store.write_shard", lambda *_: pytest.fail("it would be deleted at once"))
    level.close()
    assert names(memory) == []


def test_folders_of_the_dead_are_swept_from_shared_memory_and_no_others(memory, dead):
    host = shards._host()
    stay = [
        f"dsfreeze-{host}-{os.getppid()}-0a", f"dsfreeze-elsewhere-{dead}-0a", f"dsfreeze-{host}", f"dsfreeze-x-{host}-{dead}-0a",
        f"another-{host}-{dead}-0a",
    ]  # fmt: skip
    for name in [*stay, f"dsfreeze-{host}-{dead}-0a"]:
        (memory / name).mkdir()
        (memory / name / "rank00000-000000.safetensors").touch()
        os.utime(memory / name, (1, 1))
    opened("memory", ranks=FIRST).close()
    assert names(memory) == sorted(stay)


# -- what waits


def waiting(folder: Path, dead: int) -> list[str]:
    """Folders of the dead, the living and other hosts; those that are to stay."""
    host = shards._host()
    stay = [f".waiting-{host}-{os.getppid()}-ab_1", f".waiting-elsewhere-{dead}-ab_1"]
    go = [f".waiting-{host}-{dead}-ab_1", f".waiting-elsewhere-{dead}-cd_2"]
    for name in stay + go:
        (folder / name).mkdir()
    os.utime(folder / go[1], (time.time() - 90_000,) * 2)
    return sorted(stay)


@pytest.mark.parametrize("locks", [True, False])
def test_what_dead_fills_left_is_removed_and_what_waits_for_the_living_stays(tmp_path, monkeypatch, dead, locks):
    class Refuses:
        def __init__(self, *_, **__): ...

        def acquire(self):
            raise NotImplementedError

    if not locks:
        monkeypatch.setattr(folder_module, "FileLock", Refuses)
    first = opened("disk", tmp_path)
    scratch = first.scratch(WIDTH, "fp32")
    scratch.add(KEY, STATES)
    scratch.flush()
    stay = waiting(first.folder.path, dead)
    first.folder.release()
    second = opened("disk", tmp_path)
    out = torch.empty_like(STATES)
    assert scratch.read(KEY, out)
    assert second.store.may_write
    scratch.close()
    assert sorted(path.name for path in first.folder.path.glob(".waiting-*")) == stay
    first.close()
    second.close()


def test_who_may_not_write_removes_nothing(tmp_path, dead):
    first = opened("disk", tmp_path)
    waiting(first.folder.path, dead)
    second = opened("disk", tmp_path)
    assert not second.store.may_write
    assert second.notes
    assert len(list(first.folder.path.glob(".waiting-*"))) == 4
    first.close()
    third = opened("disk", tmp_path)
    assert third.store.may_write
    assert third.share == (0, 1)
    third.close()


def test_the_codec_of_what_waits_is_the_precise_one(tmp_path):
    level = opened("disk", tmp_path)
    scratch = level.scratch(WIDTH, "fp32")
    assert scratch.codec == CODECS["fp32"]
    scratch.close()
    assert not list(level.folder.path.glob(".waiting-*"))
    level.close()
