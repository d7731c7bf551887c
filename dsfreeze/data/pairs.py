"""Preference data in its usual shapes, read as pairs: the turns that ask, an answer that was chosen, one that was rejected.

Always the columns `chosen` and `rejected`. They hold answers, as texts or as messages, beside a prompt:

prompt, question          a text, or messages
instruction               with `input` and `history`, as in Alpaca's data
conversations, messages   the turns up to the answer (LLaMA-Factory's)

or whole conversations; then the prompt is what the two begin with alike. `system` may stand beside any of these. Messages
have the keys role and content, or from and value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsfreeze.data.conversations import Message, Row, instruction_of, turns_of, with_system
from dsfreeze.data.sources import Table
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions

ANSWERS = ("chosen", "rejected")
#: Usual columns of the prompt, in the order in which they are looked for.
PROMPTS = ("prompt", "question", "instruction", "conversations", "messages")


@dataclass(frozen=True)
class Pair:
    """The turns up to the answer, and the answers: a turn of the assistant each."""

    prompt: list[Message]
    chosen: Message
    rejected: Message

    @property
    def chats(self) -> tuple[list[Message], list[Message]]:
        """The two conversations."""
        return [*self.prompt, self.chosen], [*self.prompt, self.rejected]


def find_prompt(table: Table, options: DataOptions) -> str | None:
    """The prompt's column: the recipe's, or recognised; None where there is none."""
    missing = next((column for column in ANSWERS if column not in table.columns), None)
    if missing is not None:
        raise UserError(
            f"{table.name} has no column '{missing}'. Task preference reads 'chosen' and 'rejected': answers beside a prompt "
            f"({', '.join(PROMPTS)}, or the column that data.text names), or whole conversations. "
            f"Its columns: {', '.join(table.columns)}."
        )
    if options.text is None:
        return next((column for column in PROMPTS if column in table.columns), None)
    if len(options.text) != 1:
        raise UserError(
            f"data.text names {' and '.join(options.text)}; task preference reads the prompt's column from it, and the "
            "answers from 'chosen' and 'rejected'."
        )
    return table.require(options.text, "data.text")[0]


def read(table: Table, prompt: str | None, index: int) -> Pair:
    """The pair of row `index`; `prompt` is `find_prompt`'s."""
    try:
        return _pair(table.rows[index], prompt)
    except UserError as error:
        raise UserError(f"{table.where(index)}: {error}") from None


def _pair(row: Row, column: str | None) -> Pair:
    chosen, rejected = (_turns(row, answer, "assistant") for answer in ANSWERS)
    whole = [column is None or turns[0]["role"] != "assistant" for turns in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise UserError("one of 'chosen' and 'rejected' is a whole conversation and the other is not.")
    if whole[0]:
        shared = _shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        assert column is not None, "without one they are whole"
        prompt = instruction_of(row, column) if column == "instruction" else _turns(row, column, "user")
    if chosen == rejected:
        raise UserError("'chosen' and 'rejected' are the same: there is nothing to prefer. Drop the row.")
    answers = (_answer(turns, name) for turns, name in zip((chosen, rejected), ANSWERS, strict=True))
    prompt = with_system(row, prompt) if prompt else prompt
    return Pair(_asking(prompt, None if whole[0] else column), *answers)


def _turns(row: Row, column: str, role: str) -> list[Message]:
    """A column as turns: those it holds, or its text as one turn of `role`."""
    value = row[column]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return turns_of(value, column)
    problem = "is missing" if value is None else f"holds {value!r}, which is neither a text nor turns of a chat"
    raise UserError(f"'{column}' {problem}. Fill it in, or drop the row.")


def _shared(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many turns two conversations begin with alike."""
    differ = (number for number, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differ, min(len(first), len(second)))


def _answer(turns: Sequence[Message], column: str) -> Message:
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns) or "nothing"
        raise UserError(
            f"'{column}' holds {roles} beyond the prompt, and an answer is one turn of the assistant. Cut the conversations "
            "after the first answer in which they differ."
        )
    if not turns[0]["content"].strip():
        raise UserError(f"'{column}' is an empty answer. Fill it in, or drop the row.")
    return turns[0]


def _asking(prompt: list[Message], column: str | None) -> list[Message]:
    where = f"'{column}'" if column else "what 'chosen' and 'rejected' begin with alike"
    if not prompt or not any(turn["content"].strip() for turn in prompt):
        mend = "Fill it in, or drop the row." if column else "Name its column in data.text, or drop the row."
        raise UserError(f"the prompt ({where}) is empty. {mend}")
    if prompt[-1]["role"] == "assistant":
        raise UserError(
            f"the prompt ({where}) ends with a turn of the assistant; the last turn before an answer is what it answers."
        )
    return prompt
