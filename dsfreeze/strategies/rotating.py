"""Strategies under which layers take turns: drawn afresh every so many steps (LISA, OwLore), or one after the other in
sweeps over the model (BAdam, HiFT).

Every draw is seeded by (seed, number of the round), so that a longer run begins as a shorter one does. Formulas,
sources and what is known of each: docs/methods/.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log
from random import Random

from dsfreeze.anatomy import Anatomy
from dsfreeze.plan import FreezePlan, StateRule
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.building import Stage
from dsfreeze.strategies.ends import all_ends, apply_options, end_names
from dsfreeze.strategies.moving import moving_plan, moving_units, number_active, run_length, task_head, unsettled
from dsfreeze.strategies.scores_file import read_scores, weights_of
from dsfreeze.strategies.selection import Unit

# -- drawn ---------------------------------------------------------------------------------------------------------


def lisa(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Every K steps, gamma layers drawn uniformly without replacement; embedding, norm and head always [2403.17919]."""
    pool = moving_units(anatomy, options)
    return _drawn(anatomy, options, run_length(options, num_steps), pool, [1.0] * len(pool), active=2, every=20)


def owlore(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """LISA with gamma 5, K 50 and a draw in proportion to given scores (outlier ratios) [2405.18380]."""
    path = options.scores
    assert path is not None, "FreezeOptions has checked it"
    pool, steps = moving_units(anatomy, options), run_length(options, num_steps)
    weights = weights_of(read_scores(path, options.score, anatomy), pool, number_active(options, pool, 5), path)
    return _drawn(anatomy, options, steps, pool, weights, active=5, every=50)


def _drawn(
    anatomy: Anatomy, options: FreezeOptions, steps: int, pool: Sequence[Unit], weights: Sequence[float], *,
    active: int, every: int,
) -> FreezePlan:  # fmt: skip
    number, every = number_active(options, pool, active), options.switch_every or every
    always, stages = _published_ends(anatomy, options), []
    for turn, first in enumerate(range(0, steps, every)):
        chosen = draw(weights, number, Random(f"{options.seed}/{turn}"))
        trainable = always.union(*(pool[index].tensors for index in chosen))
        stages.append(Stage(first, min(every, steps - first), trainable))
    notes = (f"{number} of {len(pool)} units drawn every {every} steps", *_embedding_trains(anatomy, options, number))
    return moving_plan(anatomy, options, stages, (*notes, *unsettled(options, "keep", every)), state="keep", pool=pool)


def draw(weights: Sequence[float], number: int, source: Random) -> list[int]:
    """`number` indices without replacement, each next one in proportion to the weights of those that are left.

    The smallest of -log(u) / w has that law [Efraimidis and Spirakis 2006]; a weight of 0 is never drawn.
    """
    waits = [(-log(1.0 - source.random()) / w if w > 0 else float("inf"), i) for i, w in enumerate(weights)]
    return sorted(index for _, index in sorted(waits)[:number])


def _published_ends(anatomy: Anatomy, options: FreezeOptions) -> frozenset[str]:
    """Embedding, final norm and head; with adapters, the task's own head."""
    if options.adapter is not None:
        return task_head(anatomy)
    return all_ends(anatomy)


def _embedding_trains(anatomy: Anatomy, options: FreezeOptions, number: int) -> tuple[str, ...]:
    if options.adapter is not None or options.embed == "freeze" or options.granularity != "layer":
        return ()
    depth = len(anatomy.blocks)
    spared = (depth - number) / (number + 1)
    return (
        f"the embedding trains throughout, as published; freeze.embed=freeze would spare backward the layers below the "
        f"lowest drawn one, {spared:.1f} of {depth} on average in a uniform draw",
    )


# -- in sweeps -----------------------------------------------------------------------------------------------------


def badam(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """One layer for K steps, then the next, in a fresh random order each sweep; nothing beside it [2404.02827]."""
    steps, pool = run_length(options, num_steps), moving_units(anatomy, options)
    return _swept(anatomy, options, steps, pool, every=50, order="random", state="clear")


def hift(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Embedding, each layer and head in turn, one step each, at one learning rate a sweep [2401.15207]."""
    steps, pool = run_length(options, num_steps), moving_units(anatomy, options)
    if options.adapter is None:
        pool = _with_ends(anatomy, options, pool)
    return _swept(anatomy, options, steps, pool, every=1, order="ascending", state="offload", one_rate=True)


def _swept(
    anatomy: Anatomy, options: FreezeOptions, steps: int, pool: Sequence[Unit], *,
    every: int, order: str, state: StateRule, one_rate: bool = False,
) -> FreezePlan:  # fmt: skip
    number, every = number_active(options, pool, 1), options.switch_every or every
    order = order if options.order == "auto" else options.order
    always, stages = task_head(anatomy), []
    for first, began, group in _turns(len(pool), number, every, steps, order, options.seed):
        trainable = always.union(*(pool[index].tensors for index in group))
        stages.append(Stage(first, min(every, steps - first), trainable, began if one_rate else None))
    sweep = -(-len(pool) // number) * every
    turn = "1 step" if every == 1 else f"{every} steps"
    notes = [f"{number} of {len(pool)} units for {turn} each, {order}: a sweep takes {sweep} steps"]
    if steps < sweep:
        notes.append(f"the run's {steps} steps end within the first sweep: some units never train")
    if always & apply_options(anatomy, options, always):
        notes.append("the task's new head trains in every phase, since it starts from random numbers")
    return moving_plan(anatomy, options, stages, (*notes, *unsettled(options, state, every)), state=state, pool=pool)


def _turns(
    size: int, number: int, every: int, steps: int, order: str, seed: int
) -> Iterator[tuple[int, int, list[int]]]:
    """(first step, first step of its sweep, indices) of each turn; the last group of a sweep may be smaller."""
    first = sweep = 0
    while first < steps:
        began, indices = first, list(range(size))
        if order == "random":
            Random(f"{seed}/{sweep}").shuffle(indices)
        elif order == "descending":
            indices.reverse()
        for start in range(0, size, number):
            if first < steps:
                yield first, began, indices[start : start + number]
            first += every
        sweep += 1


def _with_ends(anatomy: Anatomy, options: FreezeOptions, pool: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The layers' units between one for the embedding and one for a language model's head, which the final norm joins;
    where there is no such head to take turns, the norm joins the topmost unit.

    An end that the options train or freeze throughout takes no turn.
    """
    still = apply_options(anatomy, options, task_head(anatomy))

    def turning(names: frozenset[str]) -> tuple[str, ...]:
        return anatomy.in_order(apply_options(anatomy, options, names) - still)

    embed, norm = turning(end_names(anatomy, "embed")), turning(end_names(anatomy, "norm"))
    head = tuple(n for n in turning(end_names(anatomy, "head") - task_head(anatomy)) if n not in embed)
    if head:
        pool = (*pool, Unit("head", (*norm, *head)))
    else:
        pool = (*pool[:-1], Unit(pool[-1].name, (*pool[-1].tensors, *norm)))
    return (Unit("embed", embed), *pool) if embed else pool
