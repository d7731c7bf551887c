"""Plain text for a causal language model: documents joined by the end-of-text token, cut into blocks of max_length.

Nothing is dropped: the last block is as long as what is left. A block may hold the end of one document and the start
of the next, which see each other, as in the models' own pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from dsfreeze.data import columns
from dsfreeze.data.examples import Example, Examples, TaskData, TokenCollate, pad_id, tokenised
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data; `data.max_train_examples` counts documents, not blocks."""
    (text,) = _one(columns.find(tables.full, options.text, columns.TEXTS, "data.text"))
    make = partial(_examples, text=text, tokenizer=tokenizer, max_length=options.max_length)
    return TaskData(
        task="causal_lm",
        train=tables.train and make(tables.train),
        eval=tables.eval and make(tables.eval),
        collate=TokenCollate(pad_id(tokenizer)),
        tokenizer=tokenizer,
    )


def _one(text: list[str]) -> list[str]:
    if len(text) != 1:
        raise UserError(f"data.text names {' and '.join(text)}; task causal_lm reads one column.")
    return text


@dataclass(frozen=True)
class Blocks(Sequence[Example]):
    """The stream of tokens (int32 [tokens]) cut at every `length`-th one."""

    stream: np.ndarray
    length: int

    def __len__(self) -> int:
        return -(-len(self.stream) // self.length)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.stream[index * self.length : (index + 1) * self.length].tolist()
        return {"input_ids": ids, "labels": ids}


def _examples(table: Table, *, text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Examples:
    table.require([text], "data.text")
    columns.require_filled(table, [text])
    encode = partial(_encode, text=text, tokenizer=tokenizer)
    rows = tokenised(table.rows, encode)
    if len(rows) == 0:
        raise UserError(f"{table.name}: '{text}' holds no text.")
    stream = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in rows["input_ids"]])
    if len(stream) < 2:
        raise UserError(f"{table.name}: '{text}' holds {len(stream)} tokens in all, and the first predicts nothing.")
    if len(stream) % max_length == 1:
        stream = stream[:-1]  # a block of one token predicts nothing
    blocks = Blocks(stream, max_length)
    num_tokens = np.full(len(blocks), max_length, dtype=np.int64)
    num_tokens[-1] = len(stream) - max_length * (len(blocks) - 1)
    return Examples(blocks, num_tokens - 1, num_tokens)


def _encode(rows: dict[str, list[Any]], *, text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
    texts = [str(value) for value in rows[text] if str(value).strip()]
    encoded = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    return {"input_ids": [ids if ids[-1:] == ends(tokenizer) else ids + ends(tokenizer) for ids in encoded]}


def ends(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What separates documents: the end-of-text token, else the one that starts a text, else nothing."""
    marks: chain[int | None] = chain([tokenizer.eos_token_id], [tokenizer.bos_token_id])
    return [mark for mark in marks if mark is not None][:1]
