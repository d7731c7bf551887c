"""Token classification (entities, parts of speech): words with one tag each.

The first token of a word carries its tag, its other tokens and the special ones none. Words are aligned by character
offsets, so that any fast tokenizer serves, also one that cannot take split words.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from dsfreeze.data import columns
from dsfreeze.data.examples import IGNORED, Examples, TaskData, TokenCollate, count, ints, learnable, pad_id, tokenised
from dsfreeze.data.labels import index_of, label_names
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data; tags are those of the training data."""
    require_fast(tokenizer)
    (words,) = columns.find(tables.full, options.text, columns.WORDS, "data.text")
    (tags,) = columns.find(tables.full, [options.label] if options.label else None, columns.TAGS, "data.label")
    every_tag = list(chain.from_iterable(row or [] for row in tables.full.rows[tags]))
    names = label_names(every_tag, tables.full, tags, options)
    make = partial(_examples, words=words, tags=tags, names=names, tokenizer=tokenizer, max_length=options.max_length)
    return TaskData(
        task="tokens",
        train=tables.train and make(tables.train),
        eval=tables.eval and make(tables.eval),
        collate=TokenCollate(pad_id(tokenizer)),
        tokenizer=tokenizer,
        labels=names,
        num_labels=len(names),
    )


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that cannot say which characters a token stands for."""
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} gives no character offsets; "
            "save its fast form (tokenizer.json) into the model's folder."
        )


def _examples(
    table: Table, *, words: str, tags: str, names: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Examples:
    table.require([words], "data.text")
    table.require([tags], "data.label")
    labels = []
    for index, (row_words, row_tags) in enumerate(zip(table.rows[words], table.rows[tags], strict=True)):
        where = table.where(index)
        if not isinstance(row_words, list) or not isinstance(row_tags, list):
            raise UserError(f"{where}: '{words}' and '{tags}' must be lists, one tag for each word.")
        if len(row_words) != len(row_tags):
            raise UserError(f"{where}: {len(row_words)} words in '{words}' but {len(row_tags)} tags in '{tags}'.")
        labels.append([index_of(tag, names, where, tags) for tag in row_tags])
    rows = table.rows.select_columns([words]).add_column("word_labels", labels)
    encode = partial(_encode, words=words, tokenizer=tokenizer, max_length=max_length)
    rows = tokenised(rows, encode)
    num_items, num_tokens = ints(map(count, rows["labels"])), ints(map(len, rows["input_ids"]))
    lack = f"without a word that gives a token within data.max_length = {max_length} tokens"
    return learnable(rows, num_items, num_tokens, name=table.name, lack=lack)


def _encode(
    rows: dict[str, list[Any]], *, words: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, list[Any]]:
    texts = [" ".join(map(str, row)) for row in rows[words]]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    labels = [
        align(list(map(str, row)), row_labels, offsets)
        for row, row_labels, offsets in zip(rows[words], rows["word_labels"], encoded["offset_mapping"], strict=True)
    ]
    kept = {key: encoded[key] for key in ("input_ids", "token_type_ids") if key in encoded}
    return {**kept, "labels": labels}


def align(words: Sequence[str], labels: Sequence[int], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """One label a token: a word's on the first token that starts in it, -100 elsewhere.

    `offsets` are the tokens' characters [start, end) in the words joined by spaces; special tokens have start == end.
    """
    word_at = list(chain.from_iterable([index] * len(word) + [-1] for index, word in enumerate(words)))
    seen: set[int] = set()
    aligned = []
    for start, end in offsets:
        word = next((word_at[at] for at in range(start, end) if word_at[at] >= 0), None)
        aligned.append(IGNORED if word is None or word in seen else labels[word])
        seen.add(-1 if word is None else word)
    return aligned
