"""Small sequences of tasks on a tiny model, as files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tiny_runs import llama_folder

from dsfreeze.recipe_yaml import dump_yaml

#: Labels of the tasks.
LABELS = {"one": ["x", "y"], "two": ["red", "blue"], "three": ["1", "2", "3"]}
TRAIN = {
    "max_steps": 2, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
}  # fmt: skip


def write_lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def rows_of(name: str, role: str, count: int) -> list[dict[str, str]]:
    draw = random.Random(f"{name}/{role}")
    return [{"text": "".join(draw.choices("pqr", k=5)), "label": draw.choice(LABELS[name])} for _ in range(count)]


def task_of(folder: Path, name: str, **more: Any) -> dict[str, Any]:
    """A task of 12 and 4 rows, its prompts beginning with its name."""
    data = {
        role: write_lines(folder / f"{name}_{role}.jsonl", rows_of(name, role, count))
        for role, count in (("train", 12), ("eval", 4))
    }
    return {
        "name": name,
        "data": data,
        "prompt": name + ": {text}",
        "answer": "{label}",
        "metric": "perplexity",
        **more,
    }


def probe_of(folder: Path) -> dict[str, Any]:
    rows = [{"text": "the cat sat on the mat " * (n % 3 + 1)} for n in range(6)]
    return {"name": "cat", "data": {"eval": write_lines(folder / "cat.jsonl", rows), "text": "text"}}


def sequence(folder: Path, *names: str, **changes: Any) -> Path:
    """The file of a sequence; its tasks score 100 / perplexity, which every step changes. `...` takes a key out."""
    model = folder / "model"
    if not model.exists():
        llama_folder(model, layers=2, hidden=16)
    values: dict[str, Any] = {
        "model": str(model), "zero": "local", "data": {"max_length": 64}, "train": TRAIN,
        "tasks": [task_of(folder, name) for name in names or ("one", "two", "three")], "probes": [probe_of(folder)],
        "methods": ["full"], "seeds": [7], "output_dir": str(folder / "out"),
    }  # fmt: skip
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(values.get(key), dict)
        values[key] = {**values[key], **value} if both else value
    path = folder / "tasks.yaml"
    path.write_text(dump_yaml({key: value for key, value in values.items() if value is not ...}), encoding="utf-8")
    return path
