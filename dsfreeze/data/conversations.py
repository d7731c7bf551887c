"""Instruction and chat data in its usual shapes, read as messages: a list of {"role", "content"}.

messages           a column of messages (OpenAI's)
sharegpt           a column of {"from", "value"}
alpaca             instruction, input (may be empty), output; optionally system and history
prompt_completion  prompt, completion: texts, or lists of messages
question_answer    question, answer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsfreeze.data.sources import Table
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.recipe import DataOptions

Message = dict[str, str]
Row = Mapping[str, Any]

ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "function_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """A shape of rows: its usual columns and how a row with such columns becomes messages."""

    columns: tuple[str, ...]
    read: Callable[[Row, Sequence[str]], list[Message]]


def text_of(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise UserError(f"'{column}' is missing. Fill it in, or drop the row.")
    return value


def _messages(turns: Any, column: str, role_key: str, content_key: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise UserError(f"'{column}' is no list of turns, or an empty one.")
    messages = []
    for turn in turns:
        role, content = (turn.get(key) if isinstance(turn, dict) else None for key in (role_key, content_key))
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"'{column}': a turn needs the texts '{role_key}' and '{content_key}'; this one holds {turn}."
            )
        if role not in ROLES:
            raise UserError(f"'{column}': unknown role '{role}'.{did_you_mean(role, ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    return messages


def turns_of(value: Any, column: str) -> list[Message]:
    """A list of turns in OpenAI's or ShareGPT's keys, whichever the first one has."""
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    keys = ("from", "value") if "from" in first else ("role", "content")
    return _messages(value, column, *keys)


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """With the text of the column `system` before them, where there is one and they bring none."""
    system = row.get("system")
    has_none = messages[0]["role"] != "system"
    return (
        [{"role": "system", "content": system}, *messages]
        if isinstance(system, str) and system and has_none
        else messages
    )


def _from_messages(row: Row, columns: Sequence[str]) -> list[Message]:
    return with_system(row, _messages(row[columns[0]], columns[0], "role", "content"))


def _from_sharegpt(row: Row, columns: Sequence[str]) -> list[Message]:
    return with_system(row, _messages(row[columns[0]], columns[0], "from", "value"))


def instruction_of(row: Row, column: str) -> list[Message]:
    """The turns up to an answer: `history`, and the instruction with its `input`."""
    messages: list[Message] = []
    for question, answer in row.get("history") or []:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = "\n\n".join(filter(None, [text_of(row, column), row.get("input") or ""]))
    return [*messages, {"role": "user", "content": asked}]


def _from_alpaca(row: Row, columns: Sequence[str]) -> list[Message]:
    instruction, output = columns
    answer = {"role": "assistant", "content": text_of(row, output)}
    return with_system(row, [*instruction_of(row, instruction), answer])


def _from_pair(row: Row, columns: Sequence[str]) -> list[Message]:
    messages: list[Message] = []
    for column, role in zip(columns, ("user", "assistant"), strict=True):
        if isinstance(row[column], list):
            messages += turns_of(row[column], column)
        else:
            messages.append({"role": role, "content": text_of(row, column)})
    return with_system(row, messages)


FORMATS = {
    "messages": Format(("messages",), _from_messages),
    "sharegpt": Format(("conversations",), _from_sharegpt),
    "alpaca": Format(("instruction", "output"), _from_alpaca),
    "prompt_completion": Format(("prompt", "completion"), _from_pair),
    "question_answer": Format(("question", "answer"), _from_pair),
}


def choose(table: Table, options: DataOptions) -> tuple[str, list[str]]:
    """The format of these rows and the columns it reads: the recipe's, or recognised by the columns."""
    name: str = options.format
    if name == "auto":
        name = _recognise(table, options.text)
    wanted = options.text or list(FORMATS[name].columns)
    if len(wanted) != len(FORMATS[name].columns):
        raise UserError(
            f"data.text names {' and '.join(wanted)}, but format {name} reads {len(FORMATS[name].columns)} column(s): "
            f"{', '.join(FORMATS[name].columns)}."
        )
    return name, table.require(wanted, "data.text" if options.text else f"data.format: {name}")


def _recognise(table: Table, text: Sequence[str] | None) -> str:
    if text is not None and len(text) == 2:
        return "prompt_completion"
    if text is not None:
        turns = next((row for row in table.rows.select_columns(table.require(text, "data.text"))[text[0]] if row), None)
        keys = turns[0] if isinstance(turns, list) and isinstance(turns[0], dict) else {}
        if "from" in keys or "role" in keys:
            return "sharegpt" if "from" in keys else "messages"
        raise UserError(f"data.text: '{text[0]}' holds no chats; name a pair of columns, question and answer.")
    for name, shape in FORMATS.items():
        if set(shape.columns) <= set(table.columns):
            return name
    shapes = "; ".join(f"{name}: {' + '.join(shape.columns)}" for name, shape in FORMATS.items())
    raise UserError(
        f"data.format: {table.name} has none of the known shapes ({shapes}). "
        f"Write data.text: [question column, answer column]. Its columns: {', '.join(table.columns)}."
    )


def read(table: Table, name: str, columns: Sequence[str], index: int) -> list[Message]:
    """The messages of row `index`; the last assistant turn may be followed by nothing that counts."""
    try:
        messages = FORMATS[name].read(table.rows[index], columns)
    except UserError as error:
        raise UserError(f"{table.where(index)}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(f"{table.where(index)}: no turn of the assistant, nothing to learn from. Drop the row.")
    return messages
