"""Supervised fine-tuning on chats and instructions, rendered by the tokenizer's chat template.

The loss falls on the assistant's turns alone, each with the mark that ends it, or on every token
(`data.answer_only: false`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from dsfreeze.data import conversations
from dsfreeze.data.conversations import Message
from dsfreeze.data.examples import Examples, Prompts, TaskData, TokenCollate, count, ints, learnable, pad_id
from dsfreeze.data.packing import PackedCollate, pack
from dsfreeze.data.rendering import Rendered, encode, fill_template, render, require_template
from dsfreeze.data.sources import Table, Tables
from dsfreeze.errors import UserError
from dsfreeze.metrics import generates
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data. A tokenizer without a chat template is given a plain one, in place."""
    require_template(tokenizer)
    make = partial(_examples, options=options, tokenizer=tokenizer)
    trained = tables.train and make(tables.train)
    if trained and options.packing:
        trained = pack(trained, options.max_length)
    plain = TokenCollate(pad_id(tokenizer))
    return TaskData(
        task="sft",
        train=trained,
        eval=tables.eval and make(tables.eval),
        collate=PackedCollate(plain) if options.packing else plain,
        tokenizer=tokenizer,
        prompts=_prompts(tables.eval, options, tokenizer) if tables.eval and generates(options.metrics) else None,
    )


def _chats(table: Table, options: DataOptions) -> list[list[Message]]:
    name, columns = conversations.choose(table, options)
    return [conversations.read(table, name, columns, index) for index in range(len(table.rows))]


def _examples(table: Table, *, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> Examples:
    rendered: list[Rendered] = []
    for index, chat in enumerate(_chats(table, options)):
        try:
            rendered += render(chat, tokenizer)
        except UserError as error:
            raise UserError(f"{table.where(index)}: {error}") from error
    rows = encode(rendered, tokenizer, max_length=options.max_length, answer_only=options.answer_only)
    num_items = ints(count(labels, shifted=True) for labels in rows["labels"])
    lack = f"without an answer that begins within data.max_length = {options.max_length} tokens"
    return learnable(rows, num_items, ints(map(len, rows["input_ids"])), name=table.name, lack=lack)


def _prompts(table: Table, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Each chat up to its last answer, and that answer."""
    texts, references, sources = [], [], []
    for chat in _chats(table, options):
        last = max(index for index, message in enumerate(chat) if message["role"] == "assistant")
        texts.append(fill_template(chat[:last], tokenizer, ask=True))
        references.append(chat[last]["content"])
        sources.append("\n".join(message["content"] for message in chat[:last]))
    # The end of a prompt is what the answer follows: one that is too long loses its beginning.
    ids = [row[-options.max_length :] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return Prompts(ids, references, encoder=False, sources=sources)
