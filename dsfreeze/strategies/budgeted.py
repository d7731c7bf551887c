"""The cost-benefit balance: of all sets within the limits the one whose scores add up to most.

Scores are taken as gains that add up; what a set costs is `estimate`'s. The set is exact (`dsfreeze.budget`); what each
next unit would cost and bring is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dsfreeze.anatomy import Anatomy
from dsfreeze.budget import LIMITS, NO_LIMIT, Choice, Cost, Item, best_choice, parse_limit
from dsfreeze.errors import UserError
from dsfreeze.estimate.flops import flops, places_of
from dsfreeze.estimate.states import bytes_on_device
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.setting import Setting
from dsfreeze.strategies.building import Stage, build_plan
from dsfreeze.strategies.ends import apply_options, auto_ends
from dsfreeze.strategies.scores_file import read_scores, scores_of
from dsfreeze.strategies.selection import Unit, units
from dsfreeze.tables import gib, million

#: Of the units left out, how many are told of.
TOLD = 3


@dataclass(frozen=True)
class Next:
    """A unit left out: what adding it alone would bring and cost, as shares of all gain and of full tuning's FLOPs, and in
    elements."""

    name: str
    gain: float
    flops: float
    elements: int

    def __str__(self) -> str:
        return (
            f"next would be {self.name}: {self.gain:+.1%} of the gain for {self.flops:+.1%} of the FLOPs and "
            f"{million(self.elements)} parameters"
        )


class Balance:
    """The units of a model with what they bring and cost, and what the limits leave room for."""

    def __init__(self, anatomy: Anatomy, options: FreezeOptions, setting: Setting) -> None:
        assert options.scores, "FreezeOptions has checked it"
        self.anatomy, self.options, self.setting = anatomy, options, setting
        self.units = {unit.name: unit for unit in units(anatomy, options.granularity)}
        self.places = places_of(anatomy)
        scores = scores_of(
            read_scores(options.scores, options.score, anatomy), list(self.units.values()), options.scores
        )
        self.items = [self._item(unit, gain) for unit, gain in zip(self.units.values(), scores, strict=True)]
        self.full = sum(flops(anatomy, anatomy.tensors, frozenset(self.anatomy.by_name), setting.sequence_length))

    def _item(self, unit: Unit, gain: float) -> Item:
        tensors = [self.anatomy.by_name[name] for name in unit.tensors]
        place = min(self.places[t.name] for t in tensors)
        return Item(unit.name, place, sum(t.numel for t in tensors), sum(t.flops_per_token for t in tensors), gain)

    def trained(self, items: Sequence[Item]) -> frozenset[str]:
        """What trains with these units, the ends included."""
        return self._with_ends(frozenset(name for item in items for name in self.units[item.name].tensors))

    def _with_ends(self, chosen: frozenset[str]) -> frozenset[str]:
        return apply_options(self.anatomy, self.options, chosen | auto_ends(self.anatomy, chosen))

    def cost(self, trainable: frozenset[str]) -> Cost:
        elements = sum(self.anatomy.by_name[name].numel for name in trainable)
        return elements, sum(flops(self.anatomy, self.anatomy.tensors, trainable, self.setting.sequence_length))

    def base(self, place: tuple[int, float]) -> Cost:
        """What is paid beside the units' own weight gradients when the lowest of them lies at `place`."""
        item = next(item for item in self.items if item.place == place)
        elements, total = self.cost(self.trained([item]))
        return elements - item.elements, total - item.flops

    @cached_property
    def gain(self) -> float:
        """All that there is to gain."""
        return sum(item.gain for item in self.items if item.gain > 0)

    @cached_property
    def limit(self) -> Cost:
        """The limits as the most elements and the most FLOPs."""
        limits = [self._room(kind) for kind in self.options.budget or ()]
        return min(room[0] for room in limits), min(room[1] for room in limits)

    def _room(self, kind: str) -> Cost:
        limit = parse_limit(kind, (self.options.budget or {})[kind])  # type: ignore[index]
        if kind == "trainable":
            return limit.of(self.anatomy.numel), NO_LIMIT
        if kind == "memory":
            return self._elements_within(limit.of(self.memory(self.anatomy.numel))), NO_LIMIT
        return NO_LIMIT, limit.of(self.full)

    def memory(self, elements: int) -> int:
        """Bytes of model states on a rank's device with so many trained elements."""
        return bytes_on_device(self.anatomy.numel, elements, self.setting)

    def _elements_within(self, num_bytes: int) -> int:
        low, high = -1, self.anatomy.numel
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.memory(middle) <= num_bytes else (low, middle - 1)
        return low

    def solve(self) -> Choice:
        """The best set; UserError that says what would do when the limits leave room for none."""
        if not self.gain:
            raise UserError(
                f"freeze.scores: no score of '{self.options.scores}' is above 0, so nothing would gain by training. Choose "
                "another freeze.score, or strategy 'ranked', which needs an order alone."
            )
        choice = best_choice(self.items, self.base, self.limit)
        if choice is None:
            raise UserError(self._nothing_fits())
        return choice

    def _nothing_fits(self) -> str:
        costs = [self.cost(self.trained([item])) for item in self.items if item.gain > 0]
        elements, most_flops = min(costs, key=self._excess)
        needs = {
            "memory": f"memory: {-(-self.memory(elements) // 2**20)}MiB",
            "trainable": f"trainable: {_percent(elements, self.anatomy.numel)}%",
            **dict.fromkeys(("time", "flops"), f"flops: {_percent(most_flops, self.full)}%"),
        }
        asked = self.options.budget or {}
        names = ", ".join(f"{kind}: {text}" for kind, text in asked.items())
        nearest = ", ".join(needs[kind].replace("flops", kind) for kind in LIMITS if kind in asked)
        return (
            f"freeze.budget: nothing that trains fits within {names} for {self.anatomy.name}. The single unit "
            f"that comes nearest takes {nearest}; write that or more."
        )

    def _excess(self, cost: Cost) -> float:
        """How many times over the limits a cost is, by the one that it exceeds most."""
        return max(part / max(1, room) for part, room in zip(cost, self.limit, strict=True))

    def next_units(self, choice: Choice) -> list[Next]:
        """The useful units left out, most gain per FLOP first; of norms above the lowest trained unit, FLOPs are 0."""
        elements, paid = self.cost(self.trained(choice.items))
        found = []
        for item in self.items:
            if item.gain > 0 and item not in choice.items:
                more, dearer = self.cost(self.trained([*choice.items, item]))
                found.append(Next(item.name, item.gain / self.gain, (dearer - paid) / self.full, more - elements))
        return sorted(found, key=lambda unit: -unit.gain / unit.flops if unit.flops else -math.inf)


def _percent(part: int, whole: int) -> float:
    """Rounded up to a tenth, so that writing it is enough."""
    return -(-1000 * part // whole) / 10


def budget(
    anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None, setting: Setting | None = None
) -> FreezePlan:
    """Train the set of most gain within freeze.budget."""
    balance = Balance(anatomy, options, setting or Setting())
    choice = balance.solve()
    trainable = balance.trained(choice.items)
    notes = tuple(_told(balance, choice, trainable))
    return build_plan(anatomy, options, [Stage(0, None, trainable)], notes)


def _told(balance: Balance, choice: Choice, trainable: frozenset[str]) -> list[str]:
    elements, paid = balance.cost(trainable)
    notes = [
        f"{len(choice.items)} of {len(balance.items)} units bring {choice.gain / balance.gain:.0%} of the estimated gain at "
        f"{paid / balance.full:.0%} of full tuning's FLOPs, {million(elements)} parameters and "
        f"{gib(balance.memory(elements))} of model states a rank"
    ]
    return [*notes, *map(str, balance.next_units(choice)[:TOLD])]
