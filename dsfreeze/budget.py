"""The best set within limits: units of most gain for what they cost, exactly. No torch.

What a set costs depends on where the backward pass ends and on what trains above that, so the cut is enumerated and the
rest is a 0/1 knapsack with one or two limits. Units of like cost are taken best first, so what remains is how many of each kind;
the counts are merged kind by kind, and only sets are kept that no other beats in every respect, and that could still come up to
one already known.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

#: What a set takes: elements that train, and FLOPs of a token.
Cost = tuple[int, int]
NO_LIMIT = 2**127
LIMITS = ("memory", "time", "flops", "trainable")
_UNITS = {
    "memory": {
        "KiB": 2**10,
        "MiB": 2**20,
        "GiB": 2**30,
        "TiB": 2**40,
        "KB": 10**3,
        "MB": 10**6,
        "GB": 10**9,
        "TB": 10**12,
    },
    "trainable": {"K": 10**3, "M": 10**6, "B": 10**9},
}
_FORM = re.compile(r"(-?)\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)")


@dataclass(frozen=True)
class Limit:
    """At most `amount` of what full tuning takes (`relative`), or of bytes or elements."""

    amount: Fraction
    relative: bool

    def of(self, full: int) -> int:
        """The limit as a number, where full tuning takes `full`."""
        return int(self.amount * full) if self.relative else int(self.amount)


def parse_limit(kind: str, text: str) -> Limit:
    """`0.5x`, `50%` or `-40%` of full tuning; for memory also `40GiB`, for trainable parameters `10M`. ValueError with what
    to write instead."""
    match = _FORM.fullmatch(text.strip()) if len(text) < 40 else None
    sign, number, unit = match.groups() if match else ("", "", "?")
    share = {"x": Fraction(1), "%": Fraction(1, 100)}.get(unit.lower())
    units = {name.lower(): scale for name, scale in _UNITS.get(kind, {}).items()}
    if share is not None:
        amount = Fraction(number) * share
        amount = 1 - amount if sign else amount
        if 0 < amount <= 1:
            return Limit(amount, relative=True)
        raise ValueError(
            f"{kind}: '{text}' is {float(100 * amount):g} % of full tuning; write a share above 0 % and up to 100 %"
        )
    if not sign and unit.lower() in units and Fraction(number) > 0:
        return Limit(Fraction(number) * units[unit.lower()], relative=False)
    absolute = {"memory": ", or an amount such as 40GiB", "trainable": ", or a number of parameters such as 10M"}.get(
        kind, ""
    )
    raise ValueError(f"{kind}: '{text}' is no limit; write a share of full tuning such as 0.5x, 50% or -40%{absolute}")


@dataclass(frozen=True)
class Item:
    """Something that trains or does not: its place in the forward pass (compared alone), what its own training costs, and
    what it brings."""

    name: str
    place: tuple[int, float]
    elements: int
    flops: int
    gain: float


@dataclass(frozen=True)
class Choice:
    """Chosen items, in the order given, and their summed gain."""

    items: tuple[Item, ...]
    gain: float


def best_choice(items: Sequence[Item], base: Callable[[tuple[int, float]], Cost], limit: Cost) -> Choice | None:
    """The set of most gain, and among equals the one that takes fewest FLOPs; None when not one item fits.

    `base(place)`: what is paid whatever trains, when the lowest item lies there (ends, the way of the gradient down). It
    must not fall as the place goes down. Items without gain are left out.
    """
    useful = [item for item in items if item.gain > 0]
    cuts: list[tuple[list[Item], Cost, int]] = []
    for place in sorted({item.place for item in useful}, reverse=True):
        elements, flops = base(place)
        if elements <= limit[0] and flops <= limit[1]:
            above = [item for item in useful if item.place >= place]
            cuts.append((above, (limit[0] - elements, limit[1] - flops), flops))
    known = max((_greedy(above, room) for above, room, _ in cuts), default=0.0)
    best: tuple[float, int, tuple[Item, ...]] | None = None
    for above, room, flops in cuts:
        for used, gain, chosen in _frontier(above, room, max(known, best[0] if best else 0.0)):
            total = flops + used[1]
            if chosen and (best is None or (gain, -total) > (best[0], -best[1])):
                best = gain, total, chosen
    if best is None:
        return None
    taken = {item.name for item in best[2]}
    return Choice(tuple(item for item in items if item.name in taken), best[0])


_State = tuple[Cost, float, tuple[Item, ...]]


def _frontier(items: Sequence[Item], room: Cost, known: float) -> list[_State]:
    """Every set within `room` that no other set beats, and that brings `known` or more: (cost, gain, items)."""
    floor = (1 - 1e-9) * known  # below it by more than rounding
    kinds: dict[Cost, list[Item]] = {}
    for item in items:
        kinds.setdefault((item.elements, item.flops), []).append(item)
    states: list[_State] = [((0, 0), 0.0, ())]
    later = set(kinds)
    for cost, kind in kinds.items():
        later.remove(cost)
        ranked = sorted(kind, key=lambda item: (-item.gain, [-part for part in item.place]))
        most = _most([item for item in items if (item.elements, item.flops) in later], room)
        states = _undominated(s for s in _extended(states, cost, ranked, room) if s[1] + most(s[0]) >= floor)
    return states


def _greedy(items: Sequence[Item], room: Cost) -> float:
    """The gain of a good set: the items in the order of gain by share of the room, each that still fits."""
    elements, flops, gain = *room, 0.0

    def weight(item: Item) -> float:
        return (item.elements / (room[0] + 1) + item.flops / (room[1] + 1)) / item.gain

    for item in sorted(items, key=weight):
        if item.elements <= elements and item.flops <= flops:
            elements, flops, gain = elements - item.elements, flops - item.flops, gain + item.gain
    return gain


def _most(items: Sequence[Item], room: Cost) -> Callable[[Cost], float]:
    """Of what is used of `room`, a bound on what `items` can add: if parts of an item could train, and one limit held."""
    sides = [
        _by_one_limit([(item.elements, item.gain) for item in items]),
        _by_one_limit([(item.flops, item.gain) for item in items]),
    ]
    return lambda used: min(side(all_of_it - part) for side, all_of_it, part in zip(sides, room, used, strict=True))


def _by_one_limit(pairs: Iterable[tuple[int, float]]) -> Callable[[int], float]:
    """Room to the most gain of (cost, gain) pairs, the best by gain per cost first and the last in part."""
    ranked = sorted(pairs, key=lambda pair: -pair[1] / pair[0] if pair[0] else -math.inf)
    costs = list(accumulate((cost for cost, _ in ranked), initial=0))
    gains = list(accumulate((gain for _, gain in ranked), initial=0.0))

    def most(room: int) -> float:
        whole = bisect_right(costs, room) - 1
        if whole == len(ranked):
            return gains[whole]
        cost, gain = ranked[whole]
        return gains[whole] + gain * ((room - costs[whole]) / cost)

    return most


def _extended(states: Iterable[_State], cost: Cost, ranked: Sequence[Item], room: Cost) -> Iterator[_State]:
    for used, gain, chosen in states:
        yield used, gain, chosen
        for number in range(1, len(ranked) + 1):
            total = used[0] + number * cost[0], used[1] + number * cost[1]
            if total[0] > room[0] or total[1] > room[1]:
                break
            gain += ranked[number - 1].gain
            yield total, gain, chosen + tuple(ranked[:number])


def _undominated(states: Iterable[_State]) -> list[_State]:
    """Those that bring more than every other that takes no more of either."""
    kept: list[_State] = []
    stairs: list[tuple[int, float]] = []  # (FLOPs, gain) of those kept, both rising
    for state in sorted(states, key=lambda s: (s[0], -s[1])):  # elements rise
        (_, flops), gain, _ = state
        below = bisect_right(stairs, (flops, float("inf")))
        if below and stairs[below - 1][1] >= gain:
            continue
        while below < len(stairs) and stairs[below][1] <= gain:
            del stairs[below]
        insort(stairs, (flops, gain))
        kept.append(state)
    return kept
