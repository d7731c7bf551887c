"""Checkpoints written beside the training. Oracles: what the record says while a write is held up; a run whose writes are not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny_runs import tiny_recipe

from dsfreeze import checkpoint
from dsfreeze.background import Background
from dsfreeze.checkpoint import open_checkpoint
from dsfreeze.errors import UserError
from dsfreeze.journal import Journal
from dsfreeze.loop import train

QUIET = Console(quiet=True)


def recipe(folder: Path, **options: Any) -> Any:
    return tiny_recipe(
        folder, train={"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "export": False, **options}
    )


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write ends when the fourth step has been told; what it holds is of the second, to the bit."""
    train(recipe(tmp_path / "plain", output_dir=str(tmp_path / "plain-run")), QUIET)
    fourth, told = threading.Event(), Journal.step
    save, order = checkpoint.save, []

    def step(self: Journal, line: Any, *, track: bool) -> None:
        told(self, line, track=track)
        order.append(f"step {line['step']}")
        if line["step"] == 4:
            fourth.set()

    def slow(folder: Path, number: int, *rest: Any, **options: Any) -> Path:
        assert fourth.wait(60), "the training waits for the checkpoint"
        written = save(folder, number, *rest, **options)
        order.append(f"checkpoint {number}")
        return written

    monkeypatch.setattr(Journal, "step", step)
    monkeypatch.setattr(checkpoint, "save", slow)
    asked = recipe(tmp_path / "plain", output_dir=str(tmp_path / "run"))
    train(asked, QUIET)
    assert order.index("step 4") < order.index("checkpoint 2") < order.index("checkpoint 4") < len(order)
    for number in (2, 4, 6):
        found, plain = (open_checkpoint(tmp_path / name / f"checkpoint-{number}") for name in ("run", "plain-run"))
        assert found.trainer_state["loader"] == plain.trainer_state["loader"]
        mine, theirs = found.state(), plain.state()
        assert all(torch.equal(mine[name][kind], value) for name in theirs for kind, value in theirs[name].items())


def test_a_failed_write_ends_the_run_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = threading.Event()

    def full(*_: Any, **__: Any) -> None:
        failed.set()
        raise UserError("Could not write: No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    steps, told = [], Journal.step

    def step(self: Journal, line: Any, *, track: bool) -> None:
        steps.append(line["step"])
        assert line["step"] < 3 or failed.wait(60)
        told(self, line, track=track)

    monkeypatch.setattr(Journal, "step", step)
    with pytest.raises(UserError, match="No space left"):
        train(recipe(tmp_path), QUIET)
    assert steps in ([1, 2], [1, 2, 3])


def test_one_thing_at_a_time_and_a_failure_once() -> None:
    background, gate, done = Background("work"), threading.Event(), []
    background.start(lambda: gate.wait(60) and done.append(1))
    threading.Timer(0.05, gate.set).start()
    background.start(lambda: done.append(2))
    background.wait()
    assert done == [1, 2]

    def fail() -> None:
        raise OSError("gone")

    background.start(fail)
    background.close()
    assert background.failed
    with pytest.raises(OSError, match="gone"):
        background.wait()
    background.wait()
    assert not background.failed
