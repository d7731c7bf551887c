"""Half fine-tuning (HFT, arXiv 2404.18466): half of the layers' weights train, drawn anew in each round; embedding and head train.

A round is a training stage, and a plan is of one round. Every part (a matrix, a norm, a layer) has a place in the draw's order by a
hash of seed, round and its own name, so what is drawn depends on nothing else. With scores the order is theirs. docs/methods/hft.md.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from statistics import fmean

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Mask
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.building import Stage, build_plan
from dsfreeze.strategies.counts import Group, half_of, is_grouped, near_share
from dsfreeze.strategies.ends import all_ends, apply_options
from dsfreeze.strategies.pools import NORM_POOL, Part, Piece, Pool, assembled, beside, pools_of, whole
from dsfreeze.strategies.scores_file import read_scores, scores_of
from dsfreeze.strategies.selection import Unit, share

HALF = Fraction(1, 2)


def half(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """The round's half of the layers, and the ends whole."""
    inside = _layers_within(anatomy, options.depth)
    outside = [t for layer in anatomy.blocks if layer not in inside for t in layer.tensors]
    if options.level == "element":
        names, masks, told = _elements(inside, options)
    else:
        names, masks, told = _drawn(anatomy, inside, options)
    chosen = names | {t.name for t in outside} | all_ends(anatomy)
    notes = (
        *told,
        *_depth_told(options, len(inside), len(anatomy.blocks)),
        _fraction_told(anatomy, options, chosen, masks),
    )
    return build_plan(anatomy, options, [Stage(0, None, chosen)], notes, masks=masks)


def _layers_within(anatomy: Anatomy, depth: str) -> tuple[Layer, ...]:
    """The layers in which something freezes; of an odd number the middle one is in neither half."""
    blocks, size = anatomy.blocks, len(anatomy.blocks) // 2
    within = {"uniform": blocks, "bottom": blocks[:size], "top": blocks[len(blocks) - size :]}[depth]
    if not within:
        raise UserError(
            f"Strategy 'half' draws among the layers, and {anatomy.name} has {len(blocks)}: none to freeze in with freeze.depth "
            f"'{depth}'. Choose another strategy, or depth: uniform."
        )
    return within


# -- orders --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Order:
    """Who comes first: the highest-scored, or who the draw puts there; equal scores (parts of one fused matrix) are drawn."""

    seed: int
    round: int
    scores: dict[str, float] | None = None
    path: Path = Path()

    def place(self, name: str) -> int:
        """Where the draw puts a name: uniform over 64 bits, the same in every process."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{self.round}/{name}".encode()).digest()[:8])

    def score(self, part: Part) -> float:
        assert self.scores is not None
        return fmean(scores_of(self.scores, [Unit(name, ()) for name in part.scored], self.path))

    def first(self, parts: Sequence[Part], number: int) -> list[Part]:
        if self._scores_none(parts):
            return sorted(parts, key=lambda part: self.place(part.name))[:number]
        return sorted(parts, key=lambda part: (-self.score(part), self.place(part.name)))[:number]

    def gain(self, pool: Pool) -> float:
        """What training the larger half of an uneven pool brings over the smaller one; 0 where it is drawn."""
        if self.scores is None:
            return 0.0
        packed = [part for part in pool.parts if part.is_packed]
        if packed:
            return sum(self.score(part) * (1 if part.is_packed else -1) for part in pool.parts)
        return self.score(self.first(pool.parts, len(pool.parts) // 2 + 1)[-1])

    def _scores_none(self, parts: Iterable[Part]) -> bool:
        """Whether these are drawn: always without scores; with a score of matrices alone, the norms."""
        if self.scores is None:
            return True
        return all(part.category == "norm" and not set(part.scored) & set(self.scores) for part in parts)


def _order(anatomy: Anatomy, options: FreezeOptions) -> _Order:
    scores = read_scores(options.scores, options.score, anatomy) if options.scores else None
    return _Order(options.seed, _round_drawn(options), scores, options.scores or Path())


def _round_drawn(options: FreezeOptions) -> int:
    """The round whose draw holds."""
    if options.masks == "same":
        return 0
    return options.round - options.round % 2 if options.masks == "complement" else options.round


def _is_turned(options: FreezeOptions) -> bool:
    """Whether this round trains what the one before it froze."""
    return options.masks == "complement" and options.round % 2 == 1


# -- levels --------------------------------------------------------------------------------------------------------

#: (names, masks, notes) of what trains.
_Trained = tuple[frozenset[str], tuple[Mask, ...], tuple[str, ...]]


def _drawn(anatomy: Anatomy, layers: Sequence[Layer], options: FreezeOptions) -> _Trained:
    """Layers, or matrices and norms, as the options' level says."""
    order, turned = _order(anatomy, options), _is_turned(options)
    chosen: list[Part] = []
    taken: Counter[tuple[str, str]] = Counter()
    total: Counter[tuple[str, str]] = Counter()
    for group in _LEVELS[options.level](anatomy, layers, options, order):
        first = order.first(group.parts, group.number)
        own = [part for part in group.parts if (part in first) != turned]
        chosen += own
        taken[group.where, group.kind] += len(own)
        total[group.where, group.kind] += len(group.parts)
    untouched = [] if options.level == "layer" else beside(layers)
    names, masks = assembled([*(piece for part in chosen for piece in part.pieces), *map(Piece, untouched)])
    counts = Counter((kind, taken[where, kind], number) for (where, kind), number in total.items() if number)
    return names, masks, (_draw_told(options, turned), _counts_told(counts), *_rest_told(len(untouched), len(masks)))


