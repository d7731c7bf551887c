"""Patterns: name what trains, by globs on whole path components, or in the spellings of other trainers.

`layers.1.*` never means `layers.10`. A pattern matches a tensor when its components are a contiguous run of the
tensor's path (or of a tied name), or of the layer's name followed by the path below it, so that `layers.3` and
`head` work whatever the architecture calls them. A pattern whose first component is `layers` always counts the
layers of the anatomy, from the first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.ends import is_task_head, tied_head

_ROW_RANGE = re.compile(r"\[\s*-?\d*\s*:\s*-?\d*\s*\]\s*\$?$")
_LITERAL_DOT = re.compile(r"(?<!\\)\.(?![*+?{])")


@dataclass(frozen=True)
class View:
    """One way to spell a tensor's path; `anchored` marks the spelling that starts with the name of its layer."""

    tensor: str
    parts: tuple[str, ...]
    anchored: bool


def matched_by_options(anatomy: Anatomy, options: FreezeOptions) -> tuple[frozenset[str], tuple[str, ...]]:
    """The tensors that the options' patterns train, with notes; UserError for a pattern that matches nothing."""
    everything = frozenset(t.name for t in anatomy.tensors)
    named, notes = _named(anatomy, options)
    trainable = everything if named is None else named
    frozen = match_globs(anatomy, options.frozen or (), "freeze.frozen")
    head = frozenset(t.name for layer in anatomy.layers if layer.name == "head" for t in layer.tensors)
    if is_task_head(anatomy) and not head & (trainable | frozen) and options.head == "auto":
        trainable |= head
        notes += ("the task's new head trains too; freeze.head=freeze would keep its random start",)
    return trainable - frozen, notes


def _named(anatomy: Anatomy, options: FreezeOptions) -> tuple[frozenset[str] | None, tuple[str, ...]]:
    """The union of what the options name to train; None when they name nothing but what is frozen."""
    notes: tuple[str, ...] = ()
    sets = []
    if options.trainable is not None:
        sets.append(match_globs(anatomy, options.trainable, "freeze.trainable"))
    if options.unfrozen_parameters is not None:
        found, notes = match_regexes(anatomy, options.unfrozen_parameters)
        sets.append(found)
    if options.freeze_trainable_layers is not None:
        sets.append(_outer_layers(anatomy, options.freeze_trainable_layers))
    return (frozenset().union(*sets) if sets else None), notes


def match_globs(anatomy: Anatomy, patterns: Sequence[str], option: str) -> frozenset[str]:
    """Names of the tensors that any of the globs matches; `option` is the recipe key that messages name."""
    views = list(_views(anatomy))
    found: set[str] = set()
    for pattern in patterns:
        parts = _components(pattern, option)
        hits = {view.tensor for view in views if _matches(parts, view)}
        if not hits:
            raise UserError(_nothing(option, pattern, anatomy, _runs(views, len(parts))))
        found |= hits
    return frozenset(found)


