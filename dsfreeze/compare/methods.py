"""The methods that a comparison knows by name, as data: what each changes in a recipe's `freeze:`. No torch.

A method that draws what trains draws with the run's seed. Those that need an analysis name the score it takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """`analyze`: the score that `dsfreeze analyze` takes of the start model and the training data beforehand, for freeze.scores."""

    about: str
    freeze: Mapping[str, Any]
    analyze: str | None = None


def _of(about: str, strategy: str, analyze: str | None = None, **options: Any) -> Method:
    return Method(about, {"strategy": strategy, **options}, analyze)


METHODS: dict[str, Method] = {
    "full": _of("everything trains", "full"),
    "head": _of("the head alone", "head"),
    "bottom25": _of("the bottom 25 % of the layers frozen (BOT)", "bottom", fraction=0.25),
    "bottom50": _of("the bottom 50 %", "bottom", fraction=0.5),
    "bottom75": _of("the bottom 75 %", "bottom", fraction=0.75),
    "top25": _of("the top 25 % of the layers frozen (TOP)", "top", fraction=0.25),
    "top50": _of("the top 50 %", "top", fraction=0.5),
    "interval2": _of("every second layer frozen (INT)", "interval", fraction=0.5),
    "interval4": _of("every fourth layer frozen", "interval", fraction=0.25),
    "random": _of("half of the layers frozen, drawn anew with each seed", "random", fraction=0.5),
    "adt_h": _of("the half of the layers frozen that moved most in 5 steps (ADT-H)", "adt_h", fraction=0.5),
    "adt_l": _of("the half that moved least (ADT-L)", "adt_l", fraction=0.5),
    "autofreeze": _of("front layers freeze as their gradients settle (AutoFreeze)", "autofreeze"),
    "gradual_unfreezing": _of("from the top down, a layer more at a time (ULMFiT)", "gradual_unfreezing"),
    "lisa": _of("two layers at random, redrawn every 20 steps (LISA)", "lisa"),
    "badam": _of("one layer at a time (BAdam)", "badam"),
    "salf": _of("the layers above the end of freezing (SALF)", "salf", "deviation_a"),
    "spectrum": _of("of each kind of matrix the half of highest signal-to-noise ratio trains (Spectrum)", "ranked", "snr",
                    granularity="category", fraction=0.5, score="snr"),
    "half": _of("half of each category of matrices, drawn with each seed (HFT)", "half"),
    "bitfit": _of("biases alone (BitFit)", "bitfit"),
    "norms": _of("norms alone", "norms"),
    "lora": _of("low-rank adapters of rank 8 on every layer (LoRA)", "lora"),
    "dora": _of("the same with DoRA", "dora"),
    "lora_bottom": _of("LoRA on the top half of the layers", "bottom", fraction=0.5, adapter={"kind": "lora"}),
}  # fmt: skip
