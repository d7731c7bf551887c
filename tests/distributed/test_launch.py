"""Through the real launchers, as users start it. Oracle: exit codes, and the same losses from every launcher."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from forks import _free_port
from tiny_runs import tiny_recipe

from dsfreeze.record import read_record

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def launch(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    surroundings = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    surroundings |= {"TORCH_EXTENSIONS_DIR": str(folder / "extensions"), "OMP_NUM_THREADS": "1", **environment}
    path = f"{Path(PYTHON).parent}:{surroundings['PATH']}"
    return subprocess.run(
        command, cwd=ROOT, env={**surroundings, "PATH": path}, capture_output=True, text=True, timeout=180, check=False
    )


def recipe_file(folder: Path, **train: object) -> Path:
    recipe = tiny_recipe(
        folder, zero="zero2", train={"max_steps": 4, "export": False, "per_device_train_batch_size": 2, **train}
    )
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return file


def test_every_launcher_gives_the_same_losses(tmp_path):
    file = recipe_file(tmp_path)
    deepspeed = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port"]
    commands = {
        "deepspeed": [*deepspeed, str(_free_port()), "--module", "dsfreeze", "train", str(file)],
        "no_local_rank": [*deepspeed, str(_free_port()), "--no_local_rank", "--module", "dsfreeze", "train", str(file)],
        "torchrun": [PYTHON, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(_free_port()),
                     "-m", "dsfreeze", "train", str(file)],
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
    command = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(_free_port())]
    done = launch([*command, "--module", "dsfreeze", "train", str(file), "data.label=labell"], tmp_path)
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
    command = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(_free_port())]
    done = launch(
        [*command, "--module", "dsfreeze", "train", str(file), f"train.output_dir={tmp_path / 'out'}"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "lock" in done.stderr
