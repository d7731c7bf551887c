"""The console on standard error. Oracle: the operating system's pipes, terminals and full disks, and the exit code of Python itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest

from dsfreeze.progress import StepBar
from dsfreeze.screen import screen


@pytest.fixture(params=["pipe", "terminal"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, TextIO]]:
    """A reader's end, and a stream to it."""
    theirs, ours = os.pipe() if request.param == "pipe" else os.openpty()
    stream = os.fdopen(ours, "w", buffering=1)
    yield theirs, stream
    for end in (stream.close, lambda: os.close(theirs)):
        with suppress(OSError):
            end()


def test_what_is_said_arrives_while_somebody_reads(ends: tuple[int, TextIO], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, stream = ends
    monkeypatch.setattr(sys, "stderr", stream)
    console = screen()
    assert console.is_terminal == os.isatty(theirs)
    console.print("step 1")
    assert b"step 1" in re.sub(rb"\x1b\[[0-9;]*m", b"", os.read(theirs, 100))


@pytest.mark.parametrize("terminal", [False, True])
def test_a_reader_who_goes_ends_nothing(
    ends: tuple[int, TextIO], terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither lines and bars of ours nor what others write there."""
    theirs, stream = ends
    monkeypatch.setattr(sys, "stderr", stream)
    console = screen(force_terminal=terminal)
    with StepBar(console, 3, 0, 1, shown=True) as bar:
        bar.advance(1, 0.5, 10.0)
        os.close(theirs)
        bar.advance(2, 0.5, 10.0)
        console.print("still here")
        print("and others", file=sys.stderr, flush=True)
        bar.advance(3, 0.5, 10.0)
    assert os.fstat(stream.fileno()).st_rdev == os.stat(os.devnull).st_rdev


def test_a_full_disk_takes_the_line_and_not_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with suppress(OSError), full.open("w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        screen().print("lost")
        assert os.fstat(stream.fileno()).st_rdev == full.stat().st_rdev


def test_the_exit_code_is_the_commands() -> None:
    """Python's own is 120 where what is left in a stream can not be written at the end."""
    code = "import sys; from dsfreeze.screen import screen; sys.stdin.read(); screen().print('lost')"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stderr is not None
        child.stderr.close()
        child.stdin.close()
    assert child.returncode == 0


MODELS = [sys.executable, "-m", "dsfreeze", "models"]


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_result_that_is_cut_off_is_no_failure(words: list[str]) -> None:
    """As `dsfreeze models | head -0`."""
    with subprocess.Popen([*MODELS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        said = child.stderr.read()
    assert (child.returncode, said) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_stream_that_was_never_open_is_no_failure(closed: str) -> None:
    """A result, and a mistake that is told on standard error; the shell closes the stream."""
    for words, code in (("models", 0), ("plan", 2)):
        command = f'"{sys.executable}" -m dsfreeze {words} {closed}'
        assert subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode == code


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_result_that_a_full_disk_refuses_is_one(words: list[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MODELS, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, " ".join(done.stderr.split())) == (
        2,
        "error: Could not write the result to standard output: No space left on device.",
    )
