"""launch.sh whose reader goes away: the terminal is closed (an ssh connection lost), or the pipe. Oracle: the run's record, a checkpoint that is
whole, the exit code, and the process table."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from launch_kit import (
    ROOT,
    launch_sh,
    left_of,
    nobody_outlives,
    recipe_file,
    signals_obeyed,
    surroundings,
    wait_for_steps,
)

from dsfreeze.checkpoint import find_checkpoint
from dsfreeze.record import read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def take_the_terminal() -> None:
    """As a shell does for what it starts: closing the terminal is then a SIGHUP to it."""
    fcntl.ioctl(1, termios.TIOCSCTTY, 0)


def begun(folder: Path, ours: int, prepare: Callable[[], None] | None = None, **train: object) -> psutil.Popen:
    """A run on two ranks that says something at every step, at an end of a pipe or terminal, some steps later."""
    file = recipe_file(folder, logging_steps=1, **train)
    command, environment = launch_sh(folder)
    with signals_obeyed():
        launched = psutil.Popen(
            [*command, str(file)], cwd=ROOT, env=surroundings(folder) | environment, stdin=subprocess.DEVNULL,
            stdout=ours, stderr=ours, start_new_session=True, preexec_fn=prepare,
        )  # fmt: skip
    os.close(ours)
    return launched


def test_a_closed_terminal_ends_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    """Not a step is lost, though every further line of progress has nowhere to go."""
    terminal, ours = os.openpty()
    launched = begun(tmp_path, ours, take_the_terminal, max_steps=100_000)
    with nobody_outlives(tmp_path):
        wait_for_steps(tmp_path / "run", 3)
        os.close(terminal)
        ended, left = launched.wait(90), left_of(tmp_path)
    assert (ended, left) == (128 + signal.SIGHUP, [])
    assert find_checkpoint(tmp_path / "run", True).step == len(read_record(tmp_path / "run").steps)


def test_a_closed_pipe_ends_nothing(tmp_path: Path) -> None:
    pipe, ours = os.pipe()
    launched = begun(tmp_path, ours, max_steps=40)
    with nobody_outlives(tmp_path):
        wait_for_steps(tmp_path / "run", 3)
        os.close(pipe)
        ended, left = launched.wait(90), left_of(tmp_path)
    assert (ended, left) == (0, [])
    record = read_record(tmp_path / "run")
    assert len(record.steps) == 40
    assert record.summary["steps"] == 40
