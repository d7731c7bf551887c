"""Evaluation on two real ranks. Oracle: the local engine in one process, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import run_ranks
from tiny_runs import tiny_recipe

from dsfreeze.recipe import Recipe


def figures(values: dict[str, Any]) -> dict[str, float]:
    """The evaluation of an untrained model (module level: it is pickled by name for the ranks)."""
    from dsfreeze.loop import train

    return train(Recipe.model_validate(values))["metrics"]["before"]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_losses_and_generated_answers_are_the_same_on_two_ranks(tmp_path: Path, zero: str) -> None:
    """Seven chats in batches of two: four batches, so that both ranks run a last one, and lengths that differ."""
    path = tmp_path / "chats.jsonl"
    rows = [{"question": "why? " * (i + 1), "answer": "because " * (7 - i)} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "train": str(path), "eval": str(path), "text": None, "label": None, "num_labels": None, "max_length": 128,
        "metrics": ["perplexity", "rouge", "exact_match"], "max_new_tokens": 6,
    }  # fmt: skip
    train = {"max_steps": 1, "eval_strategy": "end", "per_device_eval_batch_size": 2}
    recipe = tiny_recipe(tmp_path, task="sft", data=data, train=train)
    values = recipe.model_dump(mode="json")
    expected = figures(values)
    assert set(expected) == {"loss", "perplexity", "rouge1", "rouge2", "rougeL", "exact_match"}
    values["zero"] = zero
    values["train"] |= {"output_dir": str(tmp_path / zero), "per_device_train_batch_size": 2}
    assert run_ranks(figures, values, timeout=120) == [expected, expected]
