"""Runs that something happens to, in real processes under DeepSpeed's launcher. Oracle, after each: started again, the run ends with the losses
of the undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest
from launch_kit import (
    ROOT,
    deepspeed_train,
    launch,
    left_of,
    nobody_outlives,
    recipe_file,
    surroundings,
    wait_for_steps,
)

from dsfreeze.record import read_record
from dsfreeze.verify import resumed_from, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
HERE = Path(__file__).parent
#: A plan that moves at step 4, a checkpoint every second step, eight steps; no epsilon so small that rounding decides a step.
PLAN = {"fraction": None, "strategy": "lisa", "active_layers": 1, "switch_every": 4, "state": "offload"}
OPTIONS = {
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 2,
    "adam_epsilon": 1e-2,
    "resume_from_checkpoint": "auto",
    "ddp_timeout": 15,
}
#: Fault, rank, step, and the step of the checkpoint that is gone on from (none: from the beginning).
FAULTS = [
    ("die in step", 1, 1, None), ("die in save", 0, 4, 2), ("die before rename", 0, 4, 2), ("die in refreeze", 1, 5, 4), ("full in save", 0, 4, 2),
    ("hang in step", 1, 5, 4),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> tuple[Path, list[float]]:
    """The recipe's file, and the losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    file = recipe_file(folder, zero="zero2", freeze=PLAN, **OPTIONS)
    done = launch(deepspeed_train(file), folder)
    assert done.returncode == 0, done.stderr
    return file, losses(folder / "run")


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_record(run).steps]


def go_on(file: Path, folder: Path, expected: list[float]) -> None:
    """The same command again, nothing in the way."""
    done = launch(deepspeed_train(file, f"train.output_dir={folder / 'run'}"), folder)
    assert done.returncode == 0, done.stderr
    assert losses(folder / "run") == pytest.approx(expected, abs=1e-6)
    assert {finding.verdict for finding in verify(folder / "run")} <= {"whole", "left over"}


@pytest.mark.parametrize(
    ("fault", "rank", "step", "resumed"), FAULTS, ids=[f"{f[0]} {f[2]}, rank {f[1]}" for f in FAULTS]
)
def test_a_fault_costs_the_steps_since_the_checkpoint(
    tmp_path: Path, whole: tuple[Path, list[float]], fault: str, rank: int, step: int, resumed: int | None
) -> None:
    file, expected = whole
    command = deepspeed_train(
        file, f"train.output_dir={tmp_path / 'run'}", module=("faulty", fault, str(rank), str(step))
    )
    environment = {
        "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
        "DSFREEZE_STRUCK": str(tmp_path / "struck"),
    }
    with nobody_outlives(tmp_path):
        done = launch(command, tmp_path, **environment)
        assert done.returncode != 0
        assert (tmp_path / "struck").exists(), done.stderr
        assert left_of(tmp_path, seconds=40) == [], "no rank waits for one that has gone"
    assert resumed_from(tmp_path / "run") == (None if resumed is None else f"checkpoint-{resumed}")
    if fault.startswith("full"):
        assert "No space left on device" in done.stderr
    if fault.startswith("hang"):
        assert re.search(rf"rank {rank} \(process \d+ on .*\) does not answer; it is at step {step}", done.stderr), (
            done.stderr
        )
    go_on(file, tmp_path, expected)


def test_a_killed_launcher_leaves_nobody_and_loses_no_step_that_was_saved(
    tmp_path: Path, whole: tuple[Path, list[float]]
) -> None:
    """kill -9 of the launcher: its ranks have nobody above them. They end by themselves or with the run; then it goes on."""
    file, expected = whole
    launched = psutil.Popen(
        deepspeed_train(file, f"train.output_dir={tmp_path / 'run'}"), cwd=ROOT, env=surroundings(tmp_path), stdin=subprocess.DEVNULL,
        stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    with nobody_outlives(tmp_path):
        wait_for_steps(tmp_path / "run", 2)
        os.kill(launched.pid, signal.SIGKILL)
        launched.wait(30)
        assert left_of(tmp_path, seconds=60) == []
    if len(losses(tmp_path / "run")) < len(expected) or not (tmp_path / "run/summary.json").exists():
        go_on(file, tmp_path, expected)
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("damage", ["truncated", "half deleted"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, whole: tuple[Path, list[float]], damage: str
) -> None:
    """The newest is not whole: the one before it is used."""
    file, expected = whole
    stopped = launch(deepspeed_train(file, f"train.output_dir={tmp_path / 'run'}", "train.max_steps=8", module=("faulty", "die in step", "1", "7")), tmp_path, PYTHONPATH=str(HERE), DSFREEZE_STRUCK=str(tmp_path / "struck"))  # fmt: skip
    assert stopped.returncode != 0
    newest = tmp_path / "run" / "checkpoint-6"
    weights = newest / "weights.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    else:
        weights.unlink()
    assert resumed_from(tmp_path / "run") == "checkpoint-4"
    done = launch(deepspeed_train(file, f"train.output_dir={tmp_path / 'run'}"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Passed over" in done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)
