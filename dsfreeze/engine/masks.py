"""The masks of a plan in full: for each masked tensor, which of its elements train. One bit an element.

They are the same on every rank and at every world size: rows are counted out, drawn elements follow from (seed, tensor name)
alone, and a file's content is held against its digest. The stream that elements are drawn from is numpy's PCG64, which by numpy's
policy (NEP 19) gives the same numbers in every version; torch promises that of none of its generators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dsfreeze.anatomy import Anatomy, Tensor
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import sha256_of
from dsfreeze.plan import FreezePlan, Mask

#: Keys drawn at once; even, for two come from one draw, and a multiple of 8.
CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class Bits:
    """A boolean for each element of a tensor of `shape`: that of element i is bit i % 8 of byte i // 8 of `packed` (uint8)."""

    packed: torch.Tensor
    shape: tuple[int, ...]

    @classmethod
    def of(cls, mask: torch.Tensor) -> Bits:
        """From a bool tensor in host memory."""
        packed = np.packbits(mask.reshape(-1).numpy(), bitorder="little")
        return cls(torch.from_numpy(packed), tuple(mask.shape))

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def count(self) -> int:
        """How many are true."""
        return int(self.between(0, self.numel).sum())

    def to(self, device: torch.device) -> Bits:
        return Bits(self.packed.to(device), self.shape)

    def whole(self, device: torch.device | None = None) -> torch.Tensor:
        """The bool tensor, on `device`; a byte an element."""
        return self.between(0, self.numel, device).view(self.shape)

    def between(self, first: int, last: int, device: torch.device | None = None) -> torch.Tensor:
        """Of elements `first` .. `last - 1` of the flattened tensor (bool, 1-D), on `device`."""
        held = self.packed[first // 8 : -(-last // 8)].to(device or self.packed.device)
        spread = _spread(held.device).index_select(0, held.int()).view(torch.bool)
        return spread[first % 8 : first % 8 + last - first]


@cache
def _spread(device: torch.device) -> torch.Tensor:
    """For every byte its eight bits as the bytes of an int64, which one look-up gives at once."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(bits.view(np.int64).reshape(-1).copy()).to(device)


def make_masks(plan: FreezePlan, anatomy: Anatomy) -> dict[str, Bits]:
    """The plan's masks by tensor name, in host memory: a byte for every eight elements of a masked tensor.

    UserError for a mask that cannot be kept: of a tensor that the model lacks, that never trains or that carries an adapter, said
    in none or two of the three ways, or whose file or numbers are not what the plan says. Not collective.
    """
    for mask in plan.masks:
        _require_possible(mask, plan, anatomy)
    twice = next((m.tensor for n, m in enumerate(plan.masks) if m != plan.held_back[m.tensor]), None)
    if twice is not None:
        raise UserError(f"The plan has two masks of '{twice}'. Write one, of all elements that train.")
    files = _read_files(plan.masks, anatomy)
    made = {}
    for mask in plan.masks:
        tensor = anatomy.by_name[mask.tensor]
        bits = (
            files[tensor.name] if mask.file is not None else _rows(mask, tensor) if mask.rows else _share(mask, tensor)
        )
        if bits.count != mask.trained:
            raise UserError(
                f"The mask of '{mask.tensor}' trains {bits.count} elements, and the plan says {mask.trained}. Make the plan "
                "again: it was made for another model, or changed by hand."
            )
        made[tensor.name] = bits
    return made


def _require_possible(mask: Mask, plan: FreezePlan, anatomy: Anatomy) -> None:
    name, where = mask.tensor, f"The mask of '{mask.tensor}'"
    if plan.adapter is not None and name in plan.adapter.targets:
        raise UserError(
            f"{where} cannot be kept: the tensor carries an adapter, and its own weight is frozen whole. Leave out "
            "freeze.adapter, or the mask."
        )
    own = [tensor.name for tensor in anatomy.tensors]
    if name not in own:
        first = anatomy.by_name.get(name)
        hint = f" '{first.name}' is the same tensor; name that." if first else did_you_mean(name, own)
        raise UserError(f"{where} is of a tensor that the model lacks.{hint}")
    if name not in plan.ever_trained:
        raise UserError(
            f"{where} says what trains of it, and the plan never trains it. Leave out the mask, or train it."
        )
    ways = [way for way, given in (("rows", mask.rows), ("share", mask.share), ("file", mask.file)) if given]
    if len(ways) != 1:
        told = " and ".join(ways) or "nothing"
        raise UserError(f"{where} is said by {told}. Give one of rows, share and file.")
    if not 0 < mask.trained <= anatomy.by_name[name].numel:
        raise UserError(
            f"{where} trains {mask.trained} of {anatomy.by_name[name].numel} elements. Train at least one, or freeze the tensor."
        )


# -- rows ----------------------------------------------------------------------------------------------------------


def _rows(mask: Mask, tensor: Tensor) -> Bits:
    """Blocks of outputs: rows of a matrix, columns where its rows are its inputs, elements of a bias."""
    axis = len(tensor.shape) - 1 if tensor.fan_in_fan_out else 0
    ends = [end for block in mask.rows for end in block]
    if ends != sorted(set(ends)) or ends[0] < 0 or ends[-1] > tensor.shape[axis]:
        raise UserError(
            f"The mask of '{tensor.name}' trains the outputs {list(mask.rows)}, and the tensor has {tensor.shape[axis]}. Give "
            "blocks [first, last) within these, in order, apart from each other."
        )
    trained = torch.zeros(tensor.shape, dtype=torch.bool)
    for first, last in mask.rows:
        trained.narrow(axis, first, last - first).fill_(True)
    return Bits.of(trained)


# -- a drawn share -------------------------------------------------------------------------------------------------


def _share(mask: Mask, tensor: Tensor) -> Bits:
    assert mask.share is not None, "a mask by share"
    drawn = tensor.numel - mask.trained if mask.inverted else mask.trained
    if not 0 < mask.share <= 1 or mask.seed is None or abs(drawn - mask.share * tensor.numel) >= 1:
        raise UserError(
            f"The mask of '{tensor.name}' draws {drawn} of {tensor.numel} elements for share {mask.share} and seed "
            f"{mask.seed}. Give a share in (0, 1], a seed, and the whole number of elements that comes to."
        )
    packed = _draw(drawn, tensor.numel, _seed(mask.seed, tensor.name))
    return Bits(torch.from_numpy(~packed if mask.inverted else packed), tensor.shape)


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16], "little")


def _draw(count: int, numel: int, seed: int) -> np.ndarray:
    """Exactly `count` of `numel` bits true, every choice as likely as any (but for ties of 32-bit keys, where the first wins).

    Every element has a random key, and those with the smallest train. The keys are made twice, a chunk at a time: once to find the
    16 leading bits that the last of them has, and once to compare; so beside the result there is a chunk in memory, and not an
    ordering of the whole (8 bytes an element).
    """
    counts = np.asarray(sum(np.bincount(keys >> 16, minlength=1 << 16) for keys in _keys(numel, seed)))
    edge = int(np.searchsorted(np.cumsum(counts), count))
    taken, held = [], []
    for start, keys in zip(range(0, numel, CHUNK), _keys(numel, seed), strict=True):
        leading = keys >> 16
        taken.append(np.packbits(leading < edge, bitorder="little"))
        at = np.flatnonzero(leading == edge)
        held.append((keys[at], at + start))
    packed = np.concatenate(taken)
    keys, places = (np.concatenate(each) for each in zip(*held, strict=True))
    chosen = places[np.argsort(keys, kind="stable")][: count - int(counts[:edge].sum())]
    np.bitwise_or.at(packed, chosen // 8, (1 << chosen % 8).astype(np.uint8))
    return packed


def _keys(numel: int, seed: int) -> Iterator[np.ndarray]:
    """A random 32-bit key for every element, a chunk at a time."""
    stream = np.random.PCG64(seed)
    for start in range(0, numel, CHUNK):
        size = min(CHUNK, numel - start)
        yield stream.random_raw(-(-size // 2)).astype("<u8", copy=False).view("<u4")[:size]


# -- files ---------------------------------------------------------------------------------------------------------


def _read_files(masks: Iterable[Mask], anatomy: Anatomy) -> dict[str, Bits]:
    """Masks that are in files, by tensor name; each file's digest is compared before anything of it is read."""
    by_file: dict[tuple[str, str | None], list[str]] = {}
    for mask in masks:
        if mask.file is not None:
            by_file.setdefault((mask.file, mask.sha256), []).append(mask.tensor)
    read: dict[str, Bits] = {}
    for (file, digest), names in by_file.items():
        try:
            read |= _read(Path(file), digest, [anatomy.by_name[name] for name in names])
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"The masks in {file} cannot be read: {error}. Give a safetensors file of booleans."
            ) from None
    return read


