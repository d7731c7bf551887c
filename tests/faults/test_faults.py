"""Runs that something happens to, in real processes under DeepSpeed's launcher. Oracle, after each: started again, the run ends with the losses
of the undisturbed one."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import why_not
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
REASON = why_not()
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


def struck(folder: Path) -> dict[str, str]:
    """The environment of a run in which a fault strikes, and of which `struck` is left."""
    return {"PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}", "DSFREEZE_STRUCK": str(folder / "struck")}


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
    with nobody_outlives(tmp_path):
        done = launch(command, tmp_path, **struck(tmp_path))
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


@pytest.mark.parametrize("damage", ["truncated", "half deleted", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_said(
    tmp_path: Path, whole: tuple[Path, list[float]], damage: str
) -> None:
    """The newest is not whole: the one before it is used."""
    file, expected = whole
    stopped = launch(deepspeed_train(file, f"train.output_dir={tmp_path / 'run'}", "train.max_steps=8", module=("faulty", "die in step", "1", "7")), tmp_path, **struck(tmp_path))  # fmt: skip
    assert stopped.returncode != 0
    newest = tmp_path / "run" / "checkpoint-6"
    weights = newest / "weights.safetensors"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights.write_bytes(content[:-9] + bytes([content[-9] ^ 16]) + content[-8:])
    else:
        weights.unlink()
    assert resumed_from(tmp_path / "run") == "checkpoint-4"
    done = launch(deepspeed_train(file, f"train.output_dir={tmp_path / 'run'}"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Passed over" in done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)


def test_a_cache_whose_filling_was_killed_is_filled_again(tmp_path: Path) -> None:
    """Oracle: a run without a cache. What the killed one left on disk is used or passed over, and nothing of it is wrong."""
    freeze = {
        "strategy": "bottom",
        "fraction": 0.5,
        "prefix_cache": "disk",
        "prefix_cache_dir": str(tmp_path / "prefix"),
    }
    file = recipe_file(tmp_path, zero="zero2", freeze=freeze, **OPTIONS | {"max_steps": 24})
    plain = launch(
        deepspeed_train(
            file, "freeze.prefix_cache=off", "freeze.prefix_cache_dir=null", f"train.output_dir={tmp_path / 'plain'}"
        ),
        tmp_path,
    )
    assert plain.returncode == 0, plain.stderr
    with nobody_outlives(tmp_path):
        died = launch(
            deepspeed_train(file, module=("faulty", "die in cache fill", "1", "1")), tmp_path, **struck(tmp_path)
        )
        assert died.returncode != 0
        assert (tmp_path / "struck").exists(), died.stderr
        assert left_of(tmp_path, seconds=40) == []
    done = launch(deepspeed_train(file), tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    assert json.loads((tmp_path / "run/summary.json").read_text())["prefix_cache"]["hits"] > 0


@pytest.mark.parametrize("jump", ["clock back", "clock forward"])
def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, whole: tuple[Path, list[float]], jump: str) -> None:
    """By a day, on the rank that writes: no time-out strikes, no duration is negative or a day."""
    file, expected = whole
    done = launch(
        deepspeed_train(file, f"train.output_dir={tmp_path / 'run'}", module=("faulty", jump, "0", "3")), tmp_path, **struck(tmp_path)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "struck").exists()
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)
    steps = [json.loads(line) for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert all(0 < line["seconds"] < 600 for line in steps)
    assert 0 <= json.loads((tmp_path / "run/summary.json").read_text())["seconds_switching"] < 600


#: Makes root obey permissions, as everybody else does.
OBEY = (
    ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    if os.geteuid() == 0
    else []
)


@pytest.mark.skipif(bool(OBEY) and shutil.which("setpriv") is None, reason="root without setpriv may do everything")
@pytest.mark.parametrize(
    "closed", ["run", "data/train.jsonl", "model/model.safetensors", "run/checkpoint-2/weights.safetensors"]
)
def test_what_may_not_be_read_or_written_is_named(tmp_path: Path, closed: str) -> None:
    file = recipe_file(
        tmp_path,
        zero="local",
        **{"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto"},
    )
    words = [*OBEY, sys.executable, "-m", "dsfreeze", "train", str(file)]
    if closed.startswith("run"):
        assert launch(words, tmp_path).returncode == 0
    path = tmp_path / closed
    path.chmod(0o500 if path.is_dir() else 0)
    done = launch([*words, "train.max_steps=3"], tmp_path)
    said = " ".join(done.stderr.split())
    assert done.returncode == 2, done.stderr
    assert "error:" in said
    assert "Permission denied" in said
    assert path.name in said.replace(" ", "")
    assert "Traceback" not in said


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
def test_a_read_only_output_is_refused_at_once(tmp_path: Path) -> None:
    """On a file system that is mounted so, in a namespace of its own."""
    file = recipe_file(tmp_path, zero="local", max_steps=2)
    (tmp_path / "disk").mkdir()
    command = f"mount -t tmpfs -o ro none {tmp_path / 'disk'} && exec {sys.executable} -m dsfreeze train {file} train.output_dir={tmp_path / 'disk/run'}"
    done = launch(["unshare", "--mount", "sh", "-c", command], tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Cannot make" in done.stderr
    assert "Read-only file system" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
