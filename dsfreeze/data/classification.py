"""Classification of one text or of a pair, and regression when there is one label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsfreeze.data import columns
from dsfreeze.data.examples import Batch, Example, Examples, TaskData, ints, pad, pad_id, pad_inputs, tokenised
from dsfreeze.data.labels import index_of, label_names
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Collate:
    """Pads inputs on the right; `labels` are int64 [batch], or fp32 [batch] for a regression."""

    pad_id: int
    regression: bool

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = pad_inputs([example["input_ids"] for example in examples], self.pad_id)
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = pad([example["token_type_ids"] for example in examples], 0)
        dtype = torch.float32 if self.regression else torch.int64
        batch["labels"] = torch.tensor([example["labels"] for example in examples], dtype=dtype)
        return batch


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data; classes are those of the training data."""
    text = columns.find(tables.full, options.text, columns.PAIRS + columns.TEXTS, "data.text")
    (label,) = columns.find(tables.full, [options.label] if options.label else None, columns.LABELS, "data.label")
    regression = options.num_labels == 1
    if regression and options.labels:
        raise UserError("data.labels and data.num_labels: 1 (a regression) exclude each other; keep one.")
    names = None if regression else label_names(tables.full.rows[label][:], tables.full, label, options)
    make = partial(_examples, text=text, label=label, names=names, tokenizer=tokenizer, options=options)
    return TaskData(
        task="classification",
        train=tables.train and make(tables.train),
        eval=tables.eval and make(tables.eval),
        collate=Collate(pad_id(tokenizer), regression),
        tokenizer=tokenizer,
        labels=names,
        num_labels=1 if names is None else len(names),
    )


def _examples(
    table: Table,
    *,
    text: Sequence[str],
    label: str,
    names: tuple[str, ...] | None,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
) -> Examples:
    table.require(text, "data.text")
    table.require([label], "data.label")
    columns.require_filled(table, text)
    values = table.rows[label][:]
    if names is None:
        labels: list[Any] = [_number(value, table.where(i), label) for i, value in enumerate(values)]
    else:
        labels = [index_of(value, names, table.where(i), label) for i, value in enumerate(values)]
    encode = partial(_encode, text=tuple(text), tokenizer=tokenizer, max_length=options.max_length)
    rows = tokenised(table.rows, encode)
    num_tokens = ints(len(ids) for ids in rows["input_ids"])
    return Examples(rows.add_column("labels", labels), np.ones(len(labels), dtype=np.int64), num_tokens)


def _number(value: Any, where: str, column: str) -> float:
    if isinstance(value, (int, float)) and math.isfinite(value):
        return float(value)
    raise UserError(f"{where}: '{column}' is {value!r}, which is no number; data.num_labels: 1 asks for a regression.")


def _encode(
    rows: dict[str, list[Any]], *, text: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    parts = [[str(value) for value in rows[column]] for column in text]
    if len(parts) == 2 and not separates_pairs(tokenizer):
        parts = [[f"{first}\n{second}" for first, second in zip(*parts, strict=True)]]
    encoded = tokenizer(*parts, truncation=True, max_length=max_length)
    return {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a separator between two texts; most decoders' do not (a new line then does)."""
    marks = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
    return any(token in marks for token in tokenizer("a", "b")["input_ids"][1:-1])
