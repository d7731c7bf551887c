"""What is minimised: the model's own loss, or another one made of its outputs (`Objective`), and what is added to it so that
earlier tasks are retained (`Term`).

An objective sees one micro-batch; a term sees the engine, and has its say once a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from dsfreeze.engine import Engine
    from dsfreeze.recipe import Recipe


class Objective:
    """The model's own mean loss (supervised tasks)."""

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """What of a batch the model is called with."""
        return batch

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Scalar: the mean over the batch's items (`TaskData.num_items`); None where the batch has no labels."""
        loss: torch.Tensor | None = outputs.loss
        return loss


def objective_of(recipe: Recipe) -> Objective:
    """What the recipe's task minimises."""
    if recipe.task != "preference":
        return Objective()
    from dsfreeze.objectives.preference import Preference

    return Preference(recipe.preference.loss, recipe.preference.beta)


class Term:
    """Something beside the objective, such as a penalty or a projection of the gradient; as it stands it does nothing. Every rank
    has its own; calls are collective where an engine's are."""

    #: What it is and in which version, for the record.
    rule: str = ""

    def start(self, engine: Engine) -> None:
        """Before anything else: the engine holds the weights that the run starts from, also where a checkpoint's follow."""

    def before_passes(self, engine: Engine, step: int) -> None:
        """Before a step's passes, when gradients of other passes can be taken; `step` counts from 0."""

    def before_step(self, engine: Engine, step: int) -> None:
        """Between a step's backward passes and its update."""

    def value(self, engine: Engine) -> float:
        """What it added to the loss of the step, the same on every rank."""
        return 0.0

    def finish(self, engine: Engine) -> None:
        """After the last step, before the last evaluation and the export: leave what later tasks need."""
