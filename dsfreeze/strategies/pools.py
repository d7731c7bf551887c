"""What half fine-tuning draws from: of each layer the matrices of its attention, those of its feed-forward, and its norms.

A part is what is drawn as one. A fused matrix is as many parts as it holds matrices, each some of its outputs; several tensors of
one kind (latent attention's two q, the experts of a layer) are one part; a bias goes with its matrix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from dsfreeze.anatomy import ATTENTION, FUSED, MLP, Anatomy, Layer, Tensor
from dsfreeze.errors import UserError
from dsfreeze.plan import Mask
from dsfreeze.strategies.selection import Unit, matrices_of

#: Kinds of pools, as they are told.
ATTENTION_POOL, MLP_POOL, NORM_POOL = "attention", "feed-forward", "norms"


@dataclass(frozen=True)
class Piece:
    """A tensor, or those outputs of a fused one that lie in `rows`, blocks [first, last)."""

    tensor: Tensor
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def numel(self) -> int:
        chosen = sum(last - first for first, last in self.rows) if self.rows else self.tensor.outputs
        return self.tensor.numel // self.tensor.outputs * chosen


@dataclass(frozen=True)
class Part:
    """What trains or freezes as one; `scored` are the names under which a file may score it."""

    name: str
    category: str
    pieces: tuple[Piece, ...]
    scored: tuple[str, ...]

    @property
    def numel(self) -> int:
        """Without biases, which only follow."""
        return sum(piece.numel for piece in self.pieces if not piece.tensor.is_bias)

    @property
    def is_packed(self) -> bool:
        """Whether it is two matrices that cannot be drawn apart: gate and up of experts in one tensor."""
        return self.category in FUSED


@dataclass(frozen=True)
class Pool:
    """Parts of one kind in one layer, among which half is drawn."""

    kind: str
    parts: tuple[Part, ...]

    @property
    def is_uneven(self) -> bool:
        """Whether one layer trains more of it and another less, for half of it is no whole number; norms are rounded down."""
        return self.kind != NORM_POOL and (len(self.parts) % 2 == 1 or any(part.is_packed for part in self.parts))


def whole(layer: Layer) -> Part:
    """A layer as one part."""
    return Part(layer.name, "layer", tuple(map(Piece, layer.tensors)), (layer.name,))


def pools_of(layer: Layer, anatomy: Anatomy) -> list[Pool]:
    """The layer's pools; UserError for a fused matrix of which nobody knows which outputs are whose. What is in none of them (a
    router, a matrix that no rule knows) is `beside`."""
    units = list(matrices_of(layer))
    pools = []
    for kind, categories, anchor in ((ATTENTION_POOL, ATTENTION, "o"), (MLP_POOL, MLP, "down")):
        pools += [Pool(kind, _parts(own, anatomy)) for own in _modules(units, categories, anchor)]
    norms = [unit for category, unit in units if category == "norm"]
    pools.append(Pool(NORM_POOL, tuple(_part("norm", [unit], anatomy) for unit in norms)))
    return [pool for pool in pools if pool.parts]


def beside(layers: Iterable[Layer]) -> list[Tensor]:
    """Tensors of the layers that no draw touches: routers, tables of positions, unknown ones and their biases."""
    known = {*ATTENTION, *MLP, "norm"}
    apart = (unit for layer in layers for category, unit in matrices_of(layer) if category not in known)
    names = {name for unit in apart for name in unit.tensors}
    return [t for layer in layers for t in layer.tensors if t.name in names]


def assembled(pieces: Iterable[Piece]) -> tuple[frozenset[str], tuple[Mask, ...]]:
    """Names of the tensors that train with these pieces, and the masks of those of which only some outputs do."""
    rows: dict[str, list[tuple[int, int]]] = {}
    tensors = {}
    for piece in pieces:
        tensors[piece.tensor.name] = piece.tensor
        rows.setdefault(piece.tensor.name, []).extend(piece.rows or [(0, piece.tensor.outputs)])
    merged = {name: _merged(blocks) for name, blocks in rows.items()}
    partial = (Piece(tensors[name], own) for name, own in merged.items() if own != ((0, tensors[name].outputs),))
    return frozenset(tensors), tuple(Mask(piece.tensor.name, piece.numel, piece.rows) for piece in partial)


def _merged(blocks: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for first, last in sorted(blocks):
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return tuple(found)


# -- parts ---------------------------------------------------------------------------------------------------------


def _modules(units: Sequence[tuple[str, Unit]], categories: Sequence[str], anchor: str) -> list[list[tuple[str, Unit]]]:
    """The units of these categories, module by module: each with the `anchor` (an attention's o, a feed-forward's down) to whose
    path its own is nearest. All experts are one module."""
    own = [(category, unit) for category, unit in units if category in categories]
    anchors = list(dict.fromkeys(_path(unit) for category, unit in own if category == anchor)) or [()]
    groups: dict[tuple[str, ...], list[tuple[str, Unit]]] = {path: [] for path in anchors}
    for category, unit in own:
        nearest = max(anchors, key=lambda path: _shared(path, _path(unit)))
        groups[nearest].append((category, unit))
    return list(groups.values())


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many first components two paths share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _path(unit: Unit) -> tuple[str, ...]:
    return tuple(re.sub(r"\.experts\.\d+\.", ".experts.", unit.name).split(".")[:-1])


def _parts(units: Iterable[tuple[str, Unit]], anatomy: Anatomy) -> tuple[Part, ...]:
    """One for each kind of matrix."""
    by_category: dict[str, list[Unit]] = {}
    for category, unit in units:
        packed = len(anatomy.by_name[unit.name].shape) > 2
        for part in (category,) if packed else FUSED.get(category, (category,)):
            by_category.setdefault(part, []).append(unit)
    return tuple(_part(category, own, anatomy) for category, own in by_category.items())


def _part(category: str, units: Sequence[Unit], anatomy: Anatomy) -> Part:
    pieces = tuple(piece for unit in units for piece in _pieces(category, unit, anatomy))
    name = units[0].name + (f"[{category}]" if pieces[0].rows else "")
    return Part(name, category, pieces, tuple(unit.name for unit in units))


def _pieces(category: str, unit: Unit, anatomy: Anatomy) -> list[Piece]:
    tensors = [anatomy.by_name[name] for name in unit.tensors]
    matrix = tensors[0]
    if matrix.category == category or matrix.category not in FUSED:
        return [Piece(t) for t in tensors]
    rows = matrix.outputs_of(category)
    if not rows:
        raise UserError(
            f"Strategy 'half' draws the matrices in {matrix.name} one by one, and it is not known which of its {matrix.outputs} "
            f"outputs are {', '.join(FUSED[matrix.category])} in a model of type {anatomy.model_type}. Write freeze.level: layer "
            "or element, which take it as it is."
        )
    return [Piece(t, rows) for t in tensors]
