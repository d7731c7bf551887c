"""What can be known to go wrong before a model is loaded: tasks that cannot be told apart, answers that do not fit, pairs that say nothing.

Two sft tasks *clash* when
- one prompt, word for word, is in both and no answer of the one is an answer of the other; or
- both choose among a few labels (at most MOST_LABELS different answers, each occurring twice on average), the labels differ, and
  nothing in the prompts tells the tasks apart: what all prompts of a task begin and end with is the same in both.
In either case a model that does one well does the other badly, and a matrix of the two measures nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from dsfreeze.continual.rendering import Rendered, Row, answer_of, prompt_of
from dsfreeze.data.examples import IGNORED
from dsfreeze.data.rendering import mask, render
from dsfreeze.errors import UserError
from dsfreeze.metrics import generates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dsfreeze.recipe import Recipe

#: More different answers than this are no label set. [ours]
MOST_LABELS = 50


@dataclass(frozen=True)
class Wording:
    """How a task's training prompts and answers look: `frame`, what all prompts begin and end with; `answers` by prompt; `labels`,
    None where the answers are no closed set."""

    name: str
    frame: tuple[str, str]
    answers: Mapping[str, frozenset[str]]
    labels: frozenset[str] | None


def wording(name: str, rows: Sequence[Row]) -> Wording:
    """Of one task's training rows."""
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(prompt_of(row), set()).add(answer_of(row).strip())
    prompts = list(answers)
    frame = _common_start(prompts), _common_start([prompt[::-1] for prompt in prompts])[::-1]
    labels = frozenset(answer for each in answers.values() for answer in each)
    closed = len(labels) <= MOST_LABELS and 2 * len(labels) <= len(rows)
    return Wording(
        name, frame, {prompt: frozenset(each) for prompt, each in answers.items()}, labels if closed else None
    )


def _common_start(texts: Sequence[str]) -> str:
    """What all of them begin with; it is what the first and the last in order have in common."""
    first, last = (min(texts), max(texts)) if texts else ("", "")
    same = next(
        (n for n, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), min(len(first), len(last))
    )
    return first[:same]


def clashes(wordings: Sequence[Wording]) -> Iterator[str]:
    """A sentence for every two tasks that clash."""
    for one, other in combinations(wordings, 2):
        shared = [prompt for prompt in one.answers if prompt in other.answers]
        at_odds = [prompt for prompt in shared if not one.answers[prompt] & other.answers[prompt]]
        if at_odds:
            example = at_odds[0]
            yield (
                f"tasks '{one.name}' and '{other.name}' clash: {len(at_odds)} prompts are in both with other answers, such as "
                f"{_short(example)}: {_some(one.answers[example])} in the one, {_some(other.answers[example])} in the other. "
                "Say in the prompts what is asked."
            )
        elif one.labels and other.labels and one.labels != other.labels and one.frame == other.frame:
            yield (
                f"tasks '{one.name}' and '{other.name}' clash: nothing in their prompts tells them apart, and their answers differ "
                f"({_some(one.labels)} against {_some(other.labels)}). Name the task or its labels in the prompts."
            )


def _some(labels: frozenset[str]) -> str:
    names = sorted(labels)
    return ", ".join(map(_short, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


# -- lengths -------------------------------------------------------------------------------------------------------


def fitted(
    rendered: Rendered,
    rows: Mapping[str, list[Row]],
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cut: bool,
    given: bool,
) -> tuple[Rendered, list[str]]:
    """An sft task with the notes of what is cut, and the tokens of its longest answer where a metric generates and the user gave
    (`given`) no other; and the mistakes: answers that do not fit at all, unless they may be `cut`."""
    most, notes, mistakes, longest = recipe.data.max_length, list[str](), list[str](), 1
    for role, each in rows.items():
        lengths = [_lengths(row, tokenizer) for row in each]
        where = f"'{rendered.name}', {role}"
        too_long = [index for index, (_, answer) in enumerate(lengths) if answer > most]
        longest = max([longest, *(answer for _, answer in lengths)])
        if too_long and not cut:
            worst = max(too_long, key=lambda index: lengths[index][1])
            mistakes.append(
                f"{where}: {len(too_long)} of {len(each)} answers are longer than data.max_length ({most} tokens); the longest, row "
                f"{worst + 1}, has {lengths[worst][1]}. Raise data.max_length, or write long_answers: cut, which cuts them from the right."
            )
        notes += _notes(where, role, lengths, most)
    wanted = None if given or not generates(recipe.data.metrics) else min(longest, most)
    return replace(rendered, max_new_tokens=wanted, notes=tuple(notes)), mistakes


def _lengths(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens of a row's prompt and of its answer, with the mark that ends it."""
    chat = render([*row["prompt"], *row["completion"]], tokenizer)[-1]
    encoded = tokenizer(chat.text, add_special_tokens=False, return_offsets_mapping=True)
    labels = mask(encoded["input_ids"], encoded["offset_mapping"], chat.answers[-1:])
    answer = sum(label != IGNORED for label in labels)
    return len(labels) - answer, answer


def _notes(where: str, role: str, lengths: Sequence[tuple[int, int]], most: int) -> Iterator[str]:
    lost = sum(prompt >= most for prompt, _ in lengths)
    cut = sum(prompt < most < prompt + answer for prompt, answer in lengths)
    if role == "train" and (lost or cut):
        yield (
            f"{where}: of {len(lengths)} rows {cut} lose the end of their answer at data.max_length = {most} tokens, and {lost} are left "
            "out, whose answer would begin beyond it"
        )
    if role == "eval" and lost:
        yield f"{where}: {lost} of {len(lengths)} prompts are longer than data.max_length = {most} tokens and lose their beginning"


# -- preferences ---------------------------------------------------------------------------------------------------


def bad_pairs(name: str, role: str, rows: Sequence[Row]) -> Iterator[str]:
    """Rows of a preference whose answers are missing, or the same."""
    missing = [index for index, row in enumerate(rows) if not (_text(row.get("chosen")) and _text(row.get("rejected")))]
    same = [
        index
        for index, row in enumerate(rows)
        if index not in set(missing) and _text(row["chosen"]) == _text(row["rejected"])
    ]
    for found, what in ((missing, "lack an answer"), (same, "have the same answer twice")):
        if found:
            yield f"'{name}', {role}: {len(found)} of {len(rows)} rows {what}, the first of them row {found[0] + 1}. Drop them."


def _text(value: Any) -> str:
    """An answer's text: a text, a turn, or a list of turns."""
    if isinstance(value, Mapping):
        return _text(value.get("value") or value.get("content"))
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value[-1:])))
    return value.strip() if isinstance(value, str) else ""


def same_columns(tasks: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    """Tasks that are not sft are mixed as they are, which needs the same columns."""
    columns = {name: set(rows[0]) for name, rows in tasks.items() if rows}
    for one, other in combinations(columns, 2):
        if columns[one] != columns[other]:
            odd = ", ".join(sorted(columns[one] ^ columns[other]))
            yield f"tasks '{one}' and '{other}' cannot be mixed (replay, multitask): one of them alone has {odd}"


def refuse(mistakes: Sequence[str]) -> None:
    """One error of all mistakes; nothing without any."""
    if mistakes:
        told = list(dict.fromkeys(mistakes))
        raise UserError(
            told[0] if len(told) == 1 else f"{len(told)} mistakes before the first round:\n  " + "\n  ".join(told)
        )
