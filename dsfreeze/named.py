"""What files that compare things have in common: named tasks and methods, seeds, lists that may be a single value. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from dsfreeze.recipe_section import Section, Seed

#: A task's score when it names no metric.
DEFAULT_METRICS = {
    "sft": "exact_match", "causal_lm": "perplexity", "seq2seq": "rouge_l", "classification": "accuracy", "tokens": "accuracy",
    "preference": "reward_accuracy",
}  # fmt: skip

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


def _checked(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"'{value}' names a folder too: letters, digits, '-', '_' and '.', the first a letter or digit"
        )
    return value


def entry(value: Any) -> Any:
    """A name alone, as the mapping it stands for."""
    return {"name": value} if isinstance(value, str) else value


def _one(value: Any) -> Any:
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


Name = Annotated[str, Field(max_length=80), AfterValidator(_checked)]
Seeds = Annotated[list[Seed], BeforeValidator(_one), Field(min_length=1)]


class Measured(Section):
    """What a score is taken on."""

    name: Name
    """Its name, in tables and as a folder."""
    task: str | None = None
    """A recipe's task; none takes the file's own."""
    data: dict[str, Any] = {}
    """`data:` of a recipe, over the file's."""
    metric: str | None = None
    """The metric whose value is the score; none takes the task's own."""


def refuse_doubles(key: str, names: Sequence[str]) -> None:
    """ValueError where two of them are the same."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{key}: the name '{twice[0]}' is given twice; every one needs its own")
