"""Retention methods on two ranks, at the stages that shard differently. Oracle: the local engine in one process with the same global
batch, itself held against hand-written loops in test_retain.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from forks import outcomes_of, run_ranks
from retain_kit import exported, task_recipe
from safetensors.torch import load_file

from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record

LORA = {"freeze": {"strategy": "lora", "fraction": 0.0, "adapter": {"kind": "lora", "r": 3, "categories": ["q", "v"]}}}
#: (retain, changes, stages); of der's one kept example a draw, rank 1 gets none
CASES = {
    "ewc": ({"method": "ewc", "weight": 0.5, "fisher_examples": 5}, {}, ["zero2", "zero3"]),
    "ewc_bf16": ({"method": "ewc", "weight": 0.5, "fisher_examples": 5}, {"train": {"bf16": True}}, ["zero3"]),
    "gem": ({"method": "gem", "memory_examples": 6, "memory_batch_size": 3}, {}, ["zero2"]),
    "der": ({"method": "der", "memory_examples": 6, "memory_batch_size": 1, "top_k": 5}, {}, ["zero0"]),
    "o_lora": ({"method": "o_lora", "weight": 0.05, "l2": 0.1}, LORA, ["zero3"]),
    "osf": ({"method": "osf"}, {}, ["zero3"]),
    "packnet": ({"method": "packnet"}, {}, ["zero3"]),
}


def recipes(folder: Path, method: str, zero: str, ranks: int) -> list[dict]:
    retain, changes, _ = CASES[method]
    train = {"per_device_train_batch_size": 4 // ranks, "max_grad_norm": 0.5, **changes.get("train", {})}
    tasks = (1,) if method == "packnet" else (1, 2)
    return [
        task_recipe(folder, n, retain, **{**changes, "zero": zero, "train": train}).model_dump(mode="json")
        for n in tasks
    ]


def train_all(runs: list[dict]) -> None:
    from dsfreeze.engine.process import process_group
    from dsfreeze.loop import train

    with process_group(Recipe.model_validate(runs[0])):
        for raw in runs:
            train(Recipe.model_validate(raw))


def left_by(folder: Path) -> dict:
    """Everything that a sequence left: weights, penalties, memories."""
    found = {}
    for run in sorted(folder.glob("run*")):
        found |= {f"{run.name}/{name}": value for name, value in exported(run).items()}
        found[f"{run.name}/penalty"] = torch.tensor([line["penalty"] for line in read_record(run).steps])
    for memory in sorted(folder.glob("memory*")):
        assert json.loads((memory / "manifest.json").read_text())["num_tasks"] == int(memory.name[-1])
        found |= {f"{memory.name}/{name}": value for name, value in load_file(memory / "memory.safetensors").items()}
        found[f"{memory.name}/examples"] = (memory / "examples.jsonl").read_text()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods", [("ewc", "ewc_bf16", "o_lora"), ("gem", "der", "osf", "packnet")], ids=["penalties", "gradients"]
)
def test_every_method_is_the_same_on_two_ranks(tmp_path, methods):
    """One fork for several. Penalties, projections, kept logits, the Fisher information and owners, at both tasks."""
    folders = {(method, zero): tmp_path / f"{method}-{zero}" for method in methods for zero in CASES[method][2]}
    runs = [raw for (method, zero), folder in folders.items() for raw in recipes(folder, method, zero, 2)]
    run_ranks(train_all, runs, timeout=240)
    for method in methods:
        # in bf16 gradients and squares are added up in 8 bits
        close = {"atol": 2e-2, "rtol": 0.1} if method.endswith("bf16") else {"atol": 5e-5, "rtol": 2e-4}
        train_all(recipes(tmp_path / method, method, "local", 1))
        wanted = left_by(tmp_path / method)
        for zero in CASES[method][2]:
            found = left_by(folders[method, zero])
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                where = f"{method} {zero} {name}"
                if isinstance(value, str):
                    assert found[name] == value, where
                else:
                    torch.testing.assert_close(found[name], value, **close, msg=lambda m, w=where: f"{w}: {m}")


def open_apart(raws: list[dict]) -> None:
    from dsfreeze.engine.process import process_group
    from dsfreeze.job import prepare_job
    from dsfreeze.objectives.retain import terms_of

    with process_group(Recipe.model_validate(raws[0])) as ranks:
        terms_of(prepare_job(Recipe.model_validate(raws[ranks.rank])))


def test_ranks_that_see_different_memories_stop(tmp_path):
    """Oracle: an error on every rank. They share no disk: one rank's folder holds another run's memory, or nothing."""
    raws = []
    for name in ("a", "b"):
        retain = {"method": "l2_sp", "start": "sequence"} if name == "a" else {"method": "l2_sp"}
        first = task_recipe(tmp_path / name, 1, retain)
        train_all([first.model_dump(mode="json")])
        raws.append(task_recipe(tmp_path / name, 2, retain, zero="zero0").model_dump(mode="json"))
    for outcome in outcomes_of(open_apart, raws, timeout=60):
        assert (outcome.kind, outcome.error) == ("error", "UserError")
        assert "disagree about retain.memory" in outcome.text
    (tmp_path / "b" / "memory1" / "manifest.json").unlink()
    for outcome in outcomes_of(open_apart, raws, timeout=60):
        assert (outcome.kind, outcome.error) == ("error", "UserError")
        assert "it has no manifest.json" in outcome.text
