"""What pydantic finds wrong with a file of sections, in words: place, key, mistake, nearest valid name. No torch.

For files that are no recipe (studies, sequences of tasks); a recipe has a reader of its own, which knows more of its keys.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dsfreeze.errors import did_you_mean
from dsfreeze.recipe_section import Section
from dsfreeze.recipe_yaml import Key


def problems(
    root: type[Section], error: ValidationError, where: Mapping[Key, str], origin: str
) -> list[tuple[str, str]]:
    """(place, wording) of every problem; `where` has the places of keys, `origin` stands for all others."""
    return [_told(root, problem, where, origin) for problem in error.errors(include_url=False)]


def _told(root: type[Section], problem: Any, where: Mapping[Key, str], origin: str) -> tuple[str, str]:
    key: Key = tuple(problem["loc"])
    place = next((where[key[:n]] for n in range(len(key), 0, -1) if key[:n] in where), origin)
    return place, f"{dotted(key)} {_wording(root, key, problem)}".lstrip()


def _wording(root: type[Section], key: Key, problem: Any) -> str:
    kind, name = problem["type"], str(key[-1]) if key else ""
    section = section_at(root, key[:-1])
    if kind == "extra_forbidden":
        return "is an unknown key." + did_you_mean(name, section.model_fields)
    if kind == "missing":
        return f"is missing. {' '.join((section.model_fields[name].description or '').split())}"
    if kind == "literal_error" and isinstance(problem["input"], str):
        choices = [word.strip("'") for word in problem["ctx"]["expected"].replace(" or ", ", ").split(", ")]
        return f"is '{problem['input']}'.{did_you_mean(problem['input'], choices, how_many_listed=40)}"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    return f"is {problem['input']!r:.80}: {problem['msg'].lower()}"


def section_at(root: type[Section], key: Key) -> type[Section]:
    """The section that holds what stands at `key`: the deepest one on the way."""
    section = root
    for name in key:
        field = section.model_fields.get(str(name))
        section = next(_sections(field.annotation), section) if field else section
    return section


def _sections(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections(argument)


def dotted(key: Key) -> str:
    """A key as people write it: `tasks[0].data.train`."""
    return "".join(f"[{item}]" if isinstance(item, int) else f".{item}" for item in key).lstrip(".")
