"""Training with a prefix cache. Oracle: the same run without one; to the last bit in fp32 where shapes are the same, within 1e-6 under padding."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny_runs import llama_folder, tiny_recipe

from dsfreeze.errors import UserError
from dsfreeze.job import prepare_job
from dsfreeze.loop import train
from dsfreeze.record import read_record

EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-3}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))


def losses(folder):
    return [line["loss"] for line in read_record(folder).steps]


def run(folder, tier="memory", **changes):
    """(losses, summary) of a tiny run with that prefix_cache."""
    changes["freeze"] = {"prefix_cache": tier, **changes.get("freeze", {})}
    changes["train"] = {**EPOCHS, "output_dir": str(folder / tier), **changes.get("train", {})}
    shutil.rmtree(changes["train"]["output_dir"], ignore_errors=True)
    summary = train(tiny_recipe(folder, **changes))
    return losses(changes["train"]["output_dir"]), summary


def texts(folder, name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return str(path)


def words(count, length, seed):
    draw = np.random.default_rng(seed)
    return ["".join(draw.choice(list("abcdefgh "), length)) for _ in range(count)]


def rows_of(task, count, seed):
    if task == "classification":
        return [{"text": text, "label": i % 3} for i, text in enumerate(words(count, 12, seed))]
    if task == "tokens":
        draw = np.random.default_rng(seed)
        return [{"text": list(text), "label": draw.integers(0, 3, 8).tolist()} for text in words(count, 8, seed)]
    if task == "causal_lm":
        return [{"text": "".join(words(1, 16 * count - 1, seed))}]
    return [{"prompt": text, "completion": text[::-1]} for text in words(count, 12, seed)]


def fixed(folder, task):
    """Data of a task whose batches all have one shape."""
    labelled = task in ("classification", "tokens")
    return {
        "train": texts(folder, "fixed", rows_of(task, 24, 0)), "eval": texts(folder, "held-out", rows_of(task, 8, 1)),
        "text": None if task == "sft" else "text", "label": "label" if labelled else None,
        "num_labels": 3 if task == "classification" else None, "labels": ["x", "y", "z"] if task == "tokens" else None,
        "max_length": 16 if task == "causal_lm" else 64,
    }  # fmt: skip


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("task", ["classification", "tokens", "causal_lm", "sft"])
def test_nothing_changes_to_the_last_bit_with_fixed_shapes(tmp_path, task, tier):
    """Losses of every step, and every figure of the evaluations, which read the cache too."""
    data = fixed(tmp_path, task)
    options = {"task": task, "data": data, "train": {"eval_strategy": "epoch"}}
    (wanted, plain), (found, cached) = run(tmp_path, "off", **options), run(tmp_path, tier, **options)
    assert found == wanted
    assert cached["metrics"] == plain["metrics"]
    told = cached["prefix_cache"]
    assert (told["tier"], told["cut"], plain["prefix_cache"]) == (tier, 2, None)
    assert told["hits"] == told["examples"] * 2 // 3, "all epochs but the first"
    assert told["evaluation_hits"] == told["evaluation_examples"] * 3 // 4, "all evaluations but the first"


@pytest.mark.parametrize(
    ("freeze", "options"),
    [
        ({}, {}),
        ({"strategy": "lora", "fraction": 0.5, "adapter": {"r": 2}}, {}),
        ({"adapter": {"kind": "dora", "r": 2, "dropout": 0.1}}, {}),
        ({"strategy": "head"}, {}),
        ({"strategy": "norms", "fraction": 0.5}, {}),
        ({}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        ({}, {"gradient_checkpointing": True}),
    ],
    ids=["bottom", "lora", "dora", "head", "norms", "accumulation", "checkpointing"],
)
def test_nothing_changes_beyond_rounding_under_padding(tmp_path, freeze, options):
    """Examples meet in other batches in each epoch, so that the same products have other shapes."""
    changes = {"freeze": freeze, "train": options}
    (wanted, plain), (found, cached) = run(tmp_path, "off", **changes), run(tmp_path, "memory", **changes)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert cached["prefix_cache"]["hits"] == 90
    assert cached["trainable"] == plain["trainable"]
