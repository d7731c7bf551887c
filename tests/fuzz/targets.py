"""What reads files that somebody else may have made, each with whole examples of them. A reader may refuse, in our own words, and nothing else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.numpy import save

from dsfreeze.checkpoint import MANIFEST, STATE, TRAINER, WEIGHTS, Base, open_checkpoint, require_same
from dsfreeze.compare.reading import read_grid
from dsfreeze.compare.results import read_results as read_comparison
from dsfreeze.continual.reading import read_course
from dsfreeze.continual.results import read_results as read_sequence
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.planner.study import read_study
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import Record, read_record
from dsfreeze.report.reading import gather
from dsfreeze.strategies.mask_file import read_entries
from dsfreeze.strategies.scores_file import read_scores
from dsfreeze.zero_config import read_ds_config

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"versions": {"torch": "2"}, "python": "3.11", "device": "cpu", "cores": 2, "threads": 2, "world_size": 1}


@dataclass(frozen=True)
class Target:
    """`read` gets a file of that name with the made-up content, in a folder of its own that `prepare` may have filled."""

    file: str
    seeds: tuple[bytes, ...]
    read: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None


def _files(*names: str) -> tuple[bytes, ...]:
    return tuple((ROOT / name).read_bytes() for name in names)


def _json(*values: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(value).encode() for value in values)


def _checkpoint(folder: Path) -> None:
    """What a manifest is about: files that its checksums are of."""
    for name in CHECKPOINT:
        (folder / name).write_bytes(name.encode())


def _resumed(path: Path) -> None:
    require_same(open_checkpoint(path.parent), PLAN, BASE)


def _record(folder: Path) -> None:
    """A run of three steps, finished."""
    recipe = load_recipe(None, ["model=minilm-l6", f"train.output_dir={folder}", "train.max_steps=3"])
    record = Record.create(folder, recipe, PLAN, ENVIRONMENT)
    for step in (1, 2, 3):
        record.step({"step": step, "loss": 1.0 / step, "seconds": 0.1, "tokens": 10})
    record.event("checkpoint", step=3)
    record.summary({"steps": 3, "loss": 0.3, "metrics": {"after": {"accuracy": 0.5}}, "strategy": "bottom"})


PLAN = FreezePlan("bottom", (Phase(0, 2, ("a.weight", "b.bias")), Phase(2, None, ("b.bias",))))
STEPS = "".join(
    json.dumps({"step": n, "loss": 1 / n, "epoch": 0, "seconds": 0.1, "tokens": 9}) + "\n" for n in (1, 2, 3)
).encode()
CELL = {
    "model": "m",
    "task": "t",
    "method": "full",
    "size": None,
    "seed": 1,
    "status": "done",
    "reason": None,
    "score": 70.0,
}
COMPARISON = {
    "format_version": 1,
    "version": "0.1.0",
    "spec": {},
    "data": {},
    "cells": {"m/t/full/size-all/seed-1": CELL},
    "tuning": {},
}
SEQUENCE = {
    "format_version": 1, "version": "0.1.0", "spec": {"bwt": "T"}, "sequence": ["a"], "probes": [], "start": {"scores": {"a": 1.0}, "numbers": {}},
    "runs": {"full/seed-1": {"label": "full", "method": "full", "seed": 1, "draw": None, "alpha": None, "rounds": [{"round": 1, "task": "a", "scores": {"a": 2.0}, "numbers": {}, "update_norm": 1.0, "trainable_share": 1.0, "seconds": 1.0}]}},
    "summary": {},
}  # fmt: skip
BASE = Base("tiny", "abc", "anatomy")
CHECKPOINT = (WEIGHTS, STATE, TRAINER)
MANIFEST_VALUES = {
    "format_version": 2,
    "step": 3,
    "plan": json.loads(PLAN.to_json()),
    "first_plan": PLAN.digest,
    "base": vars(BASE),
    "tensors": {"a.weight": {"shape": [2, 3], "dtype": "torch.float32"}},
    "sha256": {name: hashlib.sha256(name.encode()).hexdigest() for name in CHECKPOINT},
}

SCORES = {"format_version": 1, "score": "change_l2", "scores": {"layers.0": 1.0, "layers.1": 2.0}}

TARGETS: dict[str, Target] = {
    "recipe": Target("recipe.yaml", _files("recipes/rte.yaml", "recipes/lora.yaml", "recipes/dpo.yaml"), lambda path: load_recipe(path)),
    "grid": Target("grid.yaml", _files("recipes/compare_quick.yaml"), lambda path: read_grid(path)),
    "course": Target("tasks.yaml", _files("recipes/continual.yaml"), lambda path: read_course(path, [])),
    "study": Target("study.yaml", _files("benchmarks/scaling.yaml"), lambda path: read_study(path)),
    "plan": Target("plan.json", (PLAN.to_json().encode(),), lambda path: FreezePlan.from_json(path.read_text("utf-8", "replace"))),
    "deepspeed": Target("ds.json", _files("ds_configs/zero2.json", "ds_configs/zero3.json"), lambda path: read_ds_config(path)),
    "steps": Target("steps.jsonl", (STEPS,), lambda path: read_record(path.parent), _record),
    "summary": Target("summary.json", _json({"steps": 3, "loss": 0.3, "metrics": {"after": {}}}), lambda path: gather([path.parent]), _record),
    "environment": Target("environment.json", _json({"format_version": 2, **ENVIRONMENT}), lambda path: gather([path.parent]), _record),
    "manifest": Target(MANIFEST, _json(MANIFEST_VALUES), _resumed, _checkpoint),
    "comparison": Target("results.json", _json(COMPARISON), lambda path: (read_comparison(path), gather([path]))),
    "sequence": Target("results.json", _json(SEQUENCE), lambda path: (read_sequence(path), gather([path]))),
    "scores": Target("scores.json", _json(SCORES), lambda path: read_scores(path)),
    "masks": Target("masks.safetensors", (), read_entries),
}  # fmt: skip


def seeds_of(name: str) -> Iterable[bytes]:
    """Whole files for a target; masks are made here, since they are arrays."""
    if name != "masks":
        return TARGETS[name].seeds
    import numpy

    return (save({"a.weight": numpy.ones((2, 3), dtype=bool), "b.bias": numpy.zeros(4, dtype=bool)}),)
