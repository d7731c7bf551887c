"""From a source text to a target text, for encoder-decoders such as T5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dsfreeze.data import columns
from dsfreeze.data.examples import (
    IGNORED,
    Batch,
    Example,
    Examples,
    Prompts,
    TaskData,
    ints,
    learnable,
    pad,
    pad_id,
    pad_inputs,
    tokenised,
)
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Collate:
    """Pads sources and targets on the right; the model shifts `labels` into its decoder's input itself."""

    pad_id: int

    def __call__(self, examples: Sequence[Example]) -> Batch:
        batch = pad_inputs([example["input_ids"] for example in examples], self.pad_id)
        batch["labels"] = pad([example["labels"] for example in examples], IGNORED)
        return batch


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data; a column inside another is written `translation.en`."""
    tables = Tables(tables.train and _flat(tables.train), tables.eval and _flat(tables.eval), _flat(tables.full))
    text = columns.find(tables.full, options.text, columns.TRANSLATIONS, "data.text")
    if len(text) != 2:
        raise UserError(f"data.text names {text[0]} alone; task seq2seq needs a source and a target: [{text[0]}, ...].")
    rows = partial(_tokenised, text=text, tokenizer=tokenizer, options=options)
    trained = tables.train and rows(tables.train)
    evaluated: Any = tables.eval and rows(tables.eval)
    return TaskData(
        task="seq2seq",
        train=tables.train and _examples(trained, tables.train.name),
        eval=tables.eval and _examples(evaluated, tables.eval.name),
        collate=Collate(pad_id(tokenizer)),
        tokenizer=tokenizer,
        prompts=tables.eval
        and Prompts(
            evaluated["input_ids"],
            list(tables.eval.rows[text[1]]),
            encoder=True,
            sources=list(tables.eval.rows[text[0]]),
        ),
    )


def _flat(table: Table) -> Table:
    return Table(table.rows.flatten(), table.name, table.numbers)


def _tokenised(
    table: Table, *, text: Sequence[str], tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> Dataset:
    table.require(text, "data.text")
    columns.require_filled(table, text)
    encode = partial(
        _encode,
        source=text[0],
        target=text[1],
        prefix=options.prefix,
        tokenizer=tokenizer,
        max_length=options.max_length,
    )
    return tokenised(table.rows, encode)


def _examples(rows: Dataset, name: str) -> Examples:
    num_items = ints(map(len, rows["labels"]))
    num_tokens = num_items + ints(map(len, rows["input_ids"]))
    return learnable(rows, num_items, num_tokens, name=name, lack="without a target")


def _encode(
    rows: dict[str, list[Any]],
    *,
    source: str,
    target: str,
    prefix: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, list[Any]]:
    sources = [prefix + str(value) for value in rows[source]]
    targets = [str(value) for value in rows[target]]
    inputs = tokenizer(sources, truncation=True, max_length=max_length)["input_ids"]
    labels = tokenizer(text_target=targets, truncation=True, max_length=max_length)["input_ids"]
    return {"input_ids": [_ended(ids, tokenizer, max_length) for ids in inputs],
            "labels": [_ended(ids, tokenizer, max_length) for ids in labels]}  # fmt: skip


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[int]:
    """With an end-of-text token, which a decoder needs in order to learn to stop; T5's tokenizer adds it itself."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids[: max_length - 1], end]
