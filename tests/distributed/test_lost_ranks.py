"""A rank that hangs, and one that dies, under gloo. Oracles: which rank it was, its process, and the step that it never ended."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from forks import outcomes_of
from test_train import train, values
from tiny_runs import tiny_recipe

pytestmark = pytest.mark.slow
STEP = 3


def at_step(what: Any) -> None:
    """Let rank 1 do `what` in the passes of step 3."""
    from dsfreeze.engine.zero import ZeroEngine

    if os.environ["RANK"] != "1":
        return
    passes, seen = ZeroEngine.forward_backward, []

    def patched(engine: Any, *args: Any) -> float:
        seen.append(1)
        if len(seen) == STEP:
            what()
        return passes(engine, *args)

    ZeroEngine.forward_backward = patched


def hang(raw: dict) -> Any:
    at_step(lambda: time.sleep(20))
    return train(raw)


def die(raw: dict) -> Any:
    at_step(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return train(raw)


def raw_of(folder: Path, stage: str) -> dict:
    raw = values(tiny_recipe(folder), stage, folder / "run", ranks=2)
    raw["train"]["ddp_timeout"] = 4
    return raw


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_rank_that_hangs_is_named(tmp_path: Path, stage: str) -> None:
    first, second = outcomes_of(hang, raw_of(tmp_path, stage), timeout=90)
    assert (first.kind, first.error) == ("error", "UserError"), first.text
    assert second.kind == "error", "when it wakes up nobody is there"
    assert re.search(rf"rank 1 \(process \d+ on .*\) does not answer; it is at step {STEP}, and its stack", first.text)
    assert f"This is rank 0, at step {STEP}" in first.text
    assert "resume_from_checkpoint" in first.text


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_a_rank_that_dies_is_named(tmp_path: Path, stage: str) -> None:
    first, second = outcomes_of(die, raw_of(tmp_path, stage), timeout=90)
    assert (first.kind, first.error, second.kind) == ("error", "UserError", "died"), first.text
    assert re.search(rf"rank 1 \(process \d+ on .*\) has ended; it was at step {STEP}", first.text)
