"""A file that becomes many recipes (a sequence of tasks, a comparison): values laid over each other, each with its line. No torch.

`read_values` reads the file with `key=value` laid over it; `Layered` makes recipes of its parts, so that a mistake in one of them
stands where its key does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.metrics import METRICS, kind_of
from dsfreeze.recipe import Recipe
from dsfreeze.recipe_reader import COMMAND_LINE, Draft, locate, report, resolve
from dsfreeze.recipe_yaml import Key, parse_value, parse_yaml, read_file
from dsfreeze.section_reader import dotted

#: Where in the file something stands, and what of a recipe it says.
Layer = tuple[Key, Mapping[str, Mapping[str, Any]]]
#: (place, text), as `recipe_reader.report` takes them.
Mistake = tuple[str, str]


@dataclass(frozen=True)
class Layered:
    """Where a file's keys stand. `folder` is the file's."""

    origin: str = COMMAND_LINE
    folder: Path | None = None
    where: Mapping[Key, str] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where `key` stands in the file, or what is inside it, or what is around it."""
        return Draft(self.origin, where=dict(self.where)).place(key)

    def located(self, source: str) -> str:
        """Where data that the file names lies; see `recipe_reader.locate`."""
        return locate(source, self.folder)

    def draft(self, heads: Mapping[str, tuple[Any, Key]], layers: Iterable[Layer]) -> Draft:
        """A recipe on its way: `heads`, its single values with the keys that say them, and sections laid over each other."""
        draft = Draft(self.origin, self.folder)
        for name, (value, key) in heads.items():
            draft.values[name] = value
            draft.where[(name,)] = self.place(key)
        for place, sections in layers:
            for section, values in sections.items():
                draft.values.setdefault(section, {}).update(values)
                for name in values:
                    draft.where[section, name] = self.place((*place, section, name))
        return draft

    def own_keys(
        self, holders: Iterable[tuple[Key, Any]], own: Mapping[tuple[str, str], str], who: str
    ) -> Iterator[Mistake]:
        """Keys of a recipe that the file may not give, since `who` sets them; `own` says what to write instead."""
        for place, holder in holders:
            for (section, key), instead in own.items():
                if key in (getattr(holder, section, None) or {}):
                    full = (*place, section, key)
                    yield self.place(full), f"{dotted(full)}: {who} sets it; write {instead}"

    def metric_mistake(self, key: Key, task: str, num_labels: int | None, name: str) -> Iterator[Mistake]:
        """Whether the metric at `key` is not for its task."""
        kind = kind_of(task, num_labels)
        valid = [each for each, metric in METRICS.items() if kind in metric.kinds]
        if name not in valid:
            known = "is not for this task" if name in METRICS else "does not exist"
            yield self.place(key), f"{dotted(key)}: '{name}' {known}.{did_you_mean(name, valid)}"


def checked(draft: Draft) -> Recipe:
    """The recipe; UserError with all its mistakes."""
    recipe = resolve(draft)
    if draft.mistakes:
        raise UserError(draft.report())
    return recipe


def read_values(path: Path, what: str) -> tuple[dict[str, Any], dict[Key, str], list[Mistake]]:
    """(values, where each stands, mistakes) of a YAML file; UserError when it is none."""
    document = parse_yaml(read_file(path, what), str(path))
    where = {key: f"{path}:{line}" for key, line in document.lines.items()}
    return document.values, where, [(f"{path}:{n}", f"{dotted(key)}: {text}") for key, n, text in document.mistakes]


def refuse(mistakes: Iterable[Mistake]) -> None:
    """One UserError of all of them; nothing without any."""
    found = list(mistakes)
    if found:
        raise UserError(report(found))


def override(values: dict[str, Any], where: dict[Key, str], word: str) -> list[Mistake]:
    """Lay `key=value` over plain values; its mistakes. A key inside a list is named by the element's number or name."""
    name, equals, text = word.partition("=")
    if not equals or not all(name.split(".")):
        return [(COMMAND_LINE, f"'{word}' is no override; write key=value, such as train.max_steps=3")]
    key: Key = ()
    inner: Any = values
    for part in name.split("."):
        holder, step = inner, _step(inner, part, last=len(key) + 1 == name.count(".") + 1)
        if step is None:
            return [
                (COMMAND_LINE, f"{name}: there is no '{part}' in {dotted(key) or 'the file'}.{_near(holder, part)}")
            ]
        key = (*key, step)
        inner = holder[step] if not isinstance(holder, dict) or step in holder else holder.setdefault(step, {})
    try:
        holder[key[-1]] = parse_value(text)
    except UserError as error:
        return [(COMMAND_LINE, f"{name}: {str(error).removeprefix('value:1: ')}")]
    for old in [old for old in where if old[: len(key)] == key]:
        del where[old]
    where[key] = COMMAND_LINE
    return []


def _step(holder: Any, part: str, *, last: bool) -> str | int | None:
    """The key or index that a word of an override means; None when there is no such thing."""
    if isinstance(holder, list):
        names = [each.get("name") if isinstance(each, dict) else each for each in holder]
        index = int(part) if part.isdecimal() else names.index(part) if part in names else -1
        return index if 0 <= index < len(holder) and (last or isinstance(holder[index], dict)) else None
    return part if isinstance(holder, dict) else None


def _near(holder: Any, part: str) -> str:
    names = (
        [str(each.get("name") if isinstance(each, dict) else each) for each in holder]
        if isinstance(holder, list)
        else []
    )
    return did_you_mean(part, names)
