"""Strategies that go through the model once: a window that slides (sweep), layers that thaw from the top (gradual
unfreezing) or stop from the bottom (FreezeOut), and freezing by given steps.

Formulas, sources and what is known of each: docs/methods/.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Any

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Rate
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.building import Stage, build_plan
from dsfreeze.strategies.ends import auto_ends, tied_head, tied_names
from dsfreeze.strategies.moving import SETTLED_AFTER, moving_plan, moving_units, number_active, run_length, shared_out
from dsfreeze.strategies.patterns import match_globs

#: Steps [first, after) in which something is frozen; `after` None is the end of the run.
Range = tuple[int, int | None]

_FORMS = "a number N (the first N steps), [first, last], [first, -1] (to the end), -1 (throughout), or a list of pairs"


def sweep(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """A window of layers slides from the input to the output, an equal share of the run at each place (LIFT)."""
    pool, steps = moving_units(anatomy, options), run_length(options, num_steps)
    number = number_active(options, pool, 1)
    places = [pool[start : start + number] for start in range(len(pool) - number + 1)]
    if options.order == "descending":
        places.reverse()
    shares = shared_out(options, steps, len(places), "places for its window")
    stages = [
        Stage(first, length, _with_ends(anatomy, options, frozenset(n for unit in window for n in unit.tensors)))
        for (first, length), window in zip(shares, places, strict=True)
    ]
    shortest = min(length for _, length in shares)
    notes: tuple[str, ...] = (
        f"a window of {number} slides over {len(pool)} units, {len(places)} places of {shortest} steps or one more",
    )
    if shortest < SETTLED_AFTER:
        notes += (f"{shortest} steps at a place are few: Adam's first ones are about lr * sign(gradient)",)
    return moving_plan(anatomy, options, stages, (*notes, *_tied_note(anatomy, options)), state="clear")


def gradual_unfreezing(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Head and topmost group first, one more group each stage, everything in the last [1801.06146]."""
    blocks, steps = anatomy.blocks, run_length(options, num_steps)
    size = number_active(options, blocks, 1)
    tops = [max(0, len(blocks) - size * (stage + 1)) for stage in range(-(-len(blocks) // size))]
    if options.switch_every is None:
        shares = shared_out(options, steps, len(tops), "stages")
    else:
        shares = _every(options.switch_every, len(tops), steps)
    stages = [
        Stage(first, length, _with_ends(anatomy, options, _tensors(blocks[top:])))
        for (first, length), top in zip(shares, tops, strict=False)
    ]
    thawed = f"{size} more of {len(blocks)} layers thaw at each of {len(tops)} stages, from the top"
    unreached = ("the run ends before the last stages: its bottom layers never train",) * (len(shares) < len(tops))
    rates = _discriminative(anatomy, options.discriminative_factor, size)
    notes = (thawed, *unreached, *_tied_note(anatomy, options))
    return build_plan(anatomy, options, stages, notes, rewarmup_steps=options.rewarmup_steps, rates=rates)


def _every(length: int, parts: int, steps: int) -> list[tuple[int, int]]:
    """Parts of that length, the last one to the end of the run; those that begin beyond it are left out."""
    starts = [part * length for part in range(parts) if part * length < steps]
    return [(first, after - first) for first, after in zip(starts, [*starts[1:], steps], strict=True)]


def _discriminative(anatomy: Anatomy, factor: float, size: int) -> tuple[Rate, ...]:
    """Each group's rate is that of the one above divided by the factor; the embedding is a group of its own."""
    if factor == 1:
        return ()
    depth = len(anatomy.blocks)
    groups = {layer.name: (depth - 1 - index) // size for index, layer in enumerate(anatomy.blocks)}
    groups["embed"] = max(groups.values()) + 1
    return tuple(Rate(layer.name, factor ** -groups[layer.name]) for layer in anatomy.layers if layer.name in groups)


def freezeout(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Layer i stops after the share t_i of the run, annealed to zero by then, the first layer first [1706.04983]."""
    blocks, steps = anatomy.blocks, run_length(options, num_steps)
    shares = stop_shares(len(blocks), options.t0, options.power)
    stops = [ceil(share * steps) for share in shares]
    starts = sorted({0, *(stop for stop in stops if stop < steps)})
    stages = []
    for first, after in zip(starts, [*starts[1:], steps], strict=True):
        running = [layer for layer, stop in zip(blocks, stops, strict=True) if stop > first]
        stages.append(Stage(first, after - first, _with_ends(anatomy, options, _tensors(running))))
    first_stop, last_stop = stops[0], stops[-2] if len(stops) > 1 else steps
    notes = (
        f"layers.0 stops after {first_stop} of {steps} steps, the last but one after {last_stop}",
        "every layer's rate falls by its own half cosine from train.learning_rate; train.lr_scheduler_type is not used",
        *_tied_note(anatomy, options),
    )
    rates = _annealed(anatomy, options, shares, stops, steps)
    # what has stopped never comes back, so nothing of it is worth keeping
    return build_plan(
        anatomy, options, stages, notes, state="clear", drop_master=True,
        rewarmup_steps=options.rewarmup_steps, rates=rates,
    )  # fmt: skip


def stop_shares(depth: int, t0: float, power: int) -> list[Fraction]:
    """t_i = (t0 + (1 - t0) i / (depth - 1)) ** power, exactly as t0 is written; 1 for a single layer."""
    start = Fraction(Decimal(str(t0)))
    return [(start + (1 - start) * Fraction(i, depth - 1)) ** power if depth > 1 else Fraction(1) for i in range(depth)]


def _annealed(
    anatomy: Anatomy, options: FreezeOptions, shares: Sequence[Fraction], stops: Sequence[int], steps: int
) -> tuple[Rate, ...]:
    """Layer i at 1 / t_i of the rate, to zero at its last step; the embedding goes with layers.0, the rest to the end."""
    blocks = [layer.name for layer in anatomy.blocks]
    own = {
        name: Rate(name, float(1 / t) if options.scale_rates else 1.0, stop)
        for name, t, stop in zip(blocks, shares, stops, strict=True)
    }
    if options.embed != "train":
        own["embed"] = Rate("embed", own[blocks[0]].scale, own[blocks[0]].ends)
    return tuple(own.get(layer.name, Rate(layer.name, 1.0, steps)) for layer in anatomy.layers if layer.tensors)


def _tied_note(anatomy: Anatomy, options: FreezeOptions) -> tuple[str, ...]:
    tied = tied_head(anatomy)
    if tied is None or options.adapter is not None or (options.embed, options.head) != ("auto", "auto"):
        return ()
    return (
        f"{' is tied to '.join(tied_names(tied))}: both train only while layers.0 does; freeze.embed=train keeps both",
    )


# -- by given steps ------------------------------------------------------------------------------------------------


def step_ranges(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze what patterns name during the steps given for them (NeMo's freeze_updates); the rest trains throughout."""
    ranges = {pattern: read_ranges(pattern, value) for pattern, value in (options.step_ranges or {}).items()}
    named = {pattern: match_globs(anatomy, [pattern], "freeze.step_ranges") for pattern in ranges}
    edges = {step for spans in ranges.values() for span in spans for step in span if step is not None}
    starts = sorted({0, *edges})
    reached = [start for start in starts if num_steps is None or start < num_steps]
    everything = frozenset(t.name for t in anatomy.tensors)
    stages = []
    for first, after in zip(reached, [*reached[1:], None], strict=True):
        frozen = [named[pattern] for pattern, spans in ranges.items() if any(_holds(span, first) for span in spans)]
        stages.append(Stage(first, None if after is None else after - first, everything.difference(*frozen)))
    never = [p for p, spans in ranges.items() if num_steps is not None and all(s[0] >= num_steps for s in spans)]
    notes = tuple(
        f"freeze.step_ranges: '{p}' would freeze after the run's {num_steps} steps: it never does" for p in never
    )
    return moving_plan(anatomy, options, stages, ("what no range freezes trains", *notes), state="keep")


def read_ranges(pattern: str, value: Any) -> tuple[Range, ...]:
    """The steps in which a pattern's tensors are frozen; UserError when they are none, or overlap."""
    if _is_step(value):
        if value == 0 or value < -1:
            raise UserError(f"freeze.step_ranges: '{pattern}' is {value}. Write {_FORMS}.")
        return ((0, None if value == -1 else value),)
    pairs = value if isinstance(value, list) and value and isinstance(value[0], list | tuple) else [value]
    ranges = sorted((_range(pattern, pair) for pair in pairs), key=lambda span: span[0])
    for (first, after), (later, _) in pairwise(ranges):
        if after is None or later < after:
            raise UserError(
                f"freeze.step_ranges: '{pattern}' has ranges that overlap: the one from step {first} still holds at "
                f"step {later}, where another begins. Make one of the two."
            )
    return tuple(ranges)


def _range(pattern: str, pair: Any) -> Range:
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(_is_step(step) for step in pair):
        raise UserError(f"freeze.step_ranges: '{pattern}' is {pair!r}. Write {_FORMS}.")
    first, last = pair
    if first < 0 or (last < first and last != -1):
        raise UserError(
            f"freeze.step_ranges: '{pattern}' is {list(pair)}, which holds no step: steps count from 0, and the last one "
            "is not before the first (-1 is the end of the run)."
        )
    return first, None if last == -1 else last + 1


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _holds(span: Range, step: int) -> bool:
    return span[0] <= step and (span[1] is None or step < span[1])


def _tensors(layers: Sequence[Layer]) -> frozenset[str]:
    return frozenset(t.name for layer in layers for t in layer.tensors)


def _with_ends(anatomy: Anatomy, options: FreezeOptions, blocks: frozenset[str]) -> frozenset[str]:
    """The layers' tensors and the ends that follow from them: the embedding trains exactly while layers.0 does."""
    return blocks | auto_ends(anatomy, blocks, adapter=options.adapter is not None)
