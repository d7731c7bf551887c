"""Reading a recipe: a YAML file and `key=value` overrides in, a `Recipe` out, or one error that lists every mistake.

Each mistake names its key, where it stands (file:line or the command line), what is wrong, and the nearest valid name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.recipe import Recipe, Section
from dsfreeze.recipe_reference import choices_of, item_type, sections, type_words
from dsfreeze.recipe_yaml import Key, parse_value, parse_yaml, read_file
from dsfreeze.section_reader import dotted

COMMAND_LINE = "command line"
SECTIONS: dict[Key, type[Section]] = dict(sections())
#: Keys whose text may be a path; `locate` says from where it counts.
PATHS: tuple[Key, ...] = (
    ("model", "name"), ("data", "train"), ("data", "eval"), ("freeze", "scores"), ("freeze", "mask_file"), ("zero",),
    ("train", "resume_from_checkpoint"), ("train", "output_dir"), ("analyze", "output_dir"), ("analyze", "reference"),
    ("analyze", "checkpoint"), ("analyze", "drift_from"), ("retain", "memory"), ("retain", "remember"),
)  # fmt: skip
#: Other trainers' spellings of keys, and the strategy that each implies.
PEERS: dict[Key, tuple[Key, str]] = {
    ("freeze", "lisa_activated_layers"): (("freeze", "active_layers"), "lisa"),  # LMFlow, ms-swift
    ("freeze", "lisa_n_layers"): (("freeze", "active_layers"), "lisa"),  # axolotl
    ("freeze", "lisa_step_interval"): (("freeze", "switch_every"), "lisa"),  # ms-swift, axolotl
    ("freeze", "lisa_interval_steps"): (("freeze", "switch_every"), "lisa"),  # LMFlow
    ("freeze", "badam_switch_interval"): (("freeze", "switch_every"), "badam"),  # LLaMA-Factory
    ("freeze", "badam_switch_mode"): (("freeze", "order"), "badam"),
}


@dataclass
class Draft:
    """A recipe on its way: plain values, where each key stands, and the mistakes found so far."""

    origin: str
    folder: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    where: dict[Key, str] = field(default_factory=dict)
    mistakes: dict[Key, tuple[str, str]] = field(default_factory=dict)

    def place(self, key: Key) -> str:
        """Where `key` stands, or else what is inside it, or else the section around it."""
        if key in self.where:
            return self.where[key]
        inside = (place for other, place in self.where.items() if key and other[: len(key)] == key)
        around = (self.where[key[:n]] for n in range(len(key) - 1, 0, -1) if key[:n] in self.where)
        return next(inside, next(around, self.origin))

    def blame(self, key: Key, text: str, place: str = "") -> None:
        """Note a mistake; the first one about a key is the one that is told."""
        self.mistakes.setdefault(key, (place or self.place(key), f"{dotted(key)}{': ' if key else ''}{text}"))

    def report(self) -> str:
        """Every mistake, those of the file in its order, then those of the command line."""

        return report(self.mistakes.values())


def report(mistakes: Iterable[tuple[str, str]]) -> str:
    """One message of (place, text) pairs: those of a file in its order, then those of the command line, each once."""

    def order(place: str) -> tuple[bool, int]:
        line = place.rpartition(":")[2]
        return place == COMMAND_LINE, int(line) if line.isdigit() else 0

    told = sorted(dict.fromkeys(mistakes), key=lambda mistake: order(mistake[0]))
    lines = [f"{place}: {text}" for place, text in told]
    return lines[0] if len(lines) == 1 else f"{len(lines)} mistakes:\n  " + "\n  ".join(lines)


def load_recipe(path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file (None: of nothing) with `section.key=value` overrides laid over it, the last one winning.

    Raises one UserError naming every mistake: unknown and doubled keys, wrong types, values out of range, sections that
    contradict themselves; also when there is no such file, or it is not YAML, or not a mapping.
    """
    draft = _read(path) if path is not None else Draft(COMMAND_LINE)
    for word in overrides:
        _override(draft, word)
    recipe = resolve(draft)
    if draft.mistakes:
        raise UserError(draft.report())
    return recipe


def resolve(draft: Draft) -> Recipe:
    """The recipe of a draft, or, with mistakes noted in the draft, one that is of no use."""
    _spell_out_sections(draft)
    for key in PATHS:
        _locate(draft, key)
    return _validate(draft)


