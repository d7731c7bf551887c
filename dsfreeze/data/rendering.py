"""Chats as text and tokens: rendered by the tokenizer's chat template, with the answers marked.

What belongs to an answer is read from the template itself: the text that is there with the turn and not yet with the
request for one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset
from jinja2 import TemplateError

from dsfreeze.data.conversations import Message
from dsfreeze.data.examples import IGNORED, tokenised
from dsfreeze.data.tokens import require_fast
from dsfreeze.errors import UserError

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


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """A tokenizer without a chat template is given a plain one, in place; UserError for one that cannot mark answers."""
    require_fast(tokenizer)
    if not tokenizer.chat_template:
        logger.warning(
            "The tokenizer has no chat template: chats are written as lines of 'User: ...' and 'Assistant:'."
        )
        tokenizer.chat_template = PLAIN_TEMPLATE


def render(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[Rendered]:
    """The chat's text and where its answers are: one example, or one for each answer where the template rewrites
    earlier turns as the chat goes on (some drop old reasoning), so that each answer is learnt in the context it has."""
    full = fill_template(chat, tokenizer)
    turns = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    parts = [render_answer(chat, turn, tokenizer) for turn in turns]
    if all(full.startswith(part.text) for part in parts):
        return [Rendered(full, tuple(part.answers[0] for part in parts))]
    return parts


def render_answer(chat: Sequence[Message], turn: int, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The chat up to a turn of the assistant, which alone counts."""
    before = fill_template(chat[:turn], tokenizer, ask=True) if turn else ""
    upto = fill_template(chat[: turn + 1], tokenizer)
    if not upto.startswith(before):
        raise UserError("the chat template writes a turn of the assistant otherwise than it asks for one; use another.")
    return Rendered(upto, ((len(before), len(upto)),))


def fill_template(chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, ask: bool = False) -> str:
    """The chat as text; with `ask`, ended by the request for a turn of the assistant."""
    try:
        return cast(str, tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise UserError(f"the chat template refuses these turns: {error}") from error


def encode(
    rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase, *, max_length: int, answer_only: bool = True
) -> Dataset:
    """`input_ids` and `labels` of each chat, cut on the right at `max_length` tokens; labels of the answers alone, or of
    every token."""
    texts = Dataset.from_dict(
        {
            "text": [chat.text for chat in rendered],
            "answers": [list(chain.from_iterable(chat.answers)) for chat in rendered],
        }
    )
    return tokenised(texts, partial(_encode, tokenizer=tokenizer, max_length=max_length, answer_only=answer_only))


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
