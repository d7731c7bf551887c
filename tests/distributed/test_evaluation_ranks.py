"""Evaluation on two real ranks. Oracle: the local engine in one process, the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import run_ranks
from tiny_runs import t5_folder, tiny_recipe

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


#: Rows, further `data:` and what the evaluation must hold, by the name of the case; nine rows in batches of two are five batches.
PLAIN = {"text": None, "label": None, "num_labels": None, "max_length": 128}
TASKS = {
    "tokens": (
        [{"tokens": ["ab", "c", "de"][: i % 3 + 1], "tags": ["B-X", "I-X", "O"][: i % 3 + 1]} for i in range(9)],
        PLAIN,
        {"loss", "entity_precision", "entity_recall", "entity_f1", "accuracy"},
    ),
    "seq2seq": (
        [
            {"source": "abc"[i % 3] * (i + 1), "target": ["de fg hi jk", "lm no pq rs", "tu vw xy z"][i % 3]}
            for i in range(9)
        ],
        {**PLAIN, "metrics": ["perplexity", "bleu", "rouge"], "max_new_tokens": 12},
        {"loss", "perplexity", "bleu", "rouge1", "rouge2", "rougeL"},
    ),
    "regression": (
        [{"text": "".join("abcdef"[(i * i + j) % 6] for j in range(i + 1)), "label": i / 7} for i in range(9)],
        {"text": "text", "label": "label", "num_labels": 1, "max_length": 128},
        {"loss", "pearson", "spearman"},
    ),
}


def taught_t5(folder: Path, rows: Path) -> Path:
    """A T5 that has learnt some of the rows: its answers depend on the sources, and share words with the references."""
    from dsfreeze.loop import train

    t5_folder(folder / "t5")
    options = {"max_steps": 100, "output_dir": str(folder / "taught"), "learning_rate": 2e-2}
    data = {**PLAIN, "train": str(rows), "eval": None}
    freeze = {"strategy": "full", "fraction": None}
    train(tiny_recipe(folder, model=str(folder / "t5"), task="seq2seq", data=data, freeze=freeze, train=options))
    return folder / "taught" / "model"


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
@pytest.mark.parametrize("case", TASKS)
def test_other_tasks_are_the_same_on_two_ranks(tmp_path: Path, case: str, zero: str) -> None:
    """To the bit but for the regression, whose head is a matrix of one row: the last bit of its product depends on where
    the weights lie in memory, and DeepSpeed moves them. There 1e-5."""
    rows, data, names = TASKS[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "classification" if case == "regression" else case
    more = {"model": str(taught_t5(tmp_path, path))} if task == "seq2seq" else {}
    train = {"max_steps": 1, "eval_strategy": "end", "per_device_eval_batch_size": 2}
    recipe = tiny_recipe(tmp_path, task=task, data={**data, "train": str(path), "eval": str(path)}, train=train, **more)
    values = recipe.model_dump(mode="json")
    expected = figures(values)
    assert set(expected) == names
    assert task != "seq2seq" or expected["bleu"] > 0
    values["zero"] = zero
    values["train"] |= {"output_dir": str(tmp_path / zero), "per_device_train_batch_size": 2}
    found = run_ranks(figures, values, timeout=120)
    assert found[0] == found[1]
    assert found[0] == (pytest.approx(expected, abs=1e-5) if case == "regression" else expected)
