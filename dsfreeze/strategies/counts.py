"""How many of a layer's parts train under half fine-tuning: half of each pool, or for another share what comes nearest to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from dsfreeze.strategies.pools import ATTENTION_POOL, NORM_POOL, Part, Pool

PAIRS = (("q", "o"), ("k", "v"))


@dataclass(frozen=True)
class Group:
    """Parts of which `number` train; `where` and `kind` are for telling, and what is equal there is counted together."""

    where: str
    kind: str
    parts: tuple[Part, ...]
    number: int


def half_of(pool: Pool, where: str, *, more: bool, paired: bool, fair: bool) -> list[Group]:
    """Half of a pool: 2 of q, k, v, o; of an uneven one the larger half if `more`, else the smaller; of norms rounded down.

    Experts' gate and up in one tensor are the larger half, and down is the smaller. `paired` draws one of q and o and one of k and v.
    `fair` draws among norms of one size, so that every choice has as many elements.
    """
    size = len(pool.parts)
    if any(part.is_packed for part in pool.parts):
        return [Group(where, pool.kind, (part,), int(part.is_packed == more)) for part in pool.parts]
    number = size // 2 + int(more and pool.is_uneven)
    if pool.kind == ATTENTION_POOL and paired and size == 4:
        own = {part.category: part for part in pool.parts}
        return [Group(where, pool.kind, (own[one], own[other]), 1) for one, other in PAIRS]
    if pool.kind == NORM_POOL and fair:
        return _by_size(pool, where, number)
    return [Group(where, pool.kind, pool.parts, number)]


def is_grouped(pool: Pool) -> bool:
    """Whether the matrices of an attention differ in size."""
    return pool.kind == ATTENTION_POOL and len({part.numel for part in pool.parts}) > 1


def _by_size(pool: Pool, where: str, number: int) -> list[Group]:
    """Half of the parts of each size; what is left over of odd numbers goes to the largest sizes."""
    groups = [Group(where, pool.kind, parts, len(parts) // 2) for parts in _sizes(pool.parts)]
    for index, group in enumerate(groups):
        spare = number - sum(g.number for g in groups)
        groups[index] = replace(group, number=group.number + min(spare, len(group.parts) % 2))
    return groups


def _sizes(parts: Iterable[Part]) -> list[tuple[Part, ...]]:
    """The parts by their number of elements, the largest first."""
    sizes: dict[int, list[Part]] = {}
    for part in parts:
        sizes.setdefault(part.numel, []).append(part)
    return [tuple(sizes[numel]) for numel in sorted(sizes, reverse=True)]


def near_share(pools: Sequence[Pool], where: str, frozen: Fraction, *, fair: bool) -> list[Group]:
    """Of a layer's pools so many parts that the frozen elements come nearest to a share of the layer.

    As gucci-j/ssu (e4421e9) does it: freeze round(share x parts) of each pool, the smallest first up to one half and the largest
    above; then add or take away single parts while that comes nearer; keep the counts alone. The last step is greedy, the best part
    first (ours); with `fair` counts are kept by size too, so that every choice has as many elements.
    """
    ordered = [sorted(pool.parts, key=lambda part: part.numel, reverse=frozen > Fraction(1, 2)) for pool in pools]
    counts = [round(frozen * len(parts)) for parts in ordered]
    wanted = frozen * sum(part.numel for parts in ordered for part in parts)

    def distance(counts: Sequence[int]) -> Fraction:
        return abs(wanted - sum(part.numel for n, own in zip(counts, ordered, strict=True) for part in own[:n]))

    while True:
        nearer = min(_neighbours(counts, ordered), key=distance)
        if distance(nearer) >= distance(counts):
            break
        counts = nearer
    groups = []
    for pool, parts, count in zip(pools, ordered, counts, strict=True):
        for own in _sizes(parts) if fair else [pool.parts]:
            held = sum(part in own for part in parts[:count])
            groups.append(Group(where, pool.kind, tuple(own), len(own) - held))
    return groups


def _neighbours(counts: Sequence[int], ordered: Sequence[Sequence[Part]]) -> list[list[int]]:
    return [
        [*counts[:k], count + step, *counts[k + 1 :]]
        for k, count in enumerate(counts)
        for step in (-1, 1)
        if 0 <= count + step <= len(ordered[k])
    ]
