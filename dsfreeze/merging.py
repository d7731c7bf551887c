"""Models made of models, weight by weight, without training: the controls that selective tuning is held against.

    interpolate   (1 - alpha) start + alpha end       WiSE-FT, arXiv 2109.01903
    average       the members' mean                   model soups, arXiv 2203.05482
    reset         start's values in some tensors, end's in the others      Half-Reset, arXiv 2404.18466

In go model folders whose safetensors hold the same tensors by name, shape and dtype; out comes such a folder: the last one's config and
tokenizer, its weight files' layout, and a note of what was done. Tensors pass one at a time, read from every member and written where
the last one has them, so memory holds a tensor of each member and never a model. Arithmetic is in float64, in float32 for 16-bit
weights, and rounded once; what is equal in all members keeps its bits.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from dsfreeze.engine.masks import Bits, make_masks
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.export import MERGED, PLAN, written_aside
from dsfreeze.files import parse_json, sha256_of
from dsfreeze.model import anatomy_of
from dsfreeze.recipe import Recipe
from dsfreeze.strategies import make_plan

INDEX = "model.safetensors.index.json"
#: What is copied of a model's folder beside its weights: configurations and tokenizers, no code and no pickles.
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: What one tensor becomes: its name and its values in every member, in the order that they were given in.
Rule = Callable[[str, Sequence[torch.Tensor]], torch.Tensor]


def interpolate(start: Path, end: Path, alpha: float, out: Path) -> Path:
    """(1 - alpha) start + alpha end; alpha 0 and 1 give the two to the last bit. Returns `out`."""
    if not 0 <= alpha <= 1:
        raise UserError(f"alpha is {alpha}; it lies from 0 (the start) to 1 (the end).")

    def between(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        if alpha in (0, 1):  # 0 x infinity is no number, and -0 + 0 is not -0
            return values[int(alpha)]
        return _mixed(name, values, (1 - alpha, alpha))

    return _merge([start, end], out, between, {"how": "interpolate", "alpha": alpha})


def average(folders: Sequence[Path], out: Path) -> Path:
    """The mean of two or more models (a uniform soup). Returns `out`."""
    if len(folders) < 2:
        raise UserError("An average takes two models or more.")
    shares = [1 / len(folders)] * len(folders)
    return _merge(folders, out, lambda name, values: _mixed(name, values, shares), {"how": "average"})


def greedy_soup(members: Mapping[str, float], score_of: Callable[[Sequence[str]], float]) -> tuple[str, ...]:
    """The members of a greedy soup, best first: from the best on, each joins if the score of the mean of all does not fall.

    `members`: each one's score on held-out data, higher is better; `score_of`: that of the mean of some of them (recipe 1 of arXiv
    2203.05482, whose >= this is; the authors' code asks for >). Ties of `members` are taken in the order given.
    """
    if not members:
        raise UserError("A soup needs members; give each one's score.")
    ordered = sorted(members, key=lambda name: -members[name])
    chosen, best = ordered[:1], members[ordered[0]]
    for name in ordered[1:]:
        score = score_of([*chosen, name])
        if score >= best:
            chosen, best = [*chosen, name], score
    return tuple(chosen)


def reset(
    start: Path, end: Path, names: Collection[str], out: Path, masks: Mapping[str, Bits] | None = None, **told: Any
) -> Path:
    """`end` with the named tensors as they are in `start`; of tensors in `masks` the elements that do not train are. Returns `out`.

    `told` goes into the note of what was done.
    """
    masks = masks or {}
    known = _Model.read(end).names
    absent = sorted({*names, *masks} - known.keys())
    if absent:
        raise UserError(f"{end} has no tensor '{absent[0]}' to reset.{did_you_mean(absent[0], known)}")
    chosen = frozenset(names)

    def partly(name: str, values: Sequence[torch.Tensor]) -> torch.Tensor:
        if name in chosen:
            return values[0]
        return torch.where(masks[name].whole(), values[1], values[0]) if name in masks else values[1]

    return _merge(
        [start, end], out, partly, {"how": "reset", "tensors": sorted(chosen), "masked": sorted(masks), **told}
    )


def reset_frozen(start: Path, end: Path, recipe: Recipe, out: Path) -> Path:
    """`end` with everything as in `start` that the recipe's plan freezes in its first phase: with freeze.strategy=half, Half-Reset.

    The recipe's task tells which head the folders' models have. Returns `out`.
    """
    options = recipe.model.model_copy(update={"name": str(end)})
    anatomy = anatomy_of(options, recipe.task, _num_labels(end))
    plan = make_plan(anatomy, recipe.freeze)
    if plan.adapter is not None:
        raise UserError("A reset chooses among the models' own tensors. Leave out freeze.adapter.")
    known = _Model.read(end).names
    stored = {t.name: next((n for n in (t.name, *t.aliases) if n in known), t.name) for t in anatomy.tensors}
    trained = set(plan.phases[0].trainable)
    masks = {stored[name]: bits for name, bits in make_masks(plan, anatomy).items() if name in trained}
    frozen = [stored[t.name] for t in anatomy.tensors if t.name not in trained]
    return reset(start, end, frozen, out, masks, plan=json.loads(plan.to_json()))


def _num_labels(folder: Path) -> int | None:
    labels = _read_json(folder / "config.json").get("id2label")
    return len(labels) if isinstance(labels, dict) else None


def _mixed(name: str, values: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """The weighted sum, in the values' dtype."""
    first = values[0]
    if all(torch.equal(first, other) for other in values[1:]):
        return first
    if first.dtype not in FLOATS:
        raise UserError(
            f"'{name}' has {first.dtype} and differs between the models: there is nothing between its values."
        )
    wide = torch.float32 if first.itemsize == 2 else torch.float64
    total, same = torch.zeros(first.shape, dtype=wide), torch.ones(first.shape, dtype=torch.bool)
    for value, share in zip(values, shares, strict=True):
        total.add_(value.to(wide), alpha=share)
        same &= value == first
    return torch.where(same, first, total.to(first.dtype))


