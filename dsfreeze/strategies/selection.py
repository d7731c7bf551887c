"""Selection: the units a granularity offers, how many of them freeze, and the tensors that leaves to train.

A strategy is a rule over a list of units (`[layers.0, layers.1, ...]`) and a number; what a unit is, how a fraction
is rounded, and which tensors belong to a unit are decided here, once for every rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_UP, Decimal

from dsfreeze.anatomy import Anatomy, Layer, Tensor
from dsfreeze.errors import UserError
from dsfreeze.recipe import FreezeOptions

#: Of the units, in model order, and the number to freeze: the indices that freeze.
Rule = Callable[[Sequence["Unit"], int], Iterable[int]]

_ROUNDING = {"floor": ROUND_FLOOR, "nearest": ROUND_HALF_UP, "ceil": ROUND_CEILING}


@dataclass(frozen=True)
class Unit:
    """What freezes or trains as one: a layer, or a matrix with the bias of its module."""

    name: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """The trainable tensors of the transformer layers, and what the user should know about the choice."""

    trainable: frozenset[str]
    notes: tuple[str, ...] = ()


def choose(
    anatomy: Anatomy, options: FreezeOptions, rule: Rule, *, fraction: float = 0.5, kept: frozenset[str] | None = None
) -> Choice:
    """Apply the rule to every pool of units. `fraction` is used where the options give neither fraction nor count.

    `kept` narrows what may train at all (BitFit's biases); None keeps everything.
    """
    frozen: set[str] = set()
    number = total = 0
    for category, pool in _pools(anatomy, options.granularity, kept):
        asked = number_frozen(options, len(pool), _described(options, category), fraction)
        chosen = sorted(set(rule(pool, asked)))
        frozen.update(name for index in chosen for name in pool[index].tensors)
        number, total = number + len(chosen), total + len(pool)
    everything = frozenset(t.name for t in anatomy.block_tensors if kept is None or t.name in kept)
    asked_for_none = options.fraction is None and options.count is None and not fraction
    return Choice(everything - frozen, () if asked_for_none else (_counted(options, fraction, number, total),))


def units(anatomy: Anatomy, granularity: str, kept: frozenset[str] | None = None) -> tuple[Unit, ...]:
    """The units of a granularity that has one list of them (layer, matrix), in model order; none is without tensors."""
    return tuple(unit for _, pool in _pools(anatomy, granularity, kept) for unit in pool if unit.tensors)


def number_frozen(options: FreezeOptions, size: int, where: str, fraction: float) -> int:
    """How many of `size` units freeze; UserError when the count exceeds them.

    The product is taken in decimal: 0.29 of 100 is 29, which binary floating point would floor to 28.
    """
    if options.count is None:
        return int((share(options, fraction) * size).to_integral_value(_ROUNDING[options.rounding]))
    if options.count > size:
        raise UserError(
            f"freeze.count is {options.count}, but {where} has only {size} to freeze. "
            f"Write a count from 0 to {size}, or a freeze.fraction from 0 to 1."
        )
    return options.count


def share(options: FreezeOptions, fraction: float) -> Decimal:
    """The asked fraction, exactly as written."""
    return Decimal(str(fraction if options.fraction is None else options.fraction))


def _pools(anatomy: Anatomy, granularity: str, kept: frozenset[str] | None) -> Iterator[tuple[str, tuple[Unit, ...]]]:
    """The lists the rule is applied to: one, or one for each category; each in model order."""
    if granularity in ("layer", "bias"):
        yield "", tuple(Unit(layer.name, _names(layer, kept)) for layer in anatomy.blocks)
        return
    matrices = [pair for layer in anatomy.blocks for pair in matrices_of(layer, kept)]
    if granularity == "matrix":
        yield "", tuple(unit for _, unit in matrices)
        return
    for category in dict.fromkeys(category for category, _ in matrices):
        yield category, tuple(unit for own, unit in matrices if own == category)


def _names(layer: Layer, kept: frozenset[str] | None) -> tuple[str, ...]:
    return tuple(t.name for t in layer.tensors if kept is None or t.name in kept)


def matrices_of(layer: Layer, kept: frozenset[str] | None = None) -> Iterator[tuple[str, Unit]]:
    """(category, unit) of each weight with the biases of its module; a bias whose module has no weight stands alone."""
    tensors = [t for t in layer.tensors if kept is None or t.name in kept]
    leaders = [t for t in tensors if not t.is_bias]
    modules = {t.module for t in leaders}
    leaders += [t for t in tensors if t.is_bias and t.module not in modules]
    first = {module: next(t for t in leaders if t.module == module) for module in {t.module for t in leaders}}
    for leader in sorted(leaders, key=tensors.index):
        followers = tuple(t.name for t in tensors if _follows(t, leader, first))
        yield leader.category, Unit(leader.name, (leader.name, *followers))


def _follows(tensor: Tensor, leader: Tensor, first: dict[str, Tensor]) -> bool:
    return tensor.is_bias and tensor is not leader and first.get(tensor.module) is leader


def _described(options: FreezeOptions, category: str) -> str:
    unit = "layers" if options.granularity in ("layer", "bias") else "matrices"
    return f"category '{category}'" if category else f"the model's list of {unit}"


def _counted(options: FreezeOptions, fraction: float, number: int, total: int) -> str:
    unit = "layers" if options.granularity in ("layer", "bias") else "matrices"
    each = " of each category" if options.granularity == "category" else ""
    default = "the default " if options.fraction is None else ""
    asked = f"count {options.count}" if options.count is not None else f"{default}fraction {share(options, fraction)}"
    how = "" if options.count is not None else f", rounded {_ROUNDED[options.rounding]}"
    return f"{number} of {total} {unit} frozen (asked for {asked}{each}{how})"


_ROUNDED = {"floor": "down", "nearest": "to the nearest", "ceil": "up"}
