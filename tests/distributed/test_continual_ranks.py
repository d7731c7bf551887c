"""A sequence of two tasks on two real ranks. Oracle: the same sequence by the local engine in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from continual_kit import sequence
from forks import run_ranks
from rich.console import Console


def travel(path: str, *words: str) -> dict[str, Any]:
    """The rows and the update norms that a sequence leaves (module level: it is pickled by name for the ranks)."""
    from dsfreeze.continual.reading import read_course
    from dsfreeze.continual.rounds import run_course

    state = run_course(read_course(Path(path), words), Console(quiet=True))
    rows = [row for run in state["runs"].values() for row in run["rounds"]]
    return {"start": state["start"]["scores"], "rows": [[*row["scores"].values(), row["update_norm"]] for row in rows]}


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_two_ranks_leave_the_matrix_of_one(tmp_path: Path, zero: str) -> None:
    """Full tuning and replay, batches of 4 on one rank and of 2 on each of two. fp32 sums in another order: 1e-3 of a score."""
    path = sequence(tmp_path, "one", "two", methods=["full", "replay"], replay={"ratio": 0.5})
    expected = travel(str(path))
    words = (f"zero={zero}", "train.per_device_train_batch_size=2", f"output_dir={tmp_path / zero}")
    found = run_ranks(travel, str(path), *words, timeout=240)
    assert found[0] == found[1]
    assert found[0]["start"] == pytest.approx(expected["start"], rel=1e-6)
    for row, wanted in zip(found[0]["rows"], expected["rows"], strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
    assert travel(str(path), *words) == found[0]  # on one rank again: there is nothing left to do
