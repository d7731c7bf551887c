"""What tests of launch.sh share: an environment that it takes for installed, and what is left of a launch."""

from __future__ import annotations

import subprocess
import time
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


def processes_that_name(word: str, seconds: float = 0.0) -> list[list[str]]:
    """Command lines that hold `word`, once there are none or after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        lines = [p.info["cmdline"] for p in psutil.process_iter(["cmdline", "status"]) if _alive(p)]
        found = [line for line in lines if any(word in argument for argument in line)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _alive(process: psutil.Process) -> bool:
    return bool(process.info["cmdline"]) and process.info["status"] != psutil.STATUS_ZOMBIE
