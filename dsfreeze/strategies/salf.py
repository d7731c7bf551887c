"""Semantic-aware layer freezing (SALF, arXiv 2406.11753): freeze up to the layer that brings a state closest to its label.

`analyze` measures the transition traces: of each example the deviation d_0 .. d_L of the state that predicts its label,
in the latent spaces 0 (the embedding's) to L (the last layer's). Here they become gains, ends of freezing and a plan.
The gain's formula is not published: A to D are candidates of ours, and so are the rules for budget, padding and ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median_high

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.building import Stage, build_plan
from dsfreeze.strategies.ends import auto_ends
from dsfreeze.strategies.scores_file import read_traces

Trace = Sequence[float]

#: Deviations are held above this before a logarithm is taken.
FLOOR = 1e-6


# -- gains ---------------------------------------------------------------------------------------------------------


def gain_a(trace: Trace) -> list[float]:
    """g_k = d_{k-1} - d_k: how much layer k reduces the deviation. The default."""
    return [before - after for before, after in pairwise(trace)]


def gain_b(trace: Trace) -> list[float]:
    """g_k = log d_{k-1} - log d_k: the ratio, where a power law has a constant one."""
    return gain_a([math.log(max(value, FLOOR)) for value in trace])


def gain_c(trace: Trace) -> list[float]:
    """g_k = (log d_{k-1} - log d_k) / (log (k+1) - log k): the local exponent of d proportional to (k+1)^-g."""
    return [gain / math.log((k + 1) / k) for k, gain in enumerate(gain_b(trace), start=1)]


def gain_d(trace: Trace) -> list[float]:
    """g_k = (d_{k-1} - d_k) / (d_0 - d_L): the share of the whole reduction; A where there is none (d_0 <= d_L), for there
    the quotient would turn the order round."""
    total = trace[0] - trace[-1]
    return [gain / total for gain in gain_a(trace)] if total > 0 else gain_a(trace)


GAINS: dict[str, Callable[[Trace], list[float]]] = {"a": gain_a, "b": gain_b, "c": gain_c, "d": gain_d}


# -- where freezing ends -------------------------------------------------------------------------------------------


def end_of_freezing(trace: Trace, options: FreezeOptions) -> int:
    """How many layers freeze for one example, at most all but freeze.min_layers: the layer of maximum gain is the last
    frozen one, the higher of equals; with gain d freezing goes on until freeze.tau of the reduction is reached."""
    gains = GAINS[options.gain](trace)
    number = len(gains)
    if not any(gains):
        end = 0 if options.flat == "train_all" else number
    elif options.gain == "d" and trace[0] > trace[-1]:
        end = _reaching(gains, options.tau)
    else:
        end = max(range(1, number + 1), key=lambda k: (gains[k - 1], k))
    return _within(min(end, number - options.min_layers), number, options)


def _reaching(shares: Sequence[float], tau: float) -> int:
    """The first layer by which the shares add up to tau; a sum that rounding keeps below it ends at the last."""
    reached = 0.0
    for k, value in enumerate(shares, start=1):
        reached += value
        if reached >= tau:
            return k
    return len(shares)


def _within(end: int, number: int, options: FreezeOptions) -> int:
    """No more than freeze.max_layers train; with padding fill no fewer either."""
    if options.max_layers is None:
        return end
    least = max(0, number - options.max_layers)
    return least if options.padding == "fill" else max(end, least)


def dataset_cut(ends: Sequence[int], rule: str) -> int:
    """One end for all examples: their median (the higher of two), their mode (the highest of several), or their lower
    quartile. It does not depend on the order of the examples."""
    if rule == "median":
        return median_high(ends)
    if rule == "mode":
        return max(set(ends), key=lambda end: (ends.count(end), end))
    return sorted(ends)[(len(ends) - 1) // 4]


def batch_cuts(ends: Sequence[int], size: int) -> list[int]:
    """For each batch of `size` consecutive examples the lowest end: what one of them must train, all do."""
    return [min(ends[start : start + size]) for start in range(0, len(ends), size)]


# -- the strategy --------------------------------------------------------------------------------------------------


def salf(anatomy: Anatomy, options: FreezeOptions, num_steps: int | None = None) -> FreezePlan:
    """Freeze the layers below the calibration data's cut, and the embedding with them."""
    assert options.scores is not None, "FreezeOptions has checked it"
    if options.min_layers > len(anatomy.blocks):
        raise UserError(
            f"freeze.min_layers is {options.min_layers}, but {anatomy.name} has {len(anatomy.blocks)} layers. "
            f"Write a number from 1 to {len(anatomy.blocks)}."
        )
    traces = read_traces(options.scores, options.trace, anatomy)
    ends = [end_of_freezing(trace, options) for trace in traces]
    cut = dataset_cut(ends, options.cut)
    same = ends.count(cut)
    notes = (
        f"freezing ends after {cut} of {len(anatomy.blocks)} layers, the {options.cut} of {len(ends)} examples (gain "
        f"{options.gain}; {same} of them end there, the others between {min(ends)} and {max(ends)})",
    )
    chosen = frozenset(t.name for layer in anatomy.blocks[cut:] for t in layer.tensors)
    chosen |= auto_ends(anatomy, chosen, adapter=options.adapter is not None)
    return build_plan(anatomy, options, [Stage(0, None, chosen)], notes)
