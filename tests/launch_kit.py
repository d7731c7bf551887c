"""What tests of launch.sh share: an environment that it takes for installed, and what is left of a launch."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
STAMPED = ("pyproject.toml", "constraints.txt", "embedded-models.txt")


def write_program(file: Path, *lines: str) -> Path:
    """An executable shell script of these lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["#!/bin/sh", *lines]) + "\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def fake_venv(folder: Path, *lines: str, root: Path = ROOT) -> Path:
    """A folder for DSFREEZE_VENV whose python is a shell script of `lines`; launch.sh in `root` installs nothing there."""
    write_program(folder / "bin" / "python", *lines)
    content = b"".join((root / name).read_bytes() for name in STAMPED)
    check = subprocess.run(["cksum"], input=content, capture_output=True, check=True).stdout.decode()
    for extra in ("models", "dev"):
        (folder / f".installed-{extra}-{'-'.join(check.split())}").touch()
    return folder


@contextmanager
def signals_obeyed() -> Iterator[None]:
    """Here, and in processes started here, SIGINT and SIGHUP act as usual, even where the shell (`&`, nohup) had them ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def left_of(folder: Path, seconds: float = 0.0) -> list[str]:
    """Processes whose command line names the folder, once there are none or after `seconds`."""
    deadline = time.monotonic() + seconds
    while (found := _that_name(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [" ".join(process.info["cmdline"]) for process in found]


@contextmanager
def nobody_outlives(folder: Path) -> Iterator[None]:
    """At the end, also of a test that fails, kill what is `left_of` the folder."""
    try:
        yield
    finally:
        for process in _that_name(folder):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _that_name(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        alive = process.info["status"] != psutil.STATUS_ZOMBIE
        if alive and any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found
