"""Through the real launchers, as users start it. Oracle: exit codes, and the same losses from every launcher."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil
import pytest
from launch_kit import (
    PYTHON,
    ROOT,
    deepspeed_train,
    free_port,
    launch,
    launch_sh,
    left_of,
    nobody_outlives,
    recipe_file,
    signals_obeyed,
    surroundings,
    wait_for_steps,
)  # fmt: skip
from test_train import losses, train, values

from dsfreeze.checkpoint import find_checkpoint
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_every_launcher_gives_the_same_losses(tmp_path):
    file = recipe_file(tmp_path)
    deepspeed = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
    commands = {
        "deepspeed": [*deepspeed, str(free_port()), "--module", "dsfreeze", "train", str(file)],
        "no_local_rank": [*deepspeed, str(free_port()), "--no_local_rank", "--module", "dsfreeze", "train", str(file)],
        "torchrun": [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
                     "-m", "dsfreeze", "train", str(file)],
        "accelerate": [PYTHON, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                       "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port()),
                       "-m", "dsfreeze", "train", str(file)],
        "one rank of torchrun": [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", str(free_port()),
                                 "-m", "dsfreeze", "train", str(file), "train.per_device_train_batch_size=4"],
        "plain": [PYTHON, "-m", "dsfreeze", "train", str(file), "train.per_device_train_batch_size=4"],
    }  # fmt: skip
    losses = {}
    for name, command in commands.items():
        done = launch([*command, f"train.output_dir={tmp_path / name}"], tmp_path)
        assert done.returncode == 0, f"{name}: {done.stdout}\n{done.stderr}"
        losses[name] = [line["loss"] for line in read_record(tmp_path / name).steps]
    for name in commands:
        assert losses[name] == pytest.approx(losses["deepspeed"], abs=1e-6), name


def test_a_mistake_is_an_error_on_every_rank_and_the_launcher_fails(tmp_path):
    file = recipe_file(tmp_path)
    done = launch(deepspeed_train(file, "data.label=labell"), tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr.replace('Traceback (most recent call last):\n  File "<frozen runpy>"', "")
    assert "labell" in done.stderr


def test_a_stale_lock_of_a_killed_compilation_does_not_hang_a_launch(tmp_path):
    """A killed build leaves `lock` in the extensions folder; every later launch waited on it for ever (pytorch #189245)."""
    file = recipe_file(tmp_path, max_steps=1)
    for op in ("deepspeed_shm_comm", "cpu_adam"):
        for folder in (tmp_path / "extensions" / op, tmp_path / "extensions" / "py311_cpu" / op):
            folder.mkdir(parents=True)
            (folder / "lock").touch()
    done = launch(deepspeed_train(file, f"train.output_dir={tmp_path / 'out'}"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lock" in done.stderr


def test_launches_of_launch_sh_leave_no_process_and_no_lock(tmp_path):
    """One after another on one port, as people do. Oracle: the process table and the extensions folder after each."""
    file = recipe_file(tmp_path, max_steps=1)
    command, environment = launch_sh(tmp_path)
    for number in range(2):
        done = launch([*command, str(file), f"train.output_dir={tmp_path / str(number)}"], tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        assert left_of(tmp_path, seconds=2) == []
        assert list((tmp_path / "extensions").rglob("lock")) == []


def the_process(launched: psutil.Process) -> None:
    launched.terminate()


def its_group(launched: psutil.Process) -> None:
    os.killpg(launched.pid, signal.SIGTERM)


def every_process(launched: psutil.Process) -> None:
    """As a batch system does; then DeepSpeed's launcher signals its workers a second time."""
    for process in [launched, *launched.children(recursive=True)]:
        process.terminate()


def ctrl_c(launched: psutil.Process) -> None:
    os.killpg(launched.pid, signal.SIGINT)


@pytest.mark.parametrize(("stop", "code"), [(the_process, 143), (its_group, 143), (every_process, 143), (ctrl_c, 130)])
def test_a_signal_to_launch_sh_ends_it_after_the_checkpoint(tmp_path, stop, code):
    """Oracles: the shell's exit code, a checkpoint that is whole at that moment, and the process table."""
    file = recipe_file(tmp_path, max_steps=100_000)
    command, environment = launch_sh(tmp_path)
    with signals_obeyed():
        launched = psutil.Popen(
            [*command, str(file)], cwd=ROOT, env=surroundings(tmp_path) | environment, stdin=subprocess.DEVNULL,
            stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    with nobody_outlives(tmp_path):
        wait_for_steps(tmp_path / "run", 3)
        stop(launched)
        ended, left = launched.wait(90), left_of(tmp_path)
    assert (ended, left) == (code, []), (tmp_path / "log").read_text()
    found = find_checkpoint(tmp_path / "run", True)
    assert found.step == len(read_record(tmp_path / "run").steps)
    assert found.state()


#: a plan that is known beforehand, and one decided at step 4 from what the run measured
MOVING = {
    "zero3": {"strategy": "lisa", "active_layers": 1, "switch_every": 3},
    "zero2": {"strategy": "adt_l", "fraction": 0.5, "track_steps": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("zero", MOVING)
def test_a_moving_plan_under_the_launcher(tmp_path, zero):
    """Oracle: the local engine in this process, on the same global batch."""
    options = {"max_steps": 8, "adam_epsilon": 1e-2, "per_device_train_batch_size": 4}
    file = recipe_file(tmp_path, freeze={"fraction": None, **MOVING[zero]}, zero=zero, **options)
    local = train(values(load_recipe(file), "local", tmp_path / "local", ranks=1))
    words = ["train.per_device_train_batch_size=2", f"train.output_dir={tmp_path / zero}"]
    done = launch(deepspeed_train(file, *words), tmp_path)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / zero) == pytest.approx(losses(tmp_path / "local"), abs=1e-5)
    summary = read_record(tmp_path / zero).summary
    assert summary["switches"] == local["switches"] > 0
    assert summary["plan_digest"] == local["plan_digest"]


@pytest.mark.slow
def test_a_moving_run_stopped_by_a_signal_goes_on_as_if_it_had_not_been(tmp_path):
    """SIGTERM some steps into the second phase, then the same command with resume. Oracle: the uninterrupted local run."""
    freeze = {"fraction": None, "strategy": "lisa", "active_layers": 1, "switch_every": 40, "state": "offload"}
    options = {"max_steps": 160, "adam_epsilon": 1e-2, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
    file = recipe_file(tmp_path, freeze=freeze, **options)
    words = ["train.per_device_train_batch_size=2"]
    launched = psutil.Popen(
        deepspeed_train(file, *words), cwd=ROOT, env=surroundings(tmp_path), stdin=subprocess.DEVNULL,
        stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    with nobody_outlives(tmp_path):
        wait_for_steps(tmp_path / "run", 45)
        its_group(launched)
        assert launched.wait(90) != 0, (tmp_path / "log").read_text()
        # the launcher goes at once; its ranks end their step and write the checkpoint
        assert left_of(tmp_path, seconds=60) == []
    stopped = find_checkpoint(tmp_path / "run", True).step
    assert 45 <= stopped < 160, "it was stopped on its way"
    done = launch(deepspeed_train(file, *words, "train.resume_from_checkpoint=true"), tmp_path)
    assert done.returncode == 0, done.stderr
    train(values(load_recipe(file), "local", tmp_path / "local", ranks=1))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "local"), abs=1e-5)
