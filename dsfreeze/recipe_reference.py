"""The reference of every recipe key, written from the models in recipe.py and recipe_freeze.py.

    python -m dsfreeze.recipe_reference > docs/recipe.md

A test holds docs/recipe.md to what this prints. `type_words` also words the errors of a wrong value.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
from pydantic.fields import FieldInfo

from dsfreeze.recipe import Recipe, Section
from dsfreeze.recipe_yaml import Key, dump_yaml

_WORDS = {
    int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path", dict: "a mapping",
}  # fmt: skip
_LOWER = {annotated_types.Ge: ("ge", "from {} up", "from {}"), annotated_types.Gt: ("gt", "above {}", "above {}")}
_UPPER = {annotated_types.Le: ("le", "to {}"), annotated_types.Lt: ("lt", "to below {}")}

_INTRODUCTION = """# Recipe keys

A recipe is a YAML file; `dsfreeze train recipe.yaml freeze.fraction=0.75` overrides one value, and every command works
from overrides alone (`dsfreeze plan model=... freeze.strategy=top`). A value on the command line is a text, a number
or a YAML list or mapping in brackets; the last one wins. Every mistake is reported at once, with its line and the
nearest valid name.

- Paths (model, data, `freeze.scores`, `zero`, `train.resume_from_checkpoint`) count from the current folder; what is
  not there but is beside the recipe file is taken from there. `~` is the home folder. Hub ids stay as they are.
  `train.output_dir` always counts from the current folder.
- Scalars follow YAML 1.2: `5e-5` is a number, `no` is a text (and still means false where true or false is asked for).
- A default of none is written `null`.
- A list of texts may be written as a single text. `model: NAME` is short for `model: {name: NAME}`.

This page is written from the code: `python -m dsfreeze.recipe_reference > docs/recipe.md`.
"""


def recipe_reference() -> str:
    """Markdown of every key with its type, default and meaning."""
    parts = [_INTRODUCTION]
    for key, section in sections():
        title = f"`{'.'.join(map(str, key))}:`" if key else "Top level"
        parts += [f"## {title}\n", f"{_one_line(section.__doc__)}\n", _table(_rows(section))]
    return "\n".join(parts).rstrip() + "\n"


def sections(section: type[Section] = Recipe, key: Key = ()) -> Iterator[tuple[Key, type[Section]]]:
    """Every section with its key, the recipe itself (key `()`) first."""
    yield key, section
    for name, info in section.model_fields.items():
        if (inner := _section(info.annotation)) is not None:
            yield from sections(inner, (*key, name))


def type_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """What a key takes, in words: "a number from 0 to 1", "one of lora, dora", "a list of text". None is left out."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *extra = typing.get_args(annotation)
        inner = [item for one in extra for item in (one.metadata if isinstance(one, FieldInfo) else [one])]
        return type_words(base, [*inner, *metadata])
    if origin in (typing.Union, types.UnionType):
        arguments = (arg for arg in typing.get_args(annotation) if arg is not types.NoneType)
        return ", or ".join(type_words(arg, metadata) for arg in arguments)
    if origin is Literal:
        choices = choices_of(annotation)
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if origin is list:
        inner_words = type_words(typing.get_args(annotation)[0])
        return "a list of texts" if inner_words == "text" else f"a list of {inner_words.removeprefix('one of ')}"
    if _section(annotation) is not None:
        return "a section"
    return _WORDS[origin or annotation] + _bounds(metadata)


def choices_of(annotation: Any) -> list[str]:
    """The values of every Literal inside an annotation, in order."""
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return [choice for arg in typing.get_args(annotation) for choice in choices_of(arg)]


def item_type(annotation: Any) -> Any:
    """The type of a list's items, the list standing anywhere inside the annotation."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is list:
        return arguments[0]
    return next((found for arg in arguments if (found := item_type(arg)) is not None), None)


def _section(annotation: Any) -> type[Section] | None:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def _bounds(metadata: Iterable[Any]) -> str:
    lower = upper = ""
    items = list(metadata)
    for item in items:
        if type(item) in _UPPER:
            attribute, words = _UPPER[type(item)]
            upper = " " + words.format(_number(getattr(item, attribute)))
    for item in items:
        if type(item) in _LOWER:
            attribute, alone, paired = _LOWER[type(item)]
            lower = " " + (paired if upper else alone).format(_number(getattr(item, attribute)))
    return lower + upper


def _number(value: Any) -> str:
    return "2^32" if value == 2**32 else f"{value:g}"


def _table(rows: Iterable[tuple[str, str, str, str]]) -> str:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {takes} | {default} | {meaning} |" for name, takes, default, meaning in rows]
    return "\n".join(lines) + "\n"


def _rows(section: type[Section]) -> Iterator[tuple[str, str, str, str]]:
    for name, info in section.model_fields.items():
        yield name, type_words(info.annotation, info.metadata), _default(info), _one_line(info.description)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if info.default is None:
        return "none"
    if isinstance(info.default, Section):
        return "its defaults"
    value = str(info.default) if isinstance(info.default, Path) else info.default
    text = dump_yaml({"value": value}).removeprefix("value:").strip()
    return f"`{', '.join(map(str, value))}`" if isinstance(value, list) and value else f"`{text}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", r"\|")


if __name__ == "__main__":
    print(recipe_reference(), end="")
