"""The suite trace on a generated miniature of its folder. Oracles: the protocol's table, written out here, and TRACE's file form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import llama_folder

from dsfreeze.continual.reading import read_course
from dsfreeze.continual.rounds import run_course
from dsfreeze.errors import UserError

#: Task, metric, epochs; methods.md's order.
PROTOCOL = [
    ("C-STANCE", "strict_match", 5), ("FOMC", "strict_match", 3), ("MeetingBank", "rouge_l", 7), ("Py150", "edit_similarity", 5),
    ("ScienceQA", "first_char", 3), ("NumGLUE-cm", "strict_match", 5), ("NumGLUE-ds", "strict_match", 5), ("20Minuten", "sari", 7),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As the archive has it: a folder for each task, lists of prompt and answer."""
    for task, _, _ in PROTOCOL:
        (tmp_path / "TRACE" / task).mkdir(parents=True)
        for file, count in (("train.json", 6), ("eval.json", 2), ("test.json", 2)):
            rows = [{"prompt": f"{task}: what is {n}?", "answer": "ABC"[n % 3]} for n in range(count)]
            (tmp_path / "TRACE" / task / file).write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "trace.yaml").write_text(
        "suite: trace\nfolder: TRACE\nzero: local\ntrain: {bf16: false}\n", encoding="utf-8"
    )
    return tmp_path


def test_the_protocol(folder: Path) -> None:
    course = read_course(folder / "trace.yaml")
    spec = course.spec
    recipes = [course.round_recipe(task, spec.methods[0], seed=1234) for task in spec.sequence]
    found = [
        (task.name, task.metric, recipe.train.num_train_epochs)
        for task, recipe in zip(spec.sequence, recipes, strict=True)
    ]
    assert found == PROTOCOL
    train = recipes[0].train
    assert (train.learning_rate, train.adam_beta1, train.adam_beta2, train.weight_decay, train.max_grad_norm) == (
        1e-5,
        0.9,
        0.95,
        0,
        1,
    )
    assert 8 * train.per_device_train_batch_size * train.gradient_accumulation_steps == 256
    assert (train.lr_scheduler_type, spec.replay.choose, spec.replay.ratio, spec.seeds) == (
        "cosine",
        "sample",
        0.1,
        [1234],
    )
    assert recipes[0].data.train == str(folder / "TRACE/C-STANCE/train.json")
    assert course.measure_recipe(spec.tasks[0]).data.eval == str(folder / "TRACE/C-STANCE/test.json")
    official = read_course(folder / "trace.yaml", ["suite=trace-official"])
    recipe = official.round_recipe(official.spec.tasks[0], official.spec.methods[0])
    assert (recipe.train.lr_scheduler_type, official.spec.replay.choose, recipe.train.learning_rate) == (
        "constant",
        "first",
        1e-5,
    )


def test_a_file_overrides_its_suite(folder: Path) -> None:
    course = read_course(
        folder / "trace.yaml",
        ["tasks.FOMC.train.num_train_epochs=1", "train.learning_rate=1e-4", "methods=[full, replay]"],
    )
    train = course.round_recipe(course.spec.tasks[1], course.spec.methods[0]).train
    assert (train.num_train_epochs, train.learning_rate, train.adam_beta2) == (1, 1e-4, 0.95)
    assert [method.name for method in course.spec.methods] == ["full", "replay"]


def test_what_is_missing_is_named(folder: Path) -> None:
    (folder / "TRACE/Py150/test.json").unlink()
    shutil.rmtree(folder / "TRACE/20Minuten")
    with pytest.raises(
        UserError, match=r"TRACE lacks Py150/test.json, 20Minuten/train.json, 20Minuten/test.json. It must be a folder"
    ):
        read_course(folder / "trace.yaml")
    with pytest.raises(UserError, match=r"suite trace needs `folder:`, TRACE's data .*C-STANCE, FOMC"):
        read_course(folder / "trace.yaml", ["folder=null"])
    with pytest.raises(UserError, match=r"nowhere lacks C-STANCE/train.json"):
        read_course(folder / "trace.yaml", ["folder=nowhere"])


@pytest.mark.slow
def test_it_runs(folder: Path) -> None:
    """Eight rounds of one step: a full matrix, every score from 0 to 100; the tasks' instructions tell them apart."""
    llama_folder(folder / "model", layers=1, hidden=16)
    words = [
        f"model={folder / 'model'}",
        "train.max_steps=1",
        "train.per_device_train_batch_size=2",
        f"output_dir={folder / 'out'}",
    ]
    state: dict[str, Any] = run_course(read_course(folder / "trace.yaml", words), Console(quiet=True))
    rows = [row["scores"] for row in state["runs"]["full/seed-1234"]["rounds"]]
    assert len(rows) == 8
    assert all(list(row) == [task for task, _, _ in PROTOCOL] for row in rows)
    assert all(0 <= score <= 100 for row in rows for score in row.values())
    assert state["summary"]["full"]["bwt"]["mean"] is not None
