"""Tokenised examples, what a task knows about them (`TaskData`), and how they become a batch.

An example is a dict of token lists (`input_ids`, `labels`, ...). Beside the rows, `Examples` keeps two numbers for
each: `num_items`, the terms it adds to the model's own mean loss, and `num_tokens`, its tokens without padding. With
them any rank knows the size of a global batch without seeing the other ranks' share.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

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

    def __getitem__(self, index: int | np.integer) -> Example:
        return self.rows[int(index)]

    def take(self, kept: np.ndarray) -> Examples:
        """These examples alone; their rows must be able to `select`."""
        return Examples(self.rows.select(kept), self.num_items[kept], self.num_tokens[kept])  # type: ignore[attr-defined]

    @property
    def sequences(self) -> Examples:
        """Every sequence as an example of its own; a pair has two."""
        return self.rows.sequences if isinstance(self.rows, Pairs) else self

    def sequences_of(self, chosen: Iterable[int]) -> list[int]:
        """The sequences that these examples have in a batch, in its order, by their numbers in `sequences`."""
        size = 2 if isinstance(self.rows, Pairs) else 1
        return [size * int(index) + number for index in chosen for number in range(size)]


class Pairs(Sequence[Example]):
    """Examples of two sequences: the chosen and the rejected answer to one prompt, each with the prompt.

    `sequences` holds both in turn. `reference`, float32 [pairs, 2], is what the model before the first step gives their answers
    (log-probabilities, in nats); an example has it once it is known.
    """

    def __init__(self, sequences: Examples) -> None:
        assert len(sequences) % 2 == 0, "they come in pairs"
        self.sequences = sequences
        self.reference: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sequences) // 2

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pair = {"chosen": self.sequences[2 * index], "rejected": self.sequences[2 * index + 1]}
        return pair if self.reference is None else {**pair, "reference": self.reference[index]}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the tokens of all pairs, in order, and of which are the answers'."""
        digest = hashlib.sha256()
        for example in self.sequences.rows:
            for name in ("input_ids", "labels"):
                digest.update(np.asarray([len(example[name]), *example[name]], dtype=np.int64).tobytes())
        return digest.hexdigest()

    def select(self, kept: np.ndarray) -> Pairs:
        """These pairs alone."""
        both = np.stack([2 * kept, 2 * kept + 1], axis=1).flatten()
        return Pairs(self.sequences.take(both))


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
    held_out: TaskData | None = None
    """What is set aside of the training data, as the `eval` of this; None where nothing is."""

    def num_items(self, batch: Mapping[str, torch.Tensor]) -> int:
        """Terms in the model's own mean loss of this batch."""
        labels = batch["labels"]
        if self.num_labels == 1:
            return labels.shape[0]
        if self.task == "preference":
            return labels.shape[0] // 2
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
    # in memory nothing is kept under the fingerprint, and to make one `datasets` would pickle the tokenizer
    fingerprint = None if rows.cache_files else uuid4().hex
    return rows.map(
        encode, batched=True, remove_columns=rows.column_names, load_from_cache_file=False, new_fingerprint=fingerprint
    )


def learnable(
    rows: Dataset | Pairs, num_items: np.ndarray, num_tokens: np.ndarray, *, name: str, lack: str
) -> Examples:
    """The rows that add a term to the loss: a batch of none has no mean. The others are left out, with a note that says
    what they `lack`; UserError when there is nothing else in the data of that `name`."""
    examples, kept = Examples(rows, num_items, num_tokens), num_items.nonzero()[0]
    if len(kept) == 0:
        raise UserError(f"{name}: there is nothing to learn from: all {len(rows)} examples are {lack}.")
    if len(kept) == len(rows):
        return examples
    logger.warning("%s: left out %d of %d examples, %s", name, len(rows) - len(kept), len(rows), lack)
    return examples.take(kept)


def count(labels: Sequence[int], *, shifted: bool = False) -> int:
    """Items of one example with these token labels; `shifted` when the model predicts the next token."""
    return sum(label != IGNORED for label in (labels[1:] if shifted else labels))


def ints(values: Any) -> np.ndarray:
    """int64 array of a list or column."""
    return np.asarray(list(values), dtype=np.int64)
