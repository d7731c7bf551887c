"""A training as a child. Oracles: POSIX exit codes, what small programs wrote when a signal came, and processes that are left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launch_kit import left_of, nobody_outlives, signals_obeyed
from marks import some_fast

from dsfreeze.supervise import supervise

ROOT = Path(__file__).parents[1]
#: Takes its time over a signal, notes each one in the file it is given, and ends as dsfreeze does.
TRAINING = """
import signal, sys, time
heard = []
def note(number, frame):
    heard.append(number)
    open(sys.argv[1], "a").write(f"{number}\\n")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, note)
print("ready", flush=True)
while not heard:
    time.sleep(0.02)
time.sleep(1)
open(sys.argv[1], "a").write("saved\\n")
sys.exit(128 + heard[0])
"""
#: DeepSpeed 0.19.8 in small: the runner has no handlers; launch notes a signal that it should not get.
RUNNER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-u", "-m", "deepspeed.launcher.launch", *sys.argv[1:]]).wait() % 256)
"""
LAUNCH = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: open(sys.argv[1], "a").write("launch was told\\n"))
sys.exit(subprocess.Popen([sys.executable, "-m", "training", *sys.argv[1:]]).wait())
"""


@pytest.fixture
def start(tmp_path):
    """Starts `python -m dsfreeze.supervise MODULE NOTES` and waits until the training in it is ready."""
    launcher = tmp_path / "deepspeed" / "launcher"
    launcher.mkdir(parents=True)
    for package in (launcher.parent, launcher):
        (package / "__init__.py").touch()
    (tmp_path / "training.py").write_text(TRAINING)
    (tmp_path / "stubborn.py").write_text(TRAINING.replace("while not heard", "while True"))
    (launcher / "runner.py").write_text(RUNNER)
    (launcher / "launch.py").write_text(LAUNCH)

    def started(module: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "dsfreeze.supervise", module, str(tmp_path / "notes")]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stdout.readline() == "ready\n"
        return process

    with signals_obeyed(), nobody_outlives(tmp_path):
        yield started


@pytest.mark.parametrize("module", ["training", "deepspeed.launcher.runner"])
@pytest.mark.parametrize(("number", "reaches"), some_fast([("TERM", "TERM"), ("INT", "INT"), ("HUP", "TERM")]))
def test_a_signal_reaches_the_training_once_and_it_ends_in_its_own_time(start, tmp_path, module, number, reaches):
    process = start(module)
    process.send_signal(signal.Signals[f"SIG{number}"])
    passed_on = signal.Signals[f"SIG{reaches}"]
    assert process.wait(20) == 128 + signal.Signals[f"SIG{number}"]
    assert (tmp_path / "notes").read_text() == f"{passed_on.value}\nsaved\n"
    assert left_of(tmp_path) == []


def test_signals_sent_again_do_not_end_it_earlier(start, tmp_path):
    process = start("training")
    process.terminate()
    time.sleep(0.3)
    process.terminate()
    assert process.wait(20) == 143
    assert (tmp_path / "notes").read_text().endswith("saved\n")


def test_the_third_signal_leaves_nobody(start, tmp_path):
    process = start("stubborn")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(20) == 130
    assert "saved" not in (tmp_path / "notes").read_text()
    assert left_of(tmp_path) == []


@pytest.mark.slow
def test_where_the_launcher_is_killed_the_training_is_waited_for(start, tmp_path):
    """A batch system signals every process. Oracle: "saved" is there when we end, and the code is the shell's."""
    process = start("deepspeed.launcher.runner")
    (runner,) = psutil.Process(process.pid).children()
    os.killpg(runner.pid, signal.SIGTERM)
    assert process.wait(20) == 143
    assert "saved\n" in (tmp_path / "notes").read_text()
    assert left_of(tmp_path) == []


@pytest.mark.parametrize(
    ("program", "code"), [("pass", 0), ("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)]
)
def test_its_exit_code_is_ours(program, code):
    assert supervise([sys.executable, "-c", program]) == (code, 0)


def test_a_mistake_found_while_saving_is_not_hidden_behind_the_signal(start, tmp_path):
    """Oracle: exit code 2, which the command line uses for a full disk."""
    (tmp_path / "training.py").write_text(TRAINING.replace("128 + heard[0]", "2"))
    process = start("training")
    process.terminate()
    assert process.wait(20) == 2


def test_a_signal_ignored_from_the_start_stays_ignored(tmp_path):
    """As under nohup. Oracle: the child reads its own disposition."""
    program = "import signal; print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)"
    check = f"import sys; from dsfreeze.supervise import supervise; supervise([sys.executable, '-c', {program!r}])"
    done = subprocess.run(["nohup", sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