def locate(text: str, folder: Path | None) -> str:
    """Where a path in a recipe leads: `~` is expanded; what exists from the current folder stays as it is; what exists
    in `folder` alone (the recipe file's) is taken from there; anything else, such as a hub id, stays."""
    text = os.path.expanduser(text)
    if folder is None or not text or os.path.isabs(text) or os.path.exists(text):
        return text
    beside = os.path.join(folder, text)
    return beside if os.path.exists(beside) else text


def _read(path: Path) -> Draft:
    document = parse_yaml(read_file(path, "recipe"), str(path))
    where = {key: f"{path}:{line}" for key, line in document.lines.items()}
    draft = Draft(str(path), path.parent, document.values, where)
    for key, line, text in document.mistakes:
        draft.blame(key, text, f"{path}:{line}")
    _rename_peers(draft)
    return draft


def _rename_peers(draft: Draft) -> None:
    """Other trainers' spellings in a file as our own; a mistake when both are there."""
    for peer, (own, strategy) in PEERS.items():
        section = draft.values.get(str(peer[0]))
        if not isinstance(section, dict) or peer[1] not in section:
            continue
        value, place = section.pop(str(peer[1])), draft.where.pop(peer, draft.origin)
        if own[1] in section:
            draft.blame(peer, f"is another spelling of {dotted(own)}, which is given too; keep one", place)
            continue
        section[str(own[1])] = value
        section.setdefault("strategy", strategy)
        draft.where[own] = place


# -- overrides -----------------------------------------------------------------------------------------------------


def _override(draft: Draft, word: str) -> None:
    name, equals, text = word.partition("=")
    key: Key = tuple(name.split("."))
    if not equals or not all(key):
        told = f"'{word}' is no override; write key=value, such as freeze.fraction=0.5"
        draft.mistakes[("", word)] = (COMMAND_LINE, told)
        return
    key, strategy = PEERS.get(key, (key, None))
    section = _section_for(draft, key[:-1])
    for old in [old for old in (*draft.where, *draft.mistakes) if old[: len(key)] == key]:
        draft.where.pop(old, None)
        draft.mistakes.pop(old, None)
    draft.where[key] = COMMAND_LINE
    if section is None:
        draft.blame(key, f"'{dotted(key[:-1])}' is a single value, not a section with keys")
        return
    try:
        section[str(key[-1])] = parse_value(text)
        if strategy is not None:
            section.setdefault("strategy", strategy)
    except UserError as error:
        draft.blame(key, str(error).removeprefix("value:1: "))


def _section_for(draft: Draft, key: Key) -> dict[str, Any] | None:
    """The mapping at `key`, made where there is none yet; None where a single value stands in the way."""
    values = draft.values
    for depth, name in enumerate(key):
        if _holds_single_value(key[: depth + 1]):
            return None
        inner = values.get(str(name))
        if key[: depth + 1] == ("model",) and isinstance(inner, str):
            inner = {"name": inner}
        if inner is None:
            inner = {}
        if not isinstance(inner, dict):
            return None
        values[str(name)] = inner
        values = inner
    return values


def _holds_single_value(key: Key) -> bool:
    if key in SECTIONS or key not in set(_all_keys()):
        return False
    annotation, metadata, _ = _declared(key)
    return type_words(annotation, metadata) != "a mapping"


def _spell_out_sections(draft: Draft) -> None:
    """`model: NAME` as a section; a section left empty (`data:`) as one with nothing in it."""
    if isinstance(draft.values.get("model"), str):
        draft.values["model"] = {"name": draft.values["model"]}
    for key in SECTIONS:
        if len(key) == 1 and key[0] in draft.values and draft.values[str(key[0])] is None:
            draft.values[str(key[0])] = {}


def _locate(draft: Draft, key: Key) -> None:
    holder: Any = draft.values
    for name in key[:-1]:
        holder = holder.get(name) if isinstance(holder, dict) else None
    text = holder.get(key[-1]) if isinstance(holder, dict) else None
    if not isinstance(text, str):
        return
    from_file = draft.place(key) != COMMAND_LINE and key[-1] != "output_dir"
    # a bare word is a listed model or ds_config before it is a file beside the recipe
    bare = (
        key in (("model", "name"), ("analyze", "reference"), ("zero",))
        and "/" not in text
        and not text.endswith((".json", ".gguf"))
    )
    holder[key[-1]] = locate(text, draft.folder if from_file and not bare else None)