def _categories(anatomy: Anatomy, layers: Sequence[Layer], options: FreezeOptions, order: _Order) -> Iterator[Group]:
    """Half of each pool of each layer, or what is nearest to another share; half of the layers have the larger halves."""
    pools = {layer.name: _pools(layer, anatomy) for layer in layers}
    frozen, scored = _share_frozen(options), order.scores is not None
    larger = _larger(pools, order)
    for where, own in pools.items():
        if frozen != HALF:
            yield from near_share(own, where, frozen, fair=scored)
            continue
        for pool in own:
            paired = options.balanced or (scored and is_grouped(pool))
            yield from half_of(pool, where, more=where in larger, paired=paired, fair=scored or options.balanced)


def _larger(pools: Mapping[str, Sequence[Pool]], order: _Order) -> frozenset[str]:
    """The layers that train the larger half of an uneven pool: half of those that have one (the smaller half of an odd number), at
    random, or where one more brings most."""
    uneven = {where: [pool for pool in own if pool.is_uneven] for where, own in pools.items()}
    names = [where for where, own in uneven.items() if own]

    def key(where: str) -> tuple[float, int]:
        return -sum(order.gain(pool) for pool in uneven[where]), order.place(where)

    return frozenset(sorted(names, key=key)[: len(names) // 2])


def _pools(layer: Layer, anatomy: Anatomy) -> list[Pool]:
    pools = pools_of(layer, anatomy)
    if all(pool.kind == NORM_POOL for pool in pools):
        raise UserError(
            f"Strategy 'half' knows no attention and no feed-forward matrix in {layer.name} of {anatomy.name}. Write freeze.level: "
            "layer or element, which ask for no names."
        )
    return pools


def _whole_layers(anatomy: Anatomy, layers: Sequence[Layer], options: FreezeOptions, order: _Order) -> Iterator[Group]:
    yield Group("", "layers", tuple(map(whole, layers)), int((1 - _share_frozen(options)) * len(layers)))


def _whole_model(anatomy: Anatomy, layers: Sequence[Layer], options: FreezeOptions, order: _Order) -> Iterator[Group]:
    """Matrices of all layers, until enough elements or enough of them train; norms by themselves, by number."""
    pools = [pool for layer in layers for pool in _pools(layer, anatomy)]
    kept = 1 - _share_frozen(options)
    matrices, norms = (
        tuple(part for pool in pools if (pool.kind == NORM_POOL) == is_norm for part in pool.parts)
        for is_norm in (False, True)
    )
    number = int(kept * len(matrices))
    if options.count_by == "numel":
        wanted = kept * sum(part.numel for part in matrices)
        sums = accumulate(part.numel for part in order.first(matrices, len(matrices)))
        number = 1 + sum(so_far < wanted for so_far in sums)
    yield Group("", "matrices", matrices, number)
    yield Group("", "norms", norms, int(kept * len(norms)))


_LEVELS = {"category": _categories, "layer": _whole_layers, "model": _whole_model}


def _elements(layers: Sequence[Layer], options: FreezeOptions) -> _Trained:
    """The floor of the share of every matrix, norm and bias, or all but that; routers and the like stay whole."""
    kept, turned = 1 - _share_frozen(options), _is_turned(options)
    seed = int.from_bytes(hashlib.sha256(f"{options.seed}/{_round_drawn(options)}".encode()).digest()[:4])
    untouched = beside(layers)
    sizes = {t.name: t.numel for layer in layers for t in layer.tensors if t not in untouched}
    drawn = {name: count for name, numel in sizes.items() if (count := int(kept * numel))}
    masks = tuple(
        Mask(name, sizes[name] - count if turned else count, share=float(kept), seed=seed, inverted=turned)
        for name, count in drawn.items()
    )
    names = frozenset((*(sizes if turned else drawn), *(t.name for t in untouched)))
    told = f"{float(1 - kept if turned else kept):g} of the elements of each of {len(drawn)} tensors"
    return names, masks, (_draw_told(options, turned), told, *_rest_told(len(untouched), 0))


def _share_frozen(options: FreezeOptions) -> Fraction:
    return Fraction(share(options, 0.5))


# -- what is told --------------------------------------------------------------------------------------------------


def _draw_told(options: FreezeOptions, turned: bool) -> str:
    drawn = _round_drawn(options)
    whose = "a" if turned or drawn == options.round else f"round {drawn}'s"
    by = f"{whose} draw by seed {options.seed}"
    if options.scores:
        by = f"the highest scores of {options.scores.name}" + (f" ({options.score})" if options.score else "")
    return f"round {options.round} trains " + (f"what round {drawn} froze, which trained {by}" if turned else by)


def _counts_told(counts: Counter[tuple[str, int, int]]) -> str:
    """Such as "attention 2 of 4 in 32 layers, feed-forward 1 of 3 in 16 layers"."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(
        f"{kind} {taken} of {size}" + (f" in {times} layers" if times > 1 else "")
        for (kind, taken, size), times in ordered
    )


def _rest_told(untouched: int, masked: int) -> tuple[str, ...]:
    rest = f"{untouched} tensors of the layers that are neither (routers and the like) train"
    fused = (
        f"of {masked} fused tensors some outputs train; gradients and optimizer state are those of the whole tensors"
    )
    return (*((rest,) if untouched else ()), *((fused,) if masked else ()))


def _depth_told(options: FreezeOptions, inside: int, depth: int) -> tuple[str, ...]:
    if options.depth == "uniform":
        return ()
    return (f"it freezes in the {options.depth} {inside} of {depth} layers alone, and the others train whole",)


def _fraction_told(anatomy: Anatomy, options: FreezeOptions, chosen: frozenset[str], masks: Sequence[Mask]) -> str:
    """The share that truly trains, the options for the ends counted."""
    counts = {t.name: t.numel for t in anatomy.tensors} | {mask.tensor: mask.trained for mask in masks}
    trained = apply_options(anatomy, options, chosen)
    inside = sum(counts[t.name] for t in anatomy.block_tensors if t.name in trained)
    layers, everything = sum(t.numel for t in anatomy.block_tensors), sum(counts[name] for name in trained)
    return (
        f"truly trained: {inside:,} of the layers' {layers:,} elements ({100 * inside / layers:.2f} %), {everything:,} of the "
        f"model's {anatomy.numel:,} ({100 * everything / anatomy.numel:.2f} %)"
    )
