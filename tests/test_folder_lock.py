"""One writer for a folder. Oracle: another process, alive, ended and killed."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import tiny_recipe

from dsfreeze.errors import UserError
from dsfreeze.folder_lock import LOCK, FolderLock

HOLDS = """
import sys, time
from pathlib import Path
from dsfreeze.folder_lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), "train.output_dir")
lock.take()
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    yield process
    process.kill()
    process.wait()


def test_who_has_it_is_said_and_a_killed_process_has_it_no_more(tmp_path: Path, holder: Any) -> None:
    lock = FolderLock(tmp_path, "train.output_dir")
    with pytest.raises(
        UserError, match=rf"in use by another run \(process {holder.pid} on .*name another train.output_dir"
    ):
        lock.take()
    assert (tmp_path / LOCK).read_text().startswith(f"process {holder.pid} "), "it is the holder's still"
    holder.kill()
    holder.wait()
    lock.take()
    with pytest.raises(UserError):
        FolderLock(tmp_path, "train.output_dir").take()
    lock.release()
    FolderLock(tmp_path, "train.output_dir").take()


def test_a_run_does_not_write_where_another_does(tmp_path: Path) -> None:
    """Not even one that would resume there: its checkpoints would be set aside under the other's feet."""
    from dsfreeze.loop import train

    recipe = tiny_recipe(tmp_path, train={"save_strategy": "steps", "save_steps": 1})
    train(recipe)
    folder = Path(recipe.train.output_dir)
    before = sorted(path.name for path in folder.iterdir())
    lock = FolderLock(folder, "train.output_dir")
    lock.take()
    resumed = recipe.model_copy(update={"train": recipe.train.model_copy(update={
        "resume_from_checkpoint": folder / "checkpoint-1", "max_steps": recipe.train.max_steps + 1,
    })})  # fmt: skip
    with pytest.raises(UserError, match="in use by another run"):
        train(resumed)
    assert sorted(path.name for path in folder.iterdir()) == before
    lock.release()
    train(resumed)


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path) -> None:
    """Nor does it take one that was there, or holds anything."""
    for folder, stays in ((tmp_path / "new", False), (tmp_path / "old", True), (tmp_path / "used", True)):
        if folder.name == "old":
            folder.mkdir()
        lock = FolderLock(folder, "train.output_dir")
        lock.take()
        if folder.name == "used":
            (folder / "steps.jsonl").touch()
        lock.release(tidy=True)
        assert folder.exists() == stays


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot make .*/file/run \(train.output_dir\): Not a directory"):
        FolderLock(tmp_path / "file/run", "train.output_dir").take()


def test_a_disk_without_locks_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="without locks"):
        FolderLock(tmp_path, "train.output_dir").take()
