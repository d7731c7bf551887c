"""Trackers beside the record: TensorBoard and Weights & Biases, behind three methods. Rank 0 alone may start them: the
caller sees to that.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe
from dsfreeze.recipe_yaml import dump_yaml


class Tracker(Protocol):
    """What a tracker can do. It is started once, told of steps in order, and finished once."""

    def start(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        """Begin a run: its name, the folder it may write to, and the resolved recipe."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Numbers of one step under their full names (train/loss); what is no number is passed over."""

    def finish(self) -> None:
        """Write what is left and close."""


class TensorBoard:
    """Event files in `folder`/tensorboard, by torch.utils.tensorboard; the recipe is shown as text."""

    def start(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self.writer = module.SummaryWriter(log_dir=str(folder / "tensorboard"))
        self.writer.add_text("recipe", f"```\n{dump_yaml(dict(recipe))}```")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        for key, value in numbers(values).items():
            self.writer.add_scalar(key, value, step)

    def finish(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of project `dsfreeze` (WANDB_PROJECT and wandb's other variables have the last word)."""

    def start(self, name: str, folder: Path, recipe: Mapping[str, Any]) -> None:
        wandb = _import("wandb", "wandb")
        project = os.environ.get("WANDB_PROJECT", "dsfreeze")
        try:
            self.run = wandb.init(project=project, name=name, dir=str(folder), config=dict(recipe))
        except wandb.errors.Error as error:
            raise UserError(
                f"wandb did not start: {error}. Log in with `wandb login`, set WANDB_MODE=offline, or leave wandb out "
                "of train.report_to."
            ) from None

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self.run.log(numbers(values), step=step)

    def finish(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Callable[[], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require_trackers(recipe: Recipe) -> None:
    """UserError when a tracker that train.report_to names is not installed."""
    for name in recipe.train.report_to:
        if importlib.util.find_spec(name) is None:
            raise UserError(_missing(name))


def start_trackers(recipe: Recipe) -> list[Tracker]:
    """The trackers that train.report_to names, started; UserError when one is not installed or will not start."""
    require_trackers(recipe)
    folder = recipe.train.output_dir
    started: list[Tracker] = []
    for name in recipe.train.report_to:
        tracker = TRACKERS[name]()
        tracker.start(recipe.train.run_name or folder.name, folder, recipe.model_dump(mode="json"))
        started.append(tracker)
    return started


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values; true and false are none."""
    return {
        key: value for key, value in values.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _import(module: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(_missing(name)) from None


def _missing(name: str) -> str:
    return f"train.report_to names {name}, which is not installed: pip install {name}, or remove it there."
