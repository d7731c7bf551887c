"""Preferences: pairs of answers to a prompt, of which one was chosen, rendered by the tokenizer's chat template.

An example is a pair, and a batch of n has 2n sequences, chosen and rejected in turn. Labels are on the answers alone, each
with the mark that ends it. A sequence longer than data.max_length loses its end, and so the answer's: both prompts stay
whole and alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from dsfreeze.data import pairs
from dsfreeze.data.examples import (
    Batch,
    Example,
    Examples,
    Pairs,
    TaskData,
    TokenCollate,
    count,
    ints,
    learnable,
    pad_id,
)
from dsfreeze.data.rendering import Rendered, encode, render_answer, require_template
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairCollate:
    """Pads the sequences of pairs, chosen and rejected in turn, on the right. `reference`, float32 [pairs, 2], is in the batch
    once it is known. Sequences by themselves (a prefix cache's) go to `plain`."""

    plain: TokenCollate

    def __call__(self, examples: Sequence[Example]) -> Batch:
        if "chosen" not in examples[0]:
            return self.plain(examples)
        batch = self.plain([example[answer] for example in examples for answer in pairs.ANSWERS])
        if "reference" in examples[0]:
            batch["reference"] = torch.from_numpy(np.stack([example["reference"] for example in examples]))
        return batch


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data. A tokenizer without a chat template is given a plain one, in place."""
    require_template(tokenizer)
    make = partial(_examples, options=options, tokenizer=tokenizer)
    return TaskData(
        task="preference",
        train=tables.train and make(tables.train),
        eval=tables.eval and make(tables.eval),
        collate=PairCollate(TokenCollate(pad_id(tokenizer))),
        tokenizer=tokenizer,
    )


def _examples(table: Table, *, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> Examples:
    prompt = pairs.find_prompt(table, options)
    rendered: list[Rendered] = []
    for index in range(len(table.rows)):
        pair = pairs.read(table, prompt, index)
        try:
            rendered += [render_answer(chat, len(pair.prompt), tokenizer) for chat in pair.chats]
        except UserError as error:
            raise UserError(f"{table.where(index)}: {error}") from error
    sequences = encode(rendered, tokenizer, max_length=options.max_length)
    lengths = ints(map(len, sequences["input_ids"]))
    counts = ints(count(labels, shifted=True) for labels in sequences["labels"])
    lack = f"without two answers that begin, and differ, within data.max_length = {options.max_length} tokens"
    return learnable(
        Pairs(Examples(sequences, counts, lengths)), _comparable(sequences, counts), lengths.reshape(-1, 2).sum(1),
        name=table.name, lack=lack,
    )  # fmt: skip


def _comparable(sequences: Dataset, counts: np.ndarray) -> np.ndarray:
    """1 for each pair whose answers both have a token left, and are not the same as far as they go; 0 for the others."""
    ids = list(sequences["input_ids"])
    differ = np.asarray([chosen != rejected for chosen, rejected in zip(ids[::2], ids[1::2], strict=True)])
    comparable: np.ndarray = (counts.reshape(-1, 2).min(1) > 0) & differ
    return comparable.astype(np.int64)
