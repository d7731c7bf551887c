"""What a run is predicted to take, and ranks chosen by that: LoRA with as many parameters as another method, or with no higher peak.

No torch for models whose shapes are known; others are read once from their config.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import psutil

from dsfreeze.activations import TaskActivations
from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.estimate import estimate
from dsfreeze.estimate.price import PlanCost
from dsfreeze.plan import FreezePlan
from dsfreeze.planner.request import ReadAnatomy, activations_of
from dsfreeze.recipe import AdapterOptions, Recipe
from dsfreeze.setting import setting_of, workload_of
from dsfreeze.strategies import make_plan

#: Bytes of a process beside what its model takes: the libraries, on a CPU (measured: 0.5 to 0.7 GiB).
LIBRARIES = 3 * 2**28
#: Steps by which a moving plan is priced whose run counts epochs. Its phases hold the same whatever its length.
STEPS = 10_000


def free_memory() -> int:
    """Bytes of host memory that are free now."""
    return int(psutil.virtual_memory().available)


class Prices:
    """Plans and predicted bytes of recipes; every model is read once."""

    def __init__(self, read: ReadAnatomy) -> None:
        self._read = read
        self._anatomies: dict[str, Anatomy | UserError] = {}
        self._activations: dict[str, TaskActivations] = {}

    def anatomy(self, recipe: Recipe) -> Anatomy:
        """Of the recipe's task model; UserError when there is no such model, or it cannot do the task."""
        key = f"{recipe.model.model_dump_json()} {recipe.task} {recipe.data.labels} {recipe.data.num_labels}"
        if key not in self._anatomies:
            try:
                self._anatomies[key] = self._read(recipe)[0]
            except UserError as error:
                self._anatomies[key] = error
            except (ImportError, OSError, RuntimeError, ValueError) as error:
                told = " ".join(str(error).split())
                self._anatomies[key] = UserError(f"The model '{recipe.model.name}' cannot be read: {told}")
        found = self._anatomies[key]
        if isinstance(found, UserError):
            raise found
        return found

    def plan(self, recipe: Recipe) -> FreezePlan:
        """The plan that the run begins with; UserError when the model cannot have it."""
        return make_plan(self.anatomy(recipe), recipe.planned_freeze, _steps(recipe), setting_of(recipe, 1))

    def trainable(self, recipe: Recipe) -> int:
        """Elements that train at once at the most, as a run's summary counts them."""
        return estimate(self.anatomy(recipe), self.plan(recipe), num_steps=_steps(recipe)).trainable

    def peak(self, recipe: Recipe) -> int:
        """Bytes of the fullest moment on one device, host memory included; a prefix cache spares nothing while it is filled."""
        if not recipe.freeze.evict_prefix:
            freeze = recipe.freeze.model_copy(update={"prefix_cache": "off"})
            recipe = recipe.model_copy(update={"freeze": freeze})
        setting = setting_of(recipe, 1)
        cost = PlanCost(
            self.anatomy(recipe), self.plan(recipe), self._stored(recipe, setting.dtype_bytes), workload_of(recipe),
            dtype_bytes=setting.dtype_bytes, sequence_length=recipe.data.max_length, num_steps=_steps(recipe),
        )  # fmt: skip
        price = cost.at(setting.stage, 1, offload=setting.offload)
        return price.peaks.most + price.host

    def _stored(self, recipe: Recipe, dtype_bytes: int) -> TaskActivations:
        key = f"{recipe.model.model_dump_json()} {recipe.task} {dtype_bytes}"
        if key not in self._activations:
            found = activations_of(recipe, dtype_bytes)
            self._activations[key] = found.of(recipe.task, recipe.model.attn_implementation, dtype_bytes)
        return self._activations[key]


@dataclass(frozen=True)
class Match:
    """Chooses the rank of a recipe's adapters. The scale alpha / r stays, so that the rank is all that differs."""

    prices: Prices
    recipe: Recipe
    other: Recipe
    by: Literal["parameters", "memory"]
    names: tuple[str, str]
    """Of the two methods, for messages."""

    def recipe_at(self, rank: int) -> Recipe:
        """The recipe with that rank."""
        options = self.recipe.freeze.adapter or AdapterOptions(kind="dora" if self._strategy == "dora" else "lora")
        adapter = options.model_copy(update={"r": rank, "alpha": options.alpha * rank / options.r})
        freeze = self.recipe.freeze.model_copy(update={"adapter": adapter})
        return self.recipe.model_copy(update={"freeze": freeze})

    @property
    def _strategy(self) -> str:
        return self.recipe.freeze.strategy

    @cached_property
    def most(self) -> int:
        """Ranks above the width of the model's states say nothing more."""
        return self.prices.anatomy(self.recipe).hidden_size

    def matched(self) -> Recipe:
        """The recipe at the rank that matches; UserError when none does."""
        if self.by == "parameters":
            return self.recipe_at(self._by_parameters())
        return self.recipe_at(self._by_memory())

    def _by_parameters(self) -> int:
        """The nearest number of parameters, which grow evenly with the rank."""
        wanted = self.prices.trainable(self.other)
        one, two = (self.prices.trainable(self.recipe_at(rank)) for rank in (1, 2))
        rank = 1 + round((wanted - one) / (two - one))
        if not 1 <= rank <= self.most:
            asked = (
                "no rank has so few" if rank < 1 else f"it takes rank {rank:,}, above the model's width of {self.most}"
            )
            raise UserError(f"{self.names[0]} cannot have the {wanted:,} parameters of {self.names[1]}: {asked}.")
        return rank

    def _by_memory(self) -> int:
        """The highest rank whose predicted peak is no higher; peaks grow with the rank, so halving finds it."""
        limit = self.prices.peak(self.other)
        low, high = 0, self.most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.prices.peak(self.recipe_at(middle)) <= limit else (low, middle - 1)
        if not low:
            least = self.prices.peak(self.recipe_at(1))
            raise UserError(
                f"{self.names[0]} cannot have the peak of {self.names[1]}: {limit:,} bytes by prediction, and rank 1 takes {least:,}."
            )
        return low


def _steps(recipe: Recipe) -> int:
    return recipe.train.max_steps if recipe.train.max_steps > 0 else STEPS