# -- checking ------------------------------------------------------------------------------------------------------


def _validate(draft: Draft) -> Recipe:
    """The recipe, or with mistakes noted one that is of no use: what is wrong is taken out and the rest looked at
    again, since keys that contradict each other are only seen once each of them is right in itself."""
    values, removed = _copy(draft.values), set[Key]()
    while True:
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            before = frozenset(removed)
            for problem in error.errors(include_url=False):
                key = _key(problem["loc"])
                if not _follows_from(before, key, problem):
                    draft.blame(key, _wording(key, problem))
                if problem["type"] == "missing":
                    _put(values, key, "missing")
                else:
                    _drop(values, key)
                removed.add(key)


def _follows_from(removed: frozenset[Key], key: Key, problem: Any) -> bool:
    """Whether a mistake appeared only because a wrong value was taken out before: one inside `key`, or one (such as
    freeze.strategy or task) that `key` is said not to go with."""

    def blames(gone: Key) -> bool:
        return str(gone[-1]) in problem["msg"] if gone[: len(key)] == key else dotted(gone) in problem["msg"]

    return any(gone == key or blames(gone) for gone in removed)


def _wording(key: Key, problem: Any) -> str:
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return _unknown_key(key)
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    annotation, metadata, meaning = _declared(key)
    if kind == "missing":
        return f"is missing. {meaning}"
    if kind == "model_type":
        keys = ", ".join(SECTIONS[_plain(key)].model_fields)
        return f"is {_shown(value)}; it is a section with the keys {keys}"
    if kind == "literal_error":
        space = " A colon is followed by a space." if ":" in str(value) else ""
        return f"is {_shown(value)}.{space}{did_you_mean(str(value), choices_of(annotation))}"
    if isinstance(key[-1], int):
        annotation, metadata = item_type(annotation), []
    words = type_words(annotation, metadata)
    quotes = f"; write it in quotes: '{value}'" if words == "text" and isinstance(value, int | float) else ""
    return f"is {_shown(value)}; it takes {words}{quotes}. {meaning}"


def _unknown_key(key: Key) -> str:
    name, parent = str(key[-1]), _plain(key[:-1])
    if tuple(name.split(".")) in _all_keys():
        first, _, rest = name.partition(".")
        return f"dots join sections on the command line alone; in a file write {rest} under {first}:"
    elsewhere = [dotted(other) for other in _all_keys() if other[-1] == name]
    if elsewhere:
        return f"unknown key here. Did you mean '{elsewhere[0]}'?"
    valid = list(SECTIONS[parent].model_fields)
    near = did_you_mean(name, valid, how_many_listed=0)
    return f"unknown key.{near or did_you_mean(name, valid, how_many_listed=len(valid))}"


def _all_keys() -> Iterator[Key]:
    return ((*key, name) for key, section in SECTIONS.items() for name in section.model_fields)


def _declared(key: Key) -> tuple[Any, list[Any], str]:
    """Annotation, bounds and meaning of the field at `key` (of the list, for one of its items)."""
    plain = _plain(key)
    info = SECTIONS[plain[:-1]].model_fields[str(plain[-1])]
    return info.annotation, info.metadata, " ".join((info.description or "").split())


def _key(location: tuple[str | int, ...]) -> Key:
    """A pydantic location without what it adds for unions: sections, the field, then list indices."""
    key: Key = ()
    for item in location:
        if key in SECTIONS or isinstance(item, int):
            key = (*key, item)
    return key


def _plain(key: Key) -> Key:
    return tuple(item for item in key if not isinstance(item, int))


def _shown(value: Any) -> str:
    text = "empty (null)" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _copy(value: Any) -> Any:
    return {name: _copy(inner) for name, inner in value.items()} if isinstance(value, dict) else value


def _put(values: dict[str, Any], key: Key, value: Any) -> None:
    for item in key[:-1]:
        values = values.setdefault(str(item), {})
    values[str(key[-1])] = value


def _drop(values: dict[str, Any], key: Key) -> None:
    """Take out the field at `key`; a wrong item takes its whole list with it."""
    *path, last = _plain(key)
    for item in path:
        values = values.get(str(item), {})
    values.pop(str(last), None)
