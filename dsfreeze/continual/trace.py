"""TRACE (arXiv 2310.06762; BeyonderXX/TRACE at 462e39f): eight tasks in order, as a sequence to lay a file over. No torch.

`trace` is the protocol with our trainer: a cosine schedule (as the scripts ask for), a seeded sample of a tenth of each earlier task
for replay. `trace-official` follows what the official code does instead, where that can be had here: the schedule is constant
(its cosine is parsed and never used), and replay takes the first rows. What it does and we do not: Adam's moments carried from task to
task; the same order in every epoch; replay as an extra epoch after each task, with all of Lima, drawn whole by every rank; sampled
answers (temperature 0.1; ours are greedy); prompts without a chat template, cut from the left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.recipe_reader import locate


@dataclass(frozen=True)
class TraceTask:
    """A task's folder, its metric here, and its epochs in the official scripts."""

    folder: str
    metric: str
    epochs: int


TASKS = (
    TraceTask("C-STANCE", "strict_match", 5), TraceTask("FOMC", "strict_match", 3), TraceTask("MeetingBank", "rouge_l", 7),
    TraceTask("Py150", "edit_similarity", 5), TraceTask("ScienceQA", "first_char", 3), TraceTask("NumGLUE-cm", "strict_match", 5),
    TraceTask("NumGLUE-ds", "strict_match", 5), TraceTask("20Minuten", "sari", 7),
)  # fmt: skip
FILES = {"train": "train.json", "eval": "test.json"}

#: What the suite says where a file says nothing. With eight ranks a step has 8 x 8 x 4 = 256 examples, as in the scripts.
SETTINGS: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-chat-hf",
    "zero": "zero2",
    "data": {"max_length": 1536},
    "train": {
        "learning_rate": 1e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "bf16": True,
        "gradient_checkpointing": True, "weight_decay": 0.0, "warmup_steps": 0, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "max_grad_norm": 1.0, "lr_scheduler_type": "cosine", "save_strategy": "epoch", "save_total_limit": 1,
    },
    "methods": ["full"],
    "seeds": [1234],
    "replay": {"ratio": 0.1, "choose": "sample"},
    "long_answers": "cut",
    "output_dir": "runs/trace",
}  # fmt: skip
OFFICIAL: dict[str, Any] = {"train": {"lr_scheduler_type": "constant"}, "replay": {"ratio": 0.1, "choose": "first"}}


def suite_values(values: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """A file's values over its suite's; UserError that lists what is missing in its folder.

    A name that is no suite's is left for the sections to blame.
    """
    if values["suite"] not in ("trace", "trace-official"):
        return dict(values)
    layers = [SETTINGS, OFFICIAL if values["suite"] == "trace-official" else {}, values]
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
            merged[key] = {**merged[key], **value} if both else value
    return {**merged, "tasks": values.get("tasks") or _tasks(values, beside)}


def _tasks(values: Mapping[str, Any], beside: Path) -> list[dict[str, Any]]:
    root = _folder(values, beside)
    return [
        {
            "name": task.folder, "metric": task.metric, "train": {"num_train_epochs": task.epochs},
            "data": {role: str(root / task.folder / file) for role, file in FILES.items()},
            "prompt": "{prompt}", "answer": "{answer}",
        }
        for task in TASKS
    ]  # fmt: skip


def _folder(values: Mapping[str, Any], beside: Path) -> Path:
    form = f"a folder with {', '.join(task.folder for task in TASKS)}, each with {' and '.join(FILES.values())}"
    if not values.get("folder"):
        raise UserError(f"suite {values['suite']} needs `folder:`, TRACE's data (its _5000 variants): {form}.")
    root = Path(locate(str(values["folder"]), beside))
    missing = [f"{t.folder}/{file}" for t in TASKS for file in FILES.values() if not (root / t.folder / file).is_file()]
    if missing:
        raise UserError(f"suite {values['suite']}: {root} lacks {', '.join(missing)}. It must be {form}.")
    return root
