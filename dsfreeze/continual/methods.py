"""The methods that can be compared on a sequence, as data: what each changes in the recipe of a round. No torch.

A method is a recipe's changes and at most a few words about rounds. What freezes, what is retained and how weights are merged is
done elsewhere (`freeze:`, `retain:`, merging.py); docs/continual.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

#: What a round trains on: its own task's rows, those and a sample of earlier ones, or the rows of all tasks at once.
Rows = Literal["own", "replay", "all"]
#: The model a round starts from: that of the round before, or the start model.
Start = Literal["previous", "base"]
#: How the models of a method without training are made of those of `full`.
Merge = Literal["interpolate", "average", "reset"]

#: Strategies that draw anew each round, and their key for the round's number, which counts from 0 there.
ROUND_KEYS = {"half": "round"}


@dataclass(frozen=True)
class Method:
    """`changes` are laid over the sequence's recipe; a `freeze` that names a strategy takes the place of the sequence's.

    A strategy that draws gets the run's draw as its seed. `rate` multiplies the learning rate, `length` the steps or epochs. `merge`: no training; its models are made of those that
    `full` left after each round. `retains`: rounds hand a folder on (`retain.memory`, `retain.remember`).
    """

    about: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rows: Rows = "own"
    start: Start = "previous"
    rate: float = 1.0
    length: float = 1.0
    merge: Merge | None = None

    @property
    def alone(self) -> bool:
        """Whether a round knows of no other, so that its own task is all there is to measure."""
        return self.start == "base" and self.rows == "own"

    @property
    def retains(self) -> bool:
        return "retain" in self.changes


def _freeze(strategy: str, **options: Any) -> dict[str, dict[str, Any]]:
    return {"freeze": {"strategy": strategy, **options}}


def _half(level: str = "category", masks: str = "fresh") -> dict[str, dict[str, Any]]:
    return _freeze("half", level=level, masks=masks)


def _retain(method: str) -> dict[str, dict[str, Any]]:
    return {"retain": {"method": method}}


METHODS: dict[str, Method] = {
    "full": Method("sequential full fine-tuning (SeqFT)", _freeze("full")),
    "half": Method("half of each category of matrices, drawn anew each round (HFT)", _half()),
    "half_layer": Method("half of the layers, drawn anew each round", _half("layer")),
    "half_model": Method("half of all matrices, whatever their category", _half("model")),
    "half_element": Method("half of the elements", _half("element")),
    "half_same": Method("HFT with one draw for all rounds", _half(masks="same")),
    "half_complement": Method("HFT, every second round with the other half of the round before", _half(masks="complement")),
    "salf": Method("the layers above the cut that `dsfreeze analyze` found (freeze.scores)", _freeze("salf")),
    "bottom": Method("the bottom half of the layers frozen", _freeze("bottom", fraction=0.5)),
    "top": Method("the top half of the layers frozen", _freeze("top", fraction=0.5)),
    "random": Method("a random half of the layers frozen, the same in all rounds", _freeze("random", fraction=0.5)),
    "lisa": Method("two layers at random, redrawn every few steps", _freeze("lisa")),
    "badam": Method("one layer at a time", _freeze("badam")),
    "lora": Method("low-rank adapters, merged after each round", _freeze("lora")),
    "bitfit": Method("biases alone", _freeze("bitfit")),
    "norms": Method("norms alone", _freeze("norms")),
    "lower_lr": Method("half of the learning rate (a control)", rate=0.5),
    "early_stop": Method("half of the steps (a control)", length=0.5),
    "replay": Method("a sample of earlier tasks' rows mixed in", rows="replay"),
    "multitask": Method("one round on all tasks at once: the joint upper bound", rows="all", start="base"),
    "single_task": Method("each task from the start model: the ensemble's bound", start="base"),
    "l2_sp": Method("a quadratic pull to where the round began (L2-SP)", _retain("l2_sp")),
    "ewc": Method("the pull weighted by the Fisher information (EWC)", _retain("ewc")),
    "gem": Method("gradients projected off earlier tasks' losses (GEM)", _retain("gem")),
    "a_gem": Method("the same, against their mean (A-GEM)", _retain("a_gem")),
    "der": Method("replay of rows and of stored logits (DER++)", _retain("der")),
    "o_lora": Method("adapters orthogonal to earlier ones (O-LoRA)", {**_freeze("lora"), **_retain("o_lora")}),
    "osf": Method("updates kept off the leading singular directions (OSF)", _retain("osf")),
    "packnet": Method("weights owned by earlier tasks are frozen (PackNet's training half)", _retain("packnet")),
    "wise_ft": Method("start model and `full` interpolated, alpha 0 to 1 (WiSE-FT)", merge="interpolate"),
    "soup": Method("the mean of the models that `full` left after each round", merge="average"),
    "half_reset": Method("half of what `full` changed put back to the start", _freeze("half"), merge="reset"),
}  # fmt: skip
