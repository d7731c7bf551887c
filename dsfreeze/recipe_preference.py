"""`preference:` of a recipe: what a preference task minimises. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dsfreeze.recipe_section import Section

#: The task that reads a key of `preference:`; the others refuse it.
PREFERENCE_KEYS: dict[str, tuple[str, ...]] = {"loss": ("preference",), "beta": ("preference",)}


class PreferenceOptions(Section):
    """What `task: preference` minimises [DPO, arXiv 2305.18290]."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """DPO's own loss, IPO's (arXiv 2310.12036) of the mean over an answer's tokens, or the hinge of SLiC (2305.10425)."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How much a departure from the reference model, the one before the first step, costs; IPO's tau."""
