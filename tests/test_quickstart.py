"""The quickstart on a tiny model. Oracles: the records of its two halves, what it printed, exit codes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_kit import left_of, nobody_outlives, signals_obeyed, write_program
from tiny_runs import classification_data, llama_folder

from dsfreeze import quickstart
from dsfreeze.checkpoint import find_checkpoint
from dsfreeze.cli import run
from dsfreeze.record import read_record

ROOT = Path(__file__).parents[1]
ROWS = ("accuracy before", "accuracy after", "parameters", "trainable parameters", "optimizer state", "peak memory",
        "seconds per step", "FLOPs per token")  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Overrides that make it a matter of seconds; the runs go below tmp_path."""
    monkeypatch.chdir(tmp_path)
    data = classification_data(tmp_path / "data")
    return [
        f"model={llama_folder(tmp_path / 'model')}", "zero=local", *(f"data.{key}={value}" for key, value in data.items()),
        "train.max_steps=3", "train.per_device_train_batch_size=4",
    ]  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """The halves run in this process, which has torch imported."""

    def train(words):
        with contextlib.redirect_stdout(io.StringIO()):
            return run(["train", "--json", *words])

    monkeypatch.setattr(quickstart, "_train", train)


def both(folder):
    """The summaries of the two halves, once both are known to be what they should be."""
    frozen, full = (read_record(part).summary for part in (folder, folder / "full-tuning"))
    assert (frozen["steps"], full["steps"]) == (3, quickstart.FULL_STEPS)
    assert full["trainable"] == full["total"]
    assert full["never_moved"] == []
    assert full["model"] is None
    return frozen, full


def test_both_halves_run_and_are_compared(tiny, here, capsys):
    assert run(["quickstart", *tiny]) == 0
    frozen, full = both(Path("runs/quickstart"))
    assert frozen["strategy"] == "bottom"
    assert frozen["trainable"] < full["trainable"]
    shown = capsys.readouterr().out
    assert [row for row in ROWS if row not in shown] == []
    assert frozen["model"] in shown
    assert run(["quickstart", *tiny]) == 0
    both(Path("runs/quickstart-2"))


def test_json_is_one_object(tiny, here, capsys):
    assert run(["quickstart", "--json", *tiny]) == 0
    frozen, full = both(Path("runs/quickstart"))
    assert json.loads(capsys.readouterr().out) == {"frozen": frozen, "full": full}


def test_the_folder_that_was_asked_for(tiny, here, capsys):
    """A name that YAML and rich would each take for something else."""
    assert run(["quickstart", *tiny, "train.output_dir='[my] runs'"]) == 0
    both(Path("[my] runs"))
    assert "record: [my] runs " in capsys.readouterr().out
    assert not Path("runs").exists()


def test_a_folder_in_use_is_a_mistake(tiny, here, capsys):
    assert run(["quickstart", *tiny, "train.output_dir=mine"]) == 0
    capsys.readouterr()
    assert run(["quickstart", *tiny, "train.output_dir=mine"]) == 2
    assert "mine" in capsys.readouterr().err


def test_without_evaluation_or_export(tiny, here, capsys):
    assert run(["quickstart", *tiny, "data.eval=null", "train.export=false"]) == 0
    both(Path("runs/quickstart"))
    shown = capsys.readouterr().out
    assert "trainable parameters" in shown
    assert "accuracy" not in shown
    assert "None" not in shown


@pytest.mark.parametrize("freeze", [
    ["adapter={r: 2}"], ["fraction=null", "count=3"], ["strategy=lora", "fraction=null"], ["strategy=head", "fraction=null"],
    ["strategy=patterns", "fraction=null", "trainable=[layers.1]"],
    ["strategy=patterns", "fraction=null", "frozen=[layers.1]"], ["freeze_trainable_layers=1", "strategy=patterns", "fraction=null"],
    ["embed=freeze", "norm=freeze", "head=train"], ["granularity=bias"], ["strategy=interval", "offset=1"],
])  # fmt: skip
def test_the_second_half_trains_everything_whatever_is_frozen(tiny, freeze, tmp_path):
    """Oracle: the plan of its recipe, made by the ordinary command."""
    words = [*quickstart.RECIPE, *tiny, *(f"freeze.{word}" for word in freeze), *quickstart.FULL]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert run(["plan", "--json", *words]) == 0
    plan = json.loads(shown.getvalue())
    assert plan["trainable"] == plan["total"]


def test_a_wrong_override_is_told_before_anything_runs(tiny, capsys):
    assert run(["quickstart", *tiny, "freeze.fractoin=0.5"]) == 2
    told = capsys.readouterr().err
    assert "fraction" in told
    assert "1 of 2" not in told


def test_a_half_that_fails_ends_it_with_its_code(tiny, monkeypatch):
    monkeypatch.setattr(quickstart, "supervise", lambda *_, **__: (3, 0))
    assert run(["quickstart", *tiny]) == 3


def test_a_signal_in_the_last_moment_of_a_half_ends_it(tiny, monkeypatch):
    """The half finished, code 0; the person who pressed Ctrl-C wants no second one."""
    calls = []
    monkeypatch.setattr(quickstart, "supervise", lambda *_, **__: calls.append(1) or (0, signal.SIGINT))
    assert run(["quickstart", *tiny]) == 130
    assert len(calls) == 1


def test_ctrl_c_gives_a_half_the_time_that_its_checkpoint_takes(tmp_path):
    """The half is a script that saves for a second. Oracle: it had saved when the quickstart ended."""
    lines = ["trap 'sleep 1; touch saved; exit 130' INT", "touch started", "while :; do sleep 0.1; done"]
    script = write_program(tmp_path / "half", *lines)
    program = (
        f"import sys; sys.executable = {str(script)!r}; from dsfreeze.cli import run; sys.exit(run(['quickstart']))"
    )
    with signals_obeyed():
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )  # fmt: skip
    with nobody_outlives(tmp_path):
        deadline = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(20) == 130
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_leaves_a_checkpoint(tiny, tmp_path, name):
    """In processes of its own, as users start it. INT goes to the whole group, as from a terminal."""
    number = signal.Signals[f"SIG{name}"]
    words = [*tiny, "train.max_steps=100000", "data.eval=null"]
    with signals_obeyed():
        process = subprocess.Popen(
            [sys.executable, "-m", "dsfreeze", "quickstart", *words],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
    with nobody_outlives(tmp_path):
        steps = tmp_path / "runs" / "quickstart" / "steps.jsonl"
        deadline = time.monotonic() + 60
        while not (steps.exists() and steps.read_text().count("\n") > 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        if name == "INT":
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        told = process.communicate(timeout=60)[1]
        left = left_of(tmp_path)
    assert process.returncode == 128 + number, told
    found = find_checkpoint(steps.parent, True)
    assert found.step > 2
    assert found.state()
    assert left == []
