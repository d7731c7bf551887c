"""What tests through the real launchers share: a recipe's file, commands, an environment that launch.sh takes for installed, and what is left
of a launch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml
from tiny_runs import tiny_recipe

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def surroundings(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    kept["PATH"] = f"{Path(PYTHON).parent}:{kept['PATH']}"
    return kept | {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "OMP_NUM_THREADS": "1"}


def launch(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=surroundings(folder) | environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def recipe_file(folder: Path, *, zero: str = "zero2", freeze: dict | None = None, **train: object) -> Path:
    train = {"max_steps": 4, "export": False, "per_device_train_batch_size": 2, **train}
    recipe = tiny_recipe(folder, zero=zero, freeze=freeze or {}, train=train)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return file


def launch_sh(folder: Path) -> tuple[list[str], dict[str, str]]:
    """./launch.sh with two ranks, up to the recipe, and the environment that keeps it from installing anything."""
    venv = fake_venv(folder / "an environment", f'exec "{PYTHON}" "$@"')
    return (
        [str(ROOT / "launch.sh"), "--num_accelerators", "2", "--master_port", str(free_port())],
        {"DSFREEZE_VENV": str(venv)},
    )


def deepspeed_train(file: Path, *words: str, module: tuple[str, ...] = ("dsfreeze",)) -> list[str]:
    """Two ranks under DeepSpeed's launcher."""
    return [PYTHON, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(free_port()),
            "--module", *module, "train", str(file), *words]  # fmt: skip


def wait_for_steps(run: Path, number: int) -> None:
    """Return when the run has made so many steps, or none of them in time."""
    steps, deadline = run / "steps.jsonl", time.monotonic() + 120
    while not (steps.exists() and steps.read_text().count("\n") >= number) and time.monotonic() < deadline:
        time.sleep(0.1)
