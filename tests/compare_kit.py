"""Small comparisons on a tiny model, as files, and their runs within this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import classification_data, llama_folder

from dsfreeze import cli
from dsfreeze.cli.known import anatomy_of
from dsfreeze.compare import processes
from dsfreeze.compare.pricing import Prices
from dsfreeze.compare.reading import read_grid
from dsfreeze.compare.running import run_grid
from dsfreeze.recipe_yaml import dump_yaml

QUIET = Console(quiet=True)
TRAIN = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
}  # fmt: skip
#: What differs between two runs of the same thing.
TIMES = ("seconds", "peak_bytes")


def grid_file(folder: Path, **changes: Any) -> Path:
    """A comparison of full tuning and the bottom half frozen, two steps each; `...` takes a key out."""
    model = folder / "model"
    if not model.exists():
        llama_folder(model, layers=2, hidden=16)
    values: dict[str, Any] = {
        "models": [{"name": "tiny", "model": str(model)}],
        "tasks": [{"name": "letters", "data": classification_data(folder / "data"), "metric": "accuracy"}],
        "methods": ["full", "bottom50"], "seeds": [7], "zero": "local", "train": TRAIN, "output_dir": str(folder / "out"),
    }  # fmt: skip
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    path = folder / "grid.yaml"
    path.write_text(dump_yaml({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")
    return path


def compare(path: Path, *words: str) -> dict[str, Any]:
    return run_grid(read_grid(path, words), anatomy_of, QUIET)


def without_times(state: dict[str, Any]) -> dict[str, Any]:
    """What is the same when the same is run again: nothing of how long it took, and of what the process held."""
    cells = {key: {k: v for k, v in cell.items() if k not in TIMES} for key, cell in state["cells"].items()}
    return json.loads(json.dumps({**state, "cells": cells}))


def priced_at_once(monkeypatch: pytest.MonkeyPatch, size: int = 2**20) -> None:
    """Take every run to need as much: to read what a model's passes store takes seconds."""
    monkeypatch.setattr(Prices, "peak", lambda self, recipe: size)


@dataclass
class Ended:
    """A process that has ended."""

    code: int

    def poll(self) -> int:
        return self.code

    def terminate(self) -> None:
        pass

    wait = poll


def run_here(
    monkeypatch: pytest.MonkeyPatch, crash: Callable[[Sequence[str]], int] = lambda words: 0
) -> list[list[str]]:
    """Let comparisons run their work in this process, and return the words of each, as they come. `crash`: the exit code of words that
    do not run at all."""
    seen: list[list[str]] = []

    def launch(command: Sequence[str], log: Any, lock: Any, environment: Any) -> Ended:
        words = list(command[3:])
        seen.append(words)
        if code := crash(words):
            return Ended(code)
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            return Ended(cli.run(words))

    launched_by(monkeypatch, launch)
    return seen


def launched_by(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., Any]) -> None:
    """Start runs that way, with GPUs and without."""
    monkeypatch.setattr(processes, "launch", launch)
    monkeypatch.setattr(processes.ForkServer, "launch", staticmethod(launch))