def _read(file: Path, digest: str | None, tensors: Iterable[Tensor]) -> Mapping[str, Bits]:
    if sha256_of(file) != digest:
        raise UserError(
            f"The masks in {file} are not those that the plan was made with. Put that file back, or plan again."
        )
    read = {}
    with safe_open(file, framework="pt") as content:
        for tensor in tensors:
            if tensor.name not in content.keys():  # noqa: SIM118 (it is no mapping)
                raise UserError(f"{file} has no mask of '{tensor.name}'.{did_you_mean(tensor.name, content.keys())}")
            read[tensor.name] = Bits.of(_boolean(content.get_tensor(tensor.name), tensor, file))
    return read


def _boolean(mask: torch.Tensor, tensor: Tensor, file: Path) -> torch.Tensor:
    where = f"The mask of '{tensor.name}' in {file}"
    if tuple(mask.shape) != tuple(tensor.shape):
        raise UserError(f"{where} has shape {list(mask.shape)}, and the tensor {list(tensor.shape)}.")
    if mask.dtype not in (torch.bool, torch.uint8) or (mask.dtype == torch.uint8 and mask.numel() and mask.max() > 1):
        raise UserError(f"{where} is no mask: it has {mask.dtype} and not bool, or uint8 of 0 and 1.")
    return mask.bool()
