"""A device that is full. Oracles: the estimate's own peaks, asked for apart; torch's words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console
from tiny_runs import tiny_recipe

from dsfreeze import out_of_memory
from dsfreeze.engine.local import LocalEngine
from dsfreeze.errors import UserError
from dsfreeze.loop import train
from dsfreeze.tables import gib

QUIET = Console(quiet=True)
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]  # fmt: skip


def full_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    passes, seen = LocalEngine.forward_backward, []

    def patched(*args: Any) -> float:
        seen.append(1)
        if len(seen) == call:
            raise error
        return passes(*args)

    monkeypatch.setattr(LocalEngine, "forward_backward", patched)


@pytest.mark.parametrize("error", ERRORS, ids=["device", "host", "python"])
def test_where_it_was_and_what_would_take_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    full_at(monkeypatch, 3, error)
    with pytest.raises(UserError) as told:
        train(tiny_recipe(tmp_path, train={"per_device_train_batch_size": 8}), QUIET)
    first, took, *ways, last = str(told.value).splitlines()
    assert first.startswith(f"Out of memory in step 3: {str(error)[:30]}")
    assert took.endswith(f"this one has {gib(psutil.virtual_memory().total)}")
    assert re.search(r"the run takes [\d.]+ [KM]iB on each device", took)
    named = [way.strip().partition(":")[0] for way in ways]
    assert set(named) >= {
        "with train.per_device_train_batch_size=4 train.gradient_accumulation_steps=2",
        "with freeze.fraction=0.75",
    }
    assert last.strip().startswith("More ways, and what fits a limit: dsfreeze plan")


def test_a_model_that_cannot_be_priced_is_told_without_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_figures(*_: Any) -> Any:
        raise ValueError("of no known kind")

    monkeypatch.setattr(out_of_memory, "stored_of", no_figures)
    full_at(monkeypatch, 1, ERRORS[0])
    with pytest.raises(UserError) as told:
        train(tiny_recipe(tmp_path), QUIET)
    assert str(told.value) == f"Out of memory in step 1: {ERRORS[0]}"


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_at(monkeypatch, 1, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(tiny_recipe(tmp_path), QUIET)
