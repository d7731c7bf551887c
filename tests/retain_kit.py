"""Sequences of two tiny tasks for the retention methods, and the hand-written training that they are held against."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_runs import llama_folder

from dsfreeze.data import Loader
from dsfreeze.job import Job, prepare_job
from dsfreeze.recipe import Recipe
from dsfreeze.schedule import learning_rate_schedule

STEPS = 4
#: (module, trained parameters, step) -> a term of the step's loss
Extra = Callable[[torch.nn.Module, dict[str, torch.nn.Parameter], int], Any]


def text_data(folder: Path, letters: str) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(letters)
    lines = [json.dumps({"text": "".join(draw.choices(letters, k=draw.randint(5, 12)))}) for _ in range(24)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"train": str(folder / "train.jsonl"), "eval": None, "text": "text", "max_length": 16}


def task_recipe(folder: Path, number: int, retain: dict[str, Any], **changes: Any) -> Recipe:
    """Task `number` (1 or 2) of a sequence in `folder`: the second starts from the first's model and memory."""
    base = folder / "base"
    if not base.exists():
        llama_folder(base, layers=2, hidden=16)
    there = folder / "run1"
    handed = {"remember": str(folder / f"memory{number}")} | (
        {"memory": str(folder / "memory1")} if number == 2 else {}
    )
    values: dict[str, Any] = {
        "model": str(base if number == 1 else there / "model"), "task": "causal_lm", "zero": "local",
        "data": text_data(folder / f"data{number}", "abcd" if number == 1 else "wxyz"),
        "freeze": {"strategy": "bottom", "fraction": 0.5},
        "retain": {**handed, **retain},
        "train": {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "adam_epsilon": 1e-3,
                  "output_dir": str(folder / f"run{number}"), "save_strategy": "no", "eval_strategy": "no"},
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return Recipe.model_validate(values)


def plain_run(recipe: Recipe, extra: Extra | None = None, adjust: Callable | None = None) -> tuple[Job, list[float]]:
    """The oracle: AdamW over a loop written out, in which `extra` is a term of the loss and `adjust(trained, step)` may change
    gradients. The job holds the trained module; with it the penalties."""
    job = prepare_job(recipe.model_copy(update={"retain": type(recipe.retain)()}))
    o = recipe.train
    loader = Loader(
        job.data.train, job.data.collate, job.data.num_items, per_device_batch_size=o.per_device_train_batch_size,
        gradient_accumulation_steps=o.gradient_accumulation_steps, seed=o.seed,
    )  # fmt: skip
    names = set(job.plan.phases[0].trainable)
    trained = {n: p for n, p in job.module.named_parameters() if n in names}
    for name, parameter in job.module.named_parameters():
        parameter.requires_grad_(name in names)
    job.module.eval()  # there is no dropout
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, eps=o.adam_epsilon, weight_decay=0.0)
    rate, penalties = learning_rate_schedule(o, STEPS), []
    for number, step in zip(range(STEPS), loader, strict=False):
        optimizer.param_groups[0]["lr"] = rate(number)
        loss = sum(job.module(**batch).loss * items / step.global_items for batch, items in step.micro_batches)
        more = extra(job.module, trained, number) if extra else torch.zeros(())
        (loss + more).backward()
        if adjust:
            adjust(job, trained, number)
        torch.nn.utils.clip_grad_norm_(trained.values(), o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        penalties.append(more.item())
    return job, penalties


def exported(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def require_close(folder: Path, job: Job, atol: float = 2e-6) -> None:
    """The exported weights are the hand-written training's."""
    found, wanted = exported(folder), dict(job.module.named_parameters())
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name].detach(), atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
