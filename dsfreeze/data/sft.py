"""Supervised fine-tuning on chats and instructions, rendered by the tokenizer's chat template.

The loss falls on the assistant's turns alone, each with the mark that ends it, or on every token
(`data.answer_only: false`). What belongs to a turn is read from the template itself: the text that is there with the
turn and not yet with the request for one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from jinja2 import TemplateError

from dsfreeze.data import conversations
from dsfreeze.data.conversations import Message
from dsfreeze.data.examples import (
    IGNORED,
    Examples,
    Prompts,
    TaskData,
    TokenCollate,
    count,
    ints,
    learnable,
    pad_id,
    tokenised,
)
from dsfreeze.data.packing import PackedCollate, pack
from dsfreeze.data.sources import Table, Tables
from dsfreeze.data.tokens import require_fast
from dsfreeze.errors import UserError
from dsfreeze.metrics import generates
from dsfreeze.recipe import DataOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

#: For tokenizers of base models, which bring none; written into the tokenizer, so that an exported model carries it. An answer stands
#: on a line of its own: after a blank, a sentencepiece tokenizer would join the blank to its first word, which would not be learnt.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ 'Assistant:\n' + message['content'] + (eos_token or '') + '\n' }}"
    "{% else %}{{ message['role'].capitalize() + ': ' + message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and the characters [start, end) of the assistant's turns that count."""

    text: str
    answers: tuple[tuple[int, int], ...]


def prepare(options: DataOptions, tables: Tables, tokenizer: PreTrainedTokenizerBase) -> TaskData:
    """The task's data. A tokenizer without a chat template is given a plain one, in place."""
    require_fast(tokenizer)
    if not tokenizer.chat_template:
        logger.warning(
            "The tokenizer has no chat template: chats are written as lines of 'User: ...' and 'Assistant:'."
        )
        tokenizer.chat_template = PLAIN_TEMPLATE
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
    texts = Dataset.from_dict(
        {
            "text": [chat.text for chat in rendered],
            "answers": [list(chain.from_iterable(chat.answers)) for chat in rendered],
        }
    )
    encode = partial(_encode, tokenizer=tokenizer, max_length=options.max_length, answer_only=options.answer_only)
    rows = tokenised(texts, encode)
    num_items = ints(count(labels, shifted=True) for labels in rows["labels"])
    lack = f"without an answer that begins within data.max_length = {options.max_length} tokens"
    return learnable(rows, num_items, ints(map(len, rows["input_ids"])), name=table.name, lack=lack)


def _encode(
    rows: dict[str, list[Any]], *, tokenizer: PreTrainedTokenizerBase, max_length: int, answer_only: bool
) -> dict[str, list[Any]]:
    encoded = tokenizer(
        rows["text"], truncation=True, max_length=max_length, add_special_tokens=False, return_offsets_mapping=True
    )
    labels = encoded["input_ids"]
    if answer_only:
        labels = [
            mask(ids, offsets, list(zip(bounds[::2], bounds[1::2], strict=True)))
            for ids, offsets, bounds in zip(labels, encoded["offset_mapping"], rows["answers"], strict=True)
        ]
    return {"input_ids": encoded["input_ids"], "labels": labels}


def mask(ids: Sequence[int], offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]) -> list[int]:
    """The ids of the tokens that lie in an answer, -100 for the others.

    A token that holds the answer's first character and some of what stands before it counts as before, one that runs
    over the answer's end as within.
    """
    return [
        token if any(start <= first < end for start, end in answers) and last > first else IGNORED
        for token, (first, last) in zip(ids, offsets, strict=True)
    ]


def render(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """The chat's text and where its answers are: one example, or one for each answer where the template rewrites
    earlier turns as the chat goes on (some drop old reasoning), so that each answer is learnt in the context it has."""
    full = _template(chat, tokenizer)
    turns = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    parts = []
    for turn in turns:
        before = _template(chat[:turn], tokenizer, ask=True) if turn else ""
        upto = _template(chat[: turn + 1], tokenizer)
        if not upto.startswith(before):
            raise UserError(
                "the chat template writes a turn of the assistant otherwise than it asks for one; use another."
            )
        parts.append(Rendered(upto, ((len(before), len(upto)),)))
    if all(full.startswith(part.text) for part in parts):
        return [Rendered(full, tuple(part.answers[0] for part in parts))]
    return parts


def _template(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask)
    except TemplateError as error:
        raise UserError(f"the chat template refuses these turns: {error}") from error


def _prompts(table: Table, options: DataOptions, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Each chat up to its last answer, and that answer."""
    texts, references, sources = [], [], []
    for chat in _chats(table, options):
        last = max(index for index, message in enumerate(chat) if message["role"] == "assistant")
        texts.append(_template(chat[:last], tokenizer, ask=True))
        references.append(chat[last]["content"])
        sources.append("\n".join(message["content"] for message in chat[:last]))
    # The end of a prompt is what the answer follows: one that is too long loses its beginning.
    ids = [row[-options.max_length :] for row in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    return Prompts(ids, references, encoder=False, sources=sources)
