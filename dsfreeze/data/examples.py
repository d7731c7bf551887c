"""Tokenised examples, what a task knows about them (`TaskData`), and how they become a batch.

An example is a dict of token lists (`input_ids`, `labels`, ...). Beside the rows, `Examples` keeps two numbers for
each: `num_items`, the terms it adds to the model's own mean loss, and `num_tokens`, its tokens without padding. With
them any rank knows the size of a global batch without seeing the other ranks' share.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dsfreeze.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Example = Mapping[str, Any]
Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[Example]], Batch]

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index, used by every model of transformers


@dataclass(frozen=True)
class Examples:
    """Rows (any sequence of examples) with their `num_items` and `num_tokens`, int64 arrays of the same length."""

    rows: Sequence[Example]
    num_items: np.ndarray
    num_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.rows[int(index)]


@dataclass(frozen=True)
class Prompts:
    """What a metric on generated text needs: prompts as token ids (without the answer) and the reference answers."""

    input_ids: Sequence[Sequence[int]]
    references: Sequence[str]
    encoder: bool
    """True when the prompt goes to an encoder, so that the output does not start with it."""
    sources: Sequence[str] = ()
    """What is asked, as text: of a chat its turns before the answer."""


@dataclass(frozen=True)
class TaskData:
    """Everything the loop and the evaluation know of a task's data."""

    task: str
    train: Examples | None
    eval: Examples | None
    collate: Collate
    tokenizer: PreTrainedTokenizerBase
    labels: tuple[str, ...] | None = None
    """Class names in index order; None for regression and language modelling."""
    num_labels: int | None = None
    """Number of classes; 1 is a regression; None for language modelling."""
    prompts: Prompts | None = None
    """Of the evaluation data, when one of the recipe's metrics generates."""
    metrics: tuple[str, ...] = ()
    """Names under `dsfreeze.metrics.METRICS`: the recipe's or the task's own."""

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Terms in the model's own mean loss of this batch."""
        labels = batch["labels"]
        if self.num_labels == 1:
            return labels.shape[0]
        if self.task in ("causal_lm", "sft"):
            labels = labels[:, 1:]  # position t predicts token t + 1; nothing predicts the first
        return int((labels != IGNORED).sum())


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool = False) -> torch.Tensor:
    """int64 [batch, longest], filled up with `value` on the right (or the left)."""
    longest = max(len(sequence) for sequence in sequences)
    rows = [list(sequence) for sequence in sequences]
    fill = [[value] * (longest - len(row)) for row in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)], dtype=torch.int64)


def pad_inputs(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> Batch:
    """`input_ids` and `attention_mask`, both int64 [batch, longest]."""
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=left)
    return {"input_ids": pad(sequences, pad_id, left=left), "attention_mask": mask}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills short sequences: the tokenizer's, else its end-of-text token.

    A decoder with a classification head finds the last token by `config.pad_token_id`: keep that equal.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "The tokenizer has neither a padding nor an end-of-text token; add `pad_token` to its tokenizer_config.json."
    )


@dataclass(frozen=True)
class TokenCollate:
    """Pads inputs and one label per token (classification of tokens, language modelling) on the right."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = pad_inputs([example["input_ids"] for example in examples], self.pad_id)
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = pad([example["token_type_ids"] for example in examples], 0)
        batch["labels"] = pad([example["labels"] for example in examples], IGNORED)
        return batch


def tokenised(rows: Dataset, encode: Callable[[dict[str, list[Any]]], dict[str, list[Any]]]) -> Dataset:
    """The rows through `encode`, batch by batch; none of the old columns stay.

    Memory-mapped for rows from a file. Never taken from a former run's cache: `datasets` tells functions apart by
    name, and would not see that ours has changed since.
    """
    return rows.map(encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False)


def learnable(rows: Dataset, num_items: np.ndarray, num_tokens: np.ndarray, *, name: str, lack: str) -> Examples:
    """The rows that add a term to the loss: a batch of none has no mean. The others are left out, with a note that says
    what they `lack`; UserError when there is nothing else in the data of that `name`."""
    kept = num_items.nonzero()[0]
    if len(kept) == 0:
        raise UserError(f"{name}: there is nothing to learn from: all {len(rows)} examples are {lack}.")
    if len(kept) < len(rows):
        logger.warning("%s: left out %d of %d examples, %s", name, len(rows) - len(kept), len(rows), lack)
        rows = rows.select(kept)
    return Examples(rows, num_items[kept], num_tokens[kept])


def count(labels: Sequence[int], *, shifted: bool = False) -> int:
    """Items of one example with these token labels; `shifted` when the model predicts the next token."""
    return sum(label != IGNORED for label in (labels[1:] if shifted else labels))


def ints(values: Any) -> np.ndarray:
    """int64 array of a list or column."""
    return np.asarray(list(values), dtype=np.int64)