def match_regexes(anatomy: Anatomy, patterns: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Spectrum's and axolotl's `unfrozen_parameters`: regular expressions from the start of a name.

    As there, a dot is a dot unless a quantifier follows it, and nothing but `$` anchors the end: a note says so where
    a pattern stopped inside a number.
    """
    found: set[str] = set()
    notes = []
    for pattern in patterns:
        match = _compiled(pattern)
        hits = {name: hit for name in anatomy.by_name if (hit := match(name))}
        if not hits:
            names = dict.fromkeys(run for view in _views(anatomy) if not view.anchored for run in _heads(view.parts))
            raise UserError(_nothing("freeze.unfrozen_parameters", pattern, anatomy, names, plain=_plain(pattern)))
        found |= {anatomy.by_name[name].name for name in hits}
        cut = [name for name, hit in hits.items() if re.match(r".*\d$", hit[0]) and name[hit.end() :][:1].isdigit()]
        if cut:
            notes.append(f"'{pattern}' also matches {cut[0]}: end it with '\\.' to mean whole numbers")
    return frozenset(found), tuple(notes)


def _outer_layers(anatomy: Anatomy, number: int) -> frozenset[str]:
    """LLaMA-Factory's `freeze_trainable_layers`: the last n layers, or the first -n."""
    depth = len(anatomy.blocks)
    if number == 0 or abs(number) > depth:
        raise UserError(
            f"freeze.freeze_trainable_layers is {number}, but {anatomy.name} has {depth} layers. "
            f"Write 1 to {depth} for the last layers, -1 to -{depth} for the first."
        )
    chosen = anatomy.blocks[-number:] if number > 0 else anatomy.blocks[:-number]
    return frozenset(t.name for layer in chosen for t in layer.tensors)


def _views(anatomy: Anatomy) -> Iterator[View]:
    tied = tied_head(anatomy)
    for layer in anatomy.layers:
        for tensor in layer.tensors:
            for name in (tensor.name, *tensor.aliases):
                yield View(tensor.name, tuple(name.split(".")), False)
            below = tensor.name.removeprefix(layer.path + ".") if layer.path else tensor.name
            yield View(tensor.name, (*layer.name.split("."), *below.split(".")), True)
            if tensor is tied:
                other = "embed" if layer.name == "head" else "head"
                yield from (View(tensor.name, (other, *name.split(".")), True) for name in tensor.aliases)


def _components(pattern: str, option: str) -> tuple[str, ...]:
    parts = tuple(pattern.split("."))
    if not all(parts):
        raise UserError(f"{option}: '{pattern}' has an empty component. Components are separated by single dots.")
    for part in parts:
        if part.count("[") != part.count("]") or "[]" in part or "[!]" in part:
            raise UserError(f"{option}: '{pattern}' has an unfinished bracket in '{part}'. Write [0-3] or [abc].")
    return parts


def _matches(parts: tuple[str, ...], view: View) -> bool:
    width = len(parts)
    if parts[0] == "layers":
        return view.anchored and view.parts[0] == "layers" and _same(parts, view.parts[:width])
    return any(_same(parts, view.parts[start : start + width]) for start in range(len(view.parts) - width + 1))


def _same(parts: tuple[str, ...], names: tuple[str, ...]) -> bool:
    return len(parts) == len(names) and all(fnmatchcase(name, part) for name, part in zip(names, parts, strict=True))


def _compiled(pattern: str) -> Callable[[str], re.Match[str] | None]:
    if _ROW_RANGE.search(pattern):
        raise UserError(
            f"freeze.unfrozen_parameters: '{pattern}' asks for rows of a matrix. Rows cannot train alone here: zeroed "
            "gradients still let weight decay and momentum move the other rows, and ZeRO keeps state for all of them. "
            "Drop the [a:b] to train the whole matrix."
        )
    try:
        return re.compile(_LITERAL_DOT.sub(r"\\.", pattern)).match
    except re.error as error:
        raise UserError(f"freeze.unfrozen_parameters: '{pattern}' is not a regular expression: {error}.") from None


def _plain(pattern: str) -> str:
    return pattern.replace("\\", "").strip("^$")


def _runs(views: Sequence[View], width: int) -> dict[str, None]:
    """Every contiguous run of `width` components, once each: what a pattern of that width could have meant."""
    return dict.fromkeys(
        ".".join(view.parts[start : start + width]) for view in views for start in range(len(view.parts) - width + 1)
    )


def _heads(parts: tuple[str, ...]) -> Iterator[str]:
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _nothing(option: str, pattern: str, anatomy: Anatomy, names: dict[str, None], plain: str | None = None) -> str:
    depth = len(anatomy.blocks)
    numbered = f" The layers are layers.0 to layers.{depth - 1}." if depth and "layers." in pattern else ""
    hint = did_you_mean(plain or pattern, names, how_many_listed=0)
    return f"{option}: '{pattern}' matches no tensor of {anatomy.name}.{hint}{numbered}"
