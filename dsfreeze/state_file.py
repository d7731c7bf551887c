"""A results file that a stopped command goes on from: read, written, and held against what is asked for now. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.files import write_whole
from dsfreeze.record import read_object

State = dict[str, Any]


def read_state(path: Path, format_version: int, writer: str) -> State:
    """The file; UserError when there is none, or it is no such file. `writer` is the command that writes it."""
    if not path.exists():
        raise UserError(f"There are no results {path}; `{writer}` writes them.")
    value = read_object(path)
    if value.get("format_version") != format_version:
        raise UserError(f"{path} holds no results of this version's format ({format_version}).")
    return value


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Aside, then renamed; UserError when the disk refuses."""
    try:
        write_whole(path, json.dumps(state, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror}. Free disk space, and run the same command again."
        ) from None


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], free: Sequence[str], named: Sequence[str] = ()
) -> Iterator[str]:
    """Keys whose values differ, with both. `free` ones may; of those in `named`, lists of mappings with names, what has one name is
    compared."""
    for key in dict.fromkeys((*old, *new)):
        if key not in free and old.get(key) != new.get(key):
            yield from _inside(key, old.get(key), new.get(key))
    for group in named:
        theirs = {each["name"]: each for each in old.get(group, [])}
        for each in new.get(group, []):
            if each["name"] in theirs and theirs[each["name"]] != each:
                yield from _inside(f"{group}.{each['name']}", theirs[each["name"]], each)


def _inside(key: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys((*old, *new)):
            if old.get(name) != new.get(name):
                yield from _inside(f"{key}.{name}", old.get(name), new.get(name))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (one, other) in enumerate(zip(old, new, strict=True)):
            if one != other:
                yield from _inside(f"{key}[{index}]", one, other)
    else:
        yield f"{key} ({_shown(old)} there, {_shown(new)} here)"


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
