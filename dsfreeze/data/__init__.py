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
    "set_aside",
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
    aside = None
    if train is not None and options.held_out is not None:
        train, aside = set_aside(train, options.held_out, options.held_out_seed)
    tables = Tables(
        train=train and sample(train, options.max_train_examples, recipe.train.seed),
        eval=held_out and sample(held_out, options.max_eval_examples, None),
        full=full,
    )
    task_data = TASKS[recipe.task](options, tables, tokenizer)
    task_data = dataclasses.replace(task_data, metrics=metrics.choose(task_data, options.metrics))
    if aside is None:
        return task_data
    alone = Tables(train=None, eval=sample(aside, options.max_eval_examples, None), full=full)
    looked_at = dataclasses.replace(TASKS[recipe.task](options, alone, tokenizer), metrics=task_data.metrics)
    return dataclasses.replace(task_data, held_out=looked_at)


def set_aside(table: Table, amount: float, seed: int) -> tuple[Table, Table]:
    """(the others, `amount` rows drawn with the seed), each in its own order; below 1 the amount is a share. UserError where either
    would be empty."""
    rows = len(table.rows)
    size = round(amount * rows) if amount < 1 else int(amount)
    if not 0 < size < rows:
        raise UserError(
            f"data.held_out: {amount:g} of the {rows} rows of {table.name} sets {size} of them aside; write a share between 0 and 1, or "
            "a number of rows that leaves some to train on."
        )
    order = np.random.default_rng(seed).permutation(rows)
    return table.take(np.sort(order[size:])), table.take(np.sort(order[:size]))


def sample(table: Table, size: int | None, seed: int | None) -> Table:
    """`size` rows in their own order: drawn with the seed, or the first ones without."""
    if size is None or size >= len(table.rows):
        return table
    if seed is None:
        return table.take(range(size))
    return table.take(np.sort(np.random.default_rng(seed).permutation(len(table.rows))[:size]))
