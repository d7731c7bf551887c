"""Tasks as files: each is rendered once, before the first round, so that replay and pooling are matters of data.

    output_dir/tasks/NAME/train.jsonl, eval.jsonl      {"prompt": [messages], "completion": [messages]} for sft
    output_dir/probes/NAME/eval.jsonl

Rows of other tasks are trained on as they are, copied likewise; they are evaluated from where they lie. Files appear whole or not at
all.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsfreeze.continual.reading import Course
from dsfreeze.continual.spec import Measured, ProbeSpec, ReplayOptions, fields_of
from dsfreeze.data import conversations, sample
from dsfreeze.data.sources import Table, load
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import write_whole
from dsfreeze.recipe import DataOptions, Recipe

Row = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A task's or probe's files; `train` None for a probe. `sha256` is of what is trained and measured on, `notes` say what is cut."""

    name: str
    task: str
    train: str | None
    eval: str
    num_train: int
    num_eval: int
    sha256: str
    max_new_tokens: int | None = None
    notes: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def render(course: Course, measured: Measured, recipe: Recipe, folder: Path) -> tuple[Rendered, dict[str, list[Row]]]:
    """Write a task's files under `folder`; also its rows by role. UserError when there is none, or a row or column is missing."""
    files: dict[str, str] = {}
    rows: dict[str, list[Row]] = {}
    digest = hashlib.sha256()
    for role in ("eval",) if isinstance(measured, ProbeSpec) else ("train", "eval"):
        table = _table(course, measured, recipe, role)
        rows[role] = _rows(measured, recipe, table)
        text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows[role])
        digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        copied = recipe.task == "sft" or role == "train"
        files[role] = str(folder / measured.name / f"{role}.jsonl") if copied else str(recipe.data.eval)
        if copied:
            write_rows(Path(files[role]), rows[role])
    rendered = Rendered(
        measured.name, recipe.task, files.get("train"), files["eval"], len(rows.get("train", ())), len(rows["eval"]), digest.hexdigest()
    )  # fmt: skip
    return rendered, rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """JSON lines; UserError when the disk refuses."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    try:
        write_whole(path, text)
    except (OSError, UnicodeEncodeError) as error:
        raise UserError(f"Cannot write {path}: {error}.") from None


def read_rows(path: str) -> list[Row]:
    """What `write_rows` wrote; lines end in \\n alone, whatever other line ends a text holds."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


def _table(course: Course, measured: Measured, recipe: Recipe, role: str) -> Table:
    """The rows of a role, sampled as the recipe asks."""
    merged = {**course.spec.data, **measured.data}
    options = DataOptions.model_validate({key: merged[key] for key in ("train_split", "eval_split") if key in merged})
    source = str(recipe.data.eval if role == "eval" else course.located(str(merged["train"])))
    split = options.eval_split if role == "eval" else options.train_split
    table = load(source, split, role=role)
    most = merged.get(f"max_{role}_examples")
    return sample(table, most, recipe.train.seed if role == "train" else None)


def _rows(measured: Measured, recipe: Recipe, table: Table) -> list[Row]:
    if recipe.task != "sft":
        return [dict(row) for row in table.rows]
    if measured.prompt is None or measured.answer is None:
        return list(_chats(table, recipe.data))
    return _from_templates(table, measured.prompt, measured.answer)


def _from_templates(table: Table, prompt: str, answer: str) -> list[Row]:
    columns = dict.fromkeys((*fields_of(prompt), *fields_of(answer)))
    missing = [column for column in columns if column not in table.columns]
    if missing:
        names = ", ".join(f"'{column}'" for column in missing)
        raise UserError(
            f"{table.name} has no column {names}, which a template names.{did_you_mean(missing[0], table.columns)}"
        )
    labels = {column: classes for column in columns if (classes := table.names_of(column))}
    rows = []
    for index, row in enumerate(table.rows.select_columns(list(columns)) if columns else [{}] * len(table.rows)):
        empty = [column for column in columns if row[column] is None]
        if empty:
            raise UserError(f"{table.where(index)}: '{empty[0]}' is missing. Fill it in, or drop the row.")
        texts = {column: labels[column][row[column]] if column in labels else str(row[column]) for column in columns}
        rows.append(_pair([_turn("user", prompt.format_map(texts))], answer.format_map(texts)))
    return rows


def _chats(table: Table, options: DataOptions) -> list[Row]:
    """Chats in their usual shapes: what leads to the last answer, and that answer."""
    name, columns = conversations.choose(table, options)
    rows = []
    for index in range(len(table.rows)):
        chat = conversations.read(table, name, columns, index)
        last = max(turn for turn, message in enumerate(chat) if message["role"] == "assistant")
        rows.append(_pair(chat[:last], chat[last]["content"]))
    return rows


def _pair(prompt: list[dict[str, str]], answer: str) -> Row:
    return {"prompt": prompt, "completion": [_turn("assistant", answer)]}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def prompt_of(row: Row) -> str:
    """The prompt's turns as one text."""
    return "\n".join(turn["content"] for turn in row["prompt"])


def answer_of(row: Row) -> str:
    answer: str = row["completion"][0]["content"]
    return answer


# -- what a round trains on ----------------------------------------------------------------------------------------


def replayed(
    earlier: Sequence[Rendered], options: ReplayOptions, seed: int, read: Callable[[str], list[Row]] = read_rows
) -> list[Row]:
    """Of each earlier task a share of its rows, at least one: a buffer that stays the same in all later rounds, drawn from the seed
    and the task's name."""
    mixed: list[Row] = []
    for task in earlier:
        rows = read(str(task.train))
        count = max(1, math.floor(options.ratio * len(rows)))
        if options.choose == "sample":
            chosen = sorted(random.Random(f"{seed}/{task.name}").sample(range(len(rows)), count))
        else:
            chosen = list(range(count))
        mixed += [rows[index] for index in chosen]
    return mixed


def pooled(tasks: Sequence[Rendered], times: Sequence[int]) -> list[Row]:
    """All tasks' rows, each task's as many times as it is to be seen."""
    return [row for task, count in zip(tasks, times, strict=True) for row in read_rows(str(task.train)) * count]