# -- folders -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Model:
    """A model folder's weights: which file holds which tensor, of what shape and dtype."""

    folder: Path
    names: dict[str, tuple[str, tuple[int, ...], str]]  # file, shape, dtype as safetensors spells it

    @classmethod
    def read(cls, folder: Path) -> _Model:
        """UserError unless the folder is a model's, with weights in safetensors."""
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder} is no model folder: it has no config.json. A run's exported model is in RUN/model."
            )
        names: dict[str, tuple[str, tuple[int, ...], str]] = {}
        for file in _files(folder):
            with _opened(folder / file) as content:
                for name in content.keys():  # noqa: SIM118 (it is no mapping)
                    part = content.get_slice(name)
                    names[name] = (file, tuple(part.get_shape()), part.get_dtype())
        return cls(folder, names)

    def require_like(self, other: _Model) -> None:
        """UserError where the two do not hold the same tensors."""
        odd = sorted(self.names.keys() ^ other.names.keys())
        if odd:
            has, lacks = (self, other) if odd[0] in self.names else (other, self)
            raise UserError(
                f"{has.folder} holds '{odd[0]}' and {lacks.folder} does not ({len(odd)} such tensors). Merge models of one "
                "architecture and one head, each written by save_pretrained."
            )
        for name, (_, *kind) in self.names.items():
            theirs = other.names[name][1:]
            if tuple(kind) != theirs:
                raise UserError(
                    f"'{name}' is {kind[1]} {list(kind[0])} in {self.folder} and {theirs[1]} {list(theirs[0])} in "
                    f"{other.folder}. Merge models of one size, written in one dtype."
                )


def _files(folder: Path) -> list[str]:
    """The names of a folder's weight files."""
    if not (folder / INDEX).is_file():
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"{folder} has no model.safetensors and no {INDEX}. Write it again with save_pretrained.")
        return ["model.safetensors"]
    files = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not files or any(Path(str(name)).name != name for name in files.values()):
        raise UserError(f"{folder / INDEX} does not say which file holds which tensor. Write the model again.")
    return sorted(set(files.values()))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    return content if isinstance(content, dict) else {}


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing, truncated or corrupt ({error}). Fetch or export it again.") from None


def _merge(folders: Sequence[Path], out: Path, rule: Rule, told: Mapping[str, Any]) -> Path:
    """Write `out`, laid out as the last of the folders; on one process."""
    models = [_Model.read(Path(folder)) for folder in folders]
    if out.resolve() in [model.folder.resolve() for model in models]:
        raise UserError(f"{out} is one of the models that are merged; name another folder.")
    for other in models[:-1]:
        other.require_like(models[-1])
    folder = models[-1].folder
    with written_aside(out) as aside, ExitStack() as stack:
        opened = [{f: stack.enter_context(_opened(m.folder / f)) for f in _files(m.folder)} for m in models]

        def values_of(name: str) -> list[torch.Tensor]:
            return [files[m.names[name][0]].get_tensor(name) for m, files in zip(models, opened, strict=True)]

        for file in _files(folder):
            _rewrite(folder / file, aside / file, lambda name: rule(name, values_of(name)))
        _copy_rest(folder, aside)
        members = [
            {"folder": m.folder.name, "sha256": {f: sha256_of(m.folder / f) for f in _files(m.folder)}} for m in models
        ]
        (aside / MERGED).write_text(json.dumps({**told, "members": members}, indent=1), encoding="utf-8")
    return out


def _rewrite(source: Path, target: Path, make: Callable[[str], torch.Tensor]) -> None:
    """A safetensors file with the header of another and the tensors that `make` gives by name, one after the other."""
    with source.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
    entries = {name: entry for name, entry in parse_json(header).items() if name != "__metadata__"}
    with target.open("wb") as file:
        file.write(size + header)
        for name in sorted(entries, key=lambda name: entries[name]["data_offsets"]):
            _append(file, make(name), entries[name]["data_offsets"])


def _append(file: IO[bytes], tensor: torch.Tensor, offsets: Sequence[int]) -> None:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    assert len(content) == offsets[1] - offsets[0], "the rules keep shape and dtype"
    file.write(content)


def _copy_rest(folder: Path, aside: Path) -> None:
    for file in folder.iterdir():
        if file.is_file() and file.suffix in COPIED and file.name not in (PLAN, MERGED):
            shutil.copyfile(file, aside / file.name)
