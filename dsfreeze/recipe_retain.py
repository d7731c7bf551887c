"""`retain:` of a recipe: what is done beside the objective so that earlier tasks are not forgotten. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dsfreeze.recipe_section import Section


class RetainOptions(Section):
    """What keeps earlier tasks, beside a freeze plan (docs/methods/retaining.md)."""

    method: Literal["none"] = "none"
    """Which method."""
    memory: Path | None = None
    """Folder that earlier tasks left (`remember`); None for a first task."""
    remember: Path | None = None
    """Folder to write at the end for later tasks: what `memory` holds, and this task's share."""
