"""Before the first round: every task rendered, everything checked that needs no model. One error lists all that is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsfreeze.continual.checks import bad_pairs, clashes, fitted, refuse, same_columns, wording
from dsfreeze.continual.reading import Course
from dsfreeze.continual.rendering import Rendered, Row, render
from dsfreeze.continual.spec import Measured, ProbeSpec
from dsfreeze.data.rendering import PLAIN_TEMPLATE
from dsfreeze.errors import UserError
from dsfreeze.model import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(course: Course) -> dict[str, dict[str, Any]]:
    """Every task's and probe's files by name, as plain values (one process's work)."""
    spec = course.spec
    found: dict[str, Rendered] = {}
    rows: dict[str, dict[str, list[Row]]] = {}
    mistakes: list[str] = []
    for measured in (*spec.sequence, *spec.probes):
        what = "probes" if isinstance(measured, ProbeSpec) else "tasks"
        recipe = course.measure_recipe(measured)
        try:
            found[measured.name], rows[measured.name] = render(course, measured, recipe, spec.output_dir / what)
        except UserError as error:
            mistakes.append(f"{what[:-1]} '{measured.name}': {error}")
    trained = {task.name: rows[task.name].get("train", []) for task in spec.sequence if task.name in rows}
    mistakes += clashes([wording(name, each) for name, each in trained.items() if found[name].task == "sft"])
    mistakes += _pairs(found, rows)
    if _mixes(course):
        mistakes += same_columns({name: each for name, each in trained.items() if found[name].task != "sft"})
    found, too_long = _fit(course, found, rows)
    refuse([*mistakes, *too_long])
    return {name: each.plain() for name, each in found.items()}


def _mixes(course: Course) -> bool:
    return any(method.kind.rows != "own" or method.replay for method in course.spec.methods)


def _pairs(found: dict[str, Rendered], rows: dict[str, dict[str, list[Row]]]) -> list[str]:
    return [
        told
        for name, each in found.items()
        if each.task == "preference"
        for role, these in rows[name].items()
        for told in bad_pairs(name, role, these)
    ]


def _fit(
    course: Course, found: dict[str, Rendered], rows: dict[str, dict[str, list[Row]]]
) -> tuple[dict[str, Rendered], list[str]]:
    """The sft tasks with their notes and the length of their answers; what does not fit."""
    spec, mistakes = course.spec, list[str]()
    tokenizer: PreTrainedTokenizerBase | None = None
    for measured in (*spec.sequence, *spec.probes):
        if measured.name not in found or found[measured.name].task != "sft":
            continue
        recipe = course.measure_recipe(measured)
        if tokenizer is None:
            tokenizer = load_tokenizer(recipe.model)
            tokenizer.chat_template = tokenizer.chat_template or PLAIN_TEMPLATE
        found[measured.name], told = fitted(
            found[measured.name], rows[measured.name], recipe, tokenizer, cut=spec.long_answers == "cut", given=_given(course, measured)
        )  # fmt: skip
        mistakes += told
    return found, mistakes


def _given(course: Course, measured: Measured) -> bool:
    return "max_new_tokens" in {**course.spec.data, **measured.data}
