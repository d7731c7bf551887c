"""./launch.sh --hostfile, and torchrun, on two hosts of one rank each. Oracle: the same recipe with two ranks on one host, by DeepSpeed's
launcher; a run whose number of ranks was changed by hand."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from hosts import NAMES, Host, two_hosts, why_not
from launch_kit import (
    PYTHON,
    ROOT,
    deepspeed_train,
    fake_venv,
    free_port,
    launch,
    left_of,
    nobody_outlives,
    recipe_file,
    surroundings,
    wait_for_steps,
)

from dsfreeze.record import read_record
from dsfreeze.verify import resumed_from, verify

REASON = why_not()
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.skipif(REASON is not None, reason=str(REASON))]
MOVING = {"fraction": None, "strategy": "lisa", "active_layers": 1, "switch_every": 2, "state": "offload"}
PLANS = {"static": {"strategy": "bottom", "fraction": 0.5}, "moving": MOVING}
OPTIONS = {"max_steps": 6, "adam_epsilon": 1e-2, "resume_from_checkpoint": "auto", "ddp_timeout": 15}
#: Steps of a run that something happens to: more than it comes to make.
MANY = 400


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: Any) -> Iterator[tuple[Host, Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts") / "net") as both:
        yield both


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_record(run).steps]


def command(hosts: Sequence[Host], folder: Path, file: Path, *words: str) -> tuple[list[str], dict[str, str]]:
    """launch.sh on the first host, with a hostfile, and its environment."""
    first, hostfile = hosts[0], folder / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots=1\n" for host in hosts))
    folder.joinpath("venv").exists() or fake_venv(folder / "venv", f'exec "{PYTHON}" "$@"')
    environment = surroundings(folder) | {"DSFREEZE_VENV": str(folder / "venv")}
    environment["PATH"] = f"{first.folder / 'bin'}:{environment['PATH']}"
    options = ["--hostfile", str(hostfile), "--master_port", str(free_port())]
    return [
        *first.inside,
        str(ROOT / "launch.sh"),
        *options,
        str(file),
        f"train.output_dir={folder / 'run'}",
        *words,
    ], environment


def run(hosts: Sequence[Host], folder: Path, file: Path, *words: str) -> subprocess.CompletedProcess[str]:
    words_, environment = command(hosts, folder, file, *words)
    return subprocess.run(
        words_, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL, check=False
    )  # fmt: skip


@pytest.fixture(scope="module", params=list(PLANS))
def on_one_host(request: Any, tmp_path_factory: Any) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp(request.param)
    file = recipe_file(folder, zero="zero2", freeze=PLANS[request.param], **OPTIONS)
    done = launch(deepspeed_train(file), folder)
    assert done.returncode == 0, done.stderr
    return file, losses(folder / "run")


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_two_hosts_train_as_one_does(
    hosts: tuple[Host, Host], tmp_path: Path, on_one_host: tuple[Path, list[float]], zero: str
) -> None:
    file, expected = on_one_host
    done = run(hosts, tmp_path, file, f"zero={zero}")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-5)
    assert read_record(tmp_path / "run").environment["world_size"] == 2


def begun(hosts: Sequence[Host], folder: Path) -> tuple[Path, Any]:
    """A run with a checkpoint at every third step that has made five."""
    file = recipe_file(
        folder,
        freeze=MOVING,
        **OPTIONS | {"max_steps": MANY, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1},
    )
    words, environment = command(hosts, folder, file)
    launched = psutil.Popen(
        words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=(folder / "log").open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    wait_for_steps(folder / "run", 5)
    return file, launched


def test_a_terminated_launcher_leaves_a_checkpoint_of_the_last_step(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """SIGTERM to launch.sh, as a cluster preempts: both hosts' ranks stop after the same step, although pdsh is gone, to which they speak."""
    with nobody_outlives(tmp_path):
        _, launched = begun(hosts, tmp_path)
        (launcher,) = launched.children()  # nsenter passes nothing on but the exit code
        launcher.send_signal(signal.SIGTERM)
        assert launched.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
        assert left_of(tmp_path, seconds=20) == []
    assert resumed_from(tmp_path / "run") == f"checkpoint-{len(losses(tmp_path / 'run'))}"


@pytest.mark.parametrize("harm", [Host.pull_the_plug, Host.kill], ids=["cut off", "killed"])
def test_a_lost_host_ends_the_run_and_the_other_goes_on_alone(
    tmp_path: Path, tmp_path_factory: Any, harm: Callable[[Host], None]
) -> None:
    """The end is clear: the launcher comes back, and says which rank was lost; then the same command goes on at world size 1."""
    with two_hosts(tmp_path_factory.mktemp("hosts") / "net") as (first, second), nobody_outlives(tmp_path):
        file, launched = begun((first, second), tmp_path)
        harm(second)
        code = launched.wait(120)
        log = (tmp_path / "log").read_text()
        assert code not in (0, None), log
        assert "rank 1" in log
        assert left_of(tmp_path, seconds=60) == []
        made = len(losses(tmp_path / "run"))
        number = int(str(resumed_from(tmp_path / "run")).rpartition("-")[2])
        assert number > made - 4
        done = run((first,), tmp_path, file, f"train.max_steps={number + 2}")
        assert done.returncode == 0, done.stderr
        assert len(losses(tmp_path / "run")) == number + 2
        assert {finding.verdict for finding in verify(tmp_path / "run")} <= {"whole", "left over"}


def elastic(host: Host, folder: Path, file: Path, port: int) -> psutil.Popen:
    """torchrun on one of the hosts, which meet at the first."""
    words = [
        *host.inside, PYTHON, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NAMES[0]}:{port}", "--rdzv-conf", "last_call_timeout=10", "-m", "dsfreeze", "train", str(file),
    ]  # fmt: skip
    return psutil.Popen(
        words, cwd=ROOT, env=surroundings(folder), stdin=subprocess.DEVNULL, stdout=(folder / f"log-{host.name}").open("w"),
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def test_torchrun_starts_again_without_a_lost_host(tmp_path: Path, tmp_path_factory: Any) -> None:
    """Elastic: nobody does anything; the host that is left goes on from the newest checkpoint, to the end, as one that is started by
    hand from that checkpoint at world size 1 does."""
    steps = 120
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 20, "save_total_limit": 10}
    with two_hosts(tmp_path_factory.mktemp("hosts") / "net") as hosts, nobody_outlives(tmp_path):
        file, port = recipe_file(tmp_path, freeze=MOVING, **OPTIONS | options), free_port()
        launched, _ = (elastic(host, tmp_path, file, port) for host in hosts)
        wait_for_steps(tmp_path / "run", 25)
        hosts[1].kill()
        code = launched.wait(200)
        log = (tmp_path / f"log-{NAMES[0]}").read_text()
        assert code == 0, log
    number = int(re.findall(r"resumedfrom\S+?checkpoint-(\d+)", "".join(log.split()))[-1])  # long lines are folded
    done = launch(
        [PYTHON, "-m", "dsfreeze", "train", str(file), f"train.output_dir={tmp_path / 'alone'}", f"train.resume_from_checkpoint={tmp_path / 'run'}/checkpoint-{number}"],
        tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == steps
    assert losses(tmp_path / "run")[number:] == pytest.approx(losses(tmp_path / "alone")[-(steps - number) :], abs=1e-6)
