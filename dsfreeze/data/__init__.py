"""Data: from a name in the recipe to examples (`prepare`), and from examples to steps (`Loader`).

Knows the rank and the world size as two integers; never talks to another rank.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from dsfreeze import metrics
from dsfreeze.data import causal_lm, classification, preference, seq2seq, sft, sources, tokens
from dsfreeze.data.examples import Batch, Example, Examples, Prompts, TaskData
from dsfreeze.data.loader import Loader, Step, num_steps_of
from dsfreeze.data.packing import check_packing
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsfreeze.recipe import Recipe

__all__ = [
    "Batch",
    "Example",
    "Examples",
    "Loader",
    "Prompts",
    "Step",
    "TaskData",
    "check_packing",
    "num_steps_of",
    "prepare",
    "sample",
]

TASKS = {
    "classification": classification.prepare,
    "tokens": tokens.prepare,
    "causal_lm": causal_lm.prepare,
    "sft": sft.prepare,
    "seq2seq": seq2seq.prepare,
    "preference": preference.prepare,
}


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """Reads, checks and tokenises the recipe's data; the same on every rank. A `UserError` names the row."""
    options = recipe.data
    train = sources.load(options.train, options.train_split, role="train") if options.train else None
    held_out = sources.load(options.eval, options.eval_split, role="eval") if options.eval else None
    full = train or held_out
    if full is None:
        raise UserError("data.train and data.eval are both empty; name at least one.")
    tables = Tables(
        train=train and sample(train, options.max_train_examples, recipe.train.seed),
        eval=held_out and sample(held_out, options.max_eval_examples, None),
        full=full,
    )
    task_data = TASKS[recipe.task](options, tables, tokenizer)
    return dataclasses.replace(task_data, metrics=metrics.choose(task_data, options.metrics))


def sample(table: Table, size: int | None, seed: int | None) -> Table:
    """`size` rows in their own order: drawn with the seed, or the first ones without."""
    if size is None or size >= len(table.rows):
        return table
    if seed is None:
        return table.take(range(size))
    return table.take(np.sort(np.random.default_rng(seed).permutation(len(table.rows))[:size]))
