"""Runs forked from a server. Oracles: the same training in this process, to the bit; exit codes that the runs choose; locks and
processes as the system sees them."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from compare_kit import compare, grid_file, priced_at_once, run_here, without_times

from dsfreeze.compare import forking
from dsfreeze.errors import UserError
from dsfreeze.folder_lock import FolderLock

pytestmark = pytest.mark.skipif(not forking.POSSIBLE, reason="runs are forked under Linux alone")
COMMAND = [sys.executable, "-m", "dsfreeze"]


def pretend(message: bytes, log: int) -> None:
    """A run that does what its first word says, and writes the rest and a variable first."""
    (word, *rest), environment = json.loads(message)
    os.write(log, " ".join([*rest, environment.get("PRETENDED", "")]).encode())
    if word == "sleep":
        time.sleep(60)
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(int(word))


class Here(forking.ForkServer):
    """A server forked from this process, with nothing to import."""

    pid = 0

    def _started(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            for inherited in range(3, 256):  # what a process that is executed does not inherit
                if inherited != theirs.fileno():
                    with suppress(OSError):
                        os.close(inherited)
            forking.Server(theirs).serve()
            os._exit(0)
        theirs.close()
        return ours


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Here]:
    monkeypatch.setattr(forking, "_run", pretend)
    server = Here(tmp_path / "server.txt")
    yield server
    server.close()


def launched(server: Here, folder: Path, *words: str, lock: int | None = None, **more: str) -> forking.Forked:
    with (folder / "log.txt").open("w") as log:
        return server.launch([*COMMAND, *words], log, lock, {**os.environ, **more})


def until(said: Any) -> None:
    end = time.monotonic() + 20
    while not said():
        assert time.monotonic() < end, "not within 20 s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_how_a_run_ended_is_known(server: Here, tmp_path: Path) -> None:
    """An exit code, a signal from itself, one from us; words and variables arrive, and what it writes is in its log."""
    assert launched(server, tmp_path, "3", "some", "words", PRETENDED="true").wait() == 3
    assert (tmp_path / "log.txt").read_text() == "some words true"
    assert launched(server, tmp_path, "die").wait() == -signal.SIGKILL
    sleeping = launched(server, tmp_path, "sleep")
    assert sleeping.poll() is None
    sleeping.terminate()
    assert sleeping.wait() == sleeping.poll() == -signal.SIGTERM
    sleeping.terminate()  # what has ended is left in peace


def test_several_at_once(server: Here, tmp_path: Path) -> None:
    """Their ends are told apart; the first to end is not the first that began."""
    sleeping, *others = [launched(server, tmp_path, word) for word in ("sleep", "4", "5")]
    assert [other.wait() for other in others] == [4, 5]
    assert sleeping.poll() is None
    sleeping.terminate()
    assert sleeping.wait() == -signal.SIGTERM


def test_a_killed_server_takes_its_runs_along_and_another_follows(server: Here, tmp_path: Path) -> None:
    sleeping, second = (launched(server, tmp_path, "sleep") for _ in range(2))
    until(lambda: sleeping.poll() is None and b"\n" in sleeping.text)
    os.kill(server.pid, signal.SIGKILL)
    os.waitpid(server.pid, 0)
    assert [sleeping.wait(), second.wait()] == [-signal.SIGKILL] * 2
    until(lambda: not is_alive(int(sleeping.text)))
    assert launched(server, tmp_path, "6").wait() == 6


def test_a_run_that_died_with_its_server(server: Here, tmp_path: Path) -> None:
    """Nobody could tell its end: it is taken for killed, and nothing else is."""
    run = launched(server, tmp_path, "sleep")
    until(lambda: run.poll() is None and b"\n" in run.text)
    os.kill(server.pid, signal.SIGSTOP)
    os.kill(int(run.text), signal.SIGKILL)
    os.kill(server.pid, signal.SIGKILL)
    os.waitpid(server.pid, 0)
    until(lambda: not Path(f"/proc/{int(run.text)}").exists())
    assert run.wait() == -signal.SIGKILL


def test_a_run_outlives_a_killed_comparison_and_holds_its_lock(server: Here, tmp_path: Path) -> None:
    """What we held is closed, as the kernel closes it for the dead; the server ends with its last run."""
    assert launched(server, tmp_path, "0").wait() == 0  # the server is there, and has no lock of ours
    lock = FolderLock(tmp_path / "out", "output_dir")
    lock.take()
    run = launched(server, tmp_path, "sleep", lock=lock.fileno())
    until(lambda: run.poll() is None and b"\n" in run.text)
    os.close(run.told)
    server.close()
    lock.release()
    with pytest.raises(UserError, match="in use"):
        FolderLock(tmp_path / "out", "output_dir").take()
    os.kill(int(run.text), signal.SIGKILL)
    assert os.waitpid(server.pid, 0)[1] == 0
    FolderLock(tmp_path / "out", "output_dir").take()


@pytest.mark.slow
def test_a_forked_comparison_is_the_one_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit of every score, with the server's real imports; and its words that are wrong end in an error of ours."""
    priced_at_once(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = grid_file(tmp_path, methods=["random", "adt_l"], train={"max_steps": 6})
    forked = compare(path, f"output_dir={tmp_path / 'forked'}", "jobs=2")
    assert {cell["status"] for cell in forked["cells"].values()} == {"done"}
    assert (tmp_path / "forked/logs/server.txt").is_file()
    run_here(monkeypatch)
    assert without_times(compare(path, "jobs=2"))["cells"] == without_times(forked)["cells"]
