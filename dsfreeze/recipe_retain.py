"""`retain:` of a recipe: what is done beside the objective so that earlier tasks are not forgotten. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsfreeze.recipe_section import Section, refuse_unread

Method = Literal["none", "l2_sp", "ewc", "gem", "a_gem", "der", "o_lora", "osf", "packnet"]

_OF_EXAMPLES = ("gem", "a_gem", "der")
_ALL = ("l2_sp", "ewc", *_OF_EXAMPLES, "o_lora", "osf", "packnet")
#: The methods that read a key of `retain:`; the others refuse it.
RETAIN_KEYS: dict[str, tuple[str, ...]] = {
    "memory": _ALL,
    "remember": _ALL,
    "weight": ("l2_sp", "ewc", "o_lora"),
    "start": ("l2_sp",),
    "gamma": ("ewc",),
    "fisher_examples": ("ewc",),
    "fisher_labels": ("ewc",),
    "memory_examples": _OF_EXAMPLES,
    "memory_batch_size": _OF_EXAMPLES,
    "margin": ("gem",),
    "alpha": ("der",),
    "beta": ("der",),
    "top_k": ("der",),
    "l2": ("o_lora",),
    "effective_rank": ("osf",),
    "prune": ("packnet",),
}
#: In a memory folder: what packnet lets later tasks train.
MASKS_FILE = "trains.safetensors"
#: Weight of a method's penalty where the recipe names none.
WEIGHTS = {"l2_sp": 0.1, "ewc": 1.0, "o_lora": 0.5}


class RetainOptions(Section):
    """What keeps earlier tasks, beside a freeze plan (docs/methods/retaining.md). A run is one task of a sequence."""

    method: Method = "none"
    """Which method."""
    memory: Path | None = None
    """Folder that earlier tasks left (`remember`); None for a first task."""
    remember: Path | None = None
    """Folder to write at the end for later tasks: what `memory` holds, and this task's share."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the penalty; None takes the method's own (l2_sp 0.1, ewc 1, o_lora 0.5). It is alpha, lambda, lambda_1."""
    start: Literal["task", "sequence"] = "task"
    """l2_sp: pull to the weights that this task started from, or to those that the first task in `memory` did."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    """ewc: earlier importance is multiplied by this when a task's own is added."""
    fisher_examples: Annotated[int, Field(ge=1)] = 256
    """ewc: training examples that importance is measured on at the end of the task."""
    fisher_labels: Literal["data", "model"] = "data"
    """ewc: gradients of the data's own labels (the empirical Fisher), or of labels drawn from the model's output."""
    memory_examples: Annotated[int, Field(ge=1)] = 256
    """gem, a_gem, der: training examples of this task that are kept for later ones."""
    memory_batch_size: Annotated[int, Field(ge=1)] = 8
    """gem, a_gem, der: kept examples a step, over all ranks: of each earlier task for gem, of each of two draws for der."""
    margin: Annotated[float, Field(ge=0)] = 0.5
    """gem: lower bound of the dual variables; above 0 a projected gradient helps earlier tasks a little."""
    alpha: Annotated[float, Field(ge=0)] = 0.3
    """der: weight of the squared error to the stored logits."""
    beta: Annotated[float, Field(ge=0)] = 0.5
    """der: weight of the loss of kept examples."""
    top_k: Annotated[int, Field(ge=1)] = 64
    """der: logits kept of each item: the largest."""
    l2: Annotated[float, Field(ge=0)] = 0.0
    """o_lora: weight of the new adapters' norms (lambda_2)."""
    effective_rank: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """osf: share of each matrix's singular directions, the largest, that updates keep off."""
    prune: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """packnet: share of the weights that this task trained, the smallest of each matrix, that later tasks get."""

    @model_validator(mode="after")
    def _agree(self) -> RetainOptions:
        refuse_unread(self, RETAIN_KEYS, "retain.method", self.method)
        if self.memory is not None and self.memory == self.remember:
            raise ValueError("memory and remember are one folder; a task reads the former while it writes the latter")
        return self

    @property
    def strength(self) -> float:
        """`weight`, or the method's own."""
        return WEIGHTS[self.method] if self.weight is None else self.weight
