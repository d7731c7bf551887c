"""Adaptive strategies: what trains next is decided from what the run itself measured. No torch here.

One short file for each rule; `ADAPTIVE` is the list of them, `needs` what the loop has to measure for a run.
"""

from __future__ import annotations

from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.adaptive import (
    adagradselect,
    adt,
    autofreeze,
    blockllm,
    egeria_like,
    grass,
    smartfrz,
    tang_like,
)  # fmt: skip
from dsfreeze.strategies.adaptive.common import Rule
from dsfreeze.strategies.evidence import Measure

ADAPTIVE: dict[str, Rule] = {
    "adt_h": adt.RULE,
    "adt_l": adt.RULE,
    "autofreeze": autofreeze.RULE,
    "tang_like": tang_like.RULE,
    "egeria_like": egeria_like.RULE,
    "smartfrz": smartfrz.RULE,
    "adagradselect": adagradselect.RULE,
    "grass": grass.RULE,
    "blockllm": blockllm.RULE,
}


def needs(options: FreezeOptions) -> frozenset[Measure]:
    """What the strategy of these options asks to be measured; nothing unless it is adaptive."""
    if options.strategy in ADAPTIVE and options.measure == "grad_l2":
        return frozenset({"gradient"})  # its point is that no copy of the start weights is kept
    return ADAPTIVE[options.strategy].needs if options.strategy in ADAPTIVE else frozenset()
