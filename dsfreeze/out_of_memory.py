"""A run that did not fit: what it was predicted to take, what the device has, and which changes are predicted to take less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import psutil
import torch

from dsfreeze.activations import TaskActivations
from dsfreeze.errors import UserError
from dsfreeze.estimate.price import PlanCost
from dsfreeze.job import Job
from dsfreeze.plan import FreezePlan
from dsfreeze.prediction import stored_of
from dsfreeze.recipe import Recipe
from dsfreeze.setting import Workload, setting_of, workload_of
from dsfreeze.strategies import make_plan
from dsfreeze.tables import gib


def explained(error: BaseException, job: Job, device: torch.device, world_size: int, doing: str) -> UserError:
    """The message for an error that `is_out_of_memory`; `doing` says where, such as "step 3". Never raises another in its place."""
    lines = [f"Out of memory in {doing}: {' '.join(str(error).split()):.300}"]
    with suppress(
        Exception
    ):  # of a model that cannot be priced there are no figures; the message must come all the same
        lines += list(_figures(job, device, world_size))
    return UserError("\n".join(lines))


def _figures(job: Job, device: torch.device, world_size: int) -> Iterator[str]:
    prices = _Prices(job, world_size)
    setting, work = setting_of(job.recipe, world_size), workload_of(job.recipe)
    took = prices.peak(job.plan, work, setting.stage, setting.offload)
    yield f"  by prediction the run takes {gib(took)} on each device at its peak, libraries left out; this one has {gib(_room(device))}"
    ways = [(words, size) for words, size in prices.ways(setting.stage, setting.offload, work) if size < took]
    for words, size in sorted(ways, key=lambda way: way[1]):
        yield f"  with {words}: {gib(size)}"
    yield "  More ways, and what fits a limit: dsfreeze plan RECIPE --fit SIZE"


class _Prices:
    """Predicted peaks of the job as it is, and with one thing changed."""

    def __init__(self, job: Job, world_size: int) -> None:
        self.job, self.recipe, self.world_size = job, job.recipe, world_size
        self.dtype_bytes = setting_of(job.recipe, world_size).dtype_bytes
        self.stored: TaskActivations = stored_of(job, self.dtype_bytes)

    def peak(self, plan: FreezePlan, work: Workload, stage: int, offload: bool) -> int:
        cost = PlanCost(
            plan.adapted(self.job.plain), plan, self.stored, work, dtype_bytes=self.dtype_bytes,
            sequence_length=self.recipe.data.max_length, num_steps=max(1, self.recipe.train.max_steps),
        )  # fmt: skip
        price = cost.at(stage, self.world_size, offload=offload)
        return price.peaks.most

    def ways(self, stage: int, offload: bool, work: Workload) -> Iterator[tuple[str, int]]:
        train, plan = self.recipe.train, self.job.plan
        batch, steps = train.per_device_train_batch_size, train.gradient_accumulation_steps
        if batch > 1:
            words = f"train.per_device_train_batch_size={batch // 2} train.gradient_accumulation_steps={steps * 2}"
            smaller = replace(work, micro_batch_size=work.micro_batch_size // 2, gradient_accumulation_steps=steps * 2)
            yield words, self.peak(plan, smaller, stage, offload)
        if not train.gradient_checkpointing:
            recomputing = replace(work, gradient_checkpointing=True)
            yield "train.gradient_checkpointing=true", self.peak(plan, recomputing, stage, offload)
        if self.world_size > 1 and stage < 3:
            yield "zero=zero3", self.peak(plan, work, 3, False)
        if (frozen := _more_frozen(self.recipe)) is not None:
            more = make_plan(self.job.plain, frozen.planned_freeze, None)
            yield f"freeze.fraction={frozen.freeze.fraction:g}", self.peak(more, work, stage, offload)


def _more_frozen(recipe: Recipe) -> Recipe | None:
    """A quarter of the layers more, where the recipe freezes a share of them from the bottom."""
    freeze = recipe.freeze
    if freeze.strategy != "bottom" or freeze.fraction is None or freeze.fraction >= 0.75:
        return None
    return recipe.model_copy(
        update={"freeze": freeze.model_copy(update={"fraction": min(0.75, freeze.fraction + 0.25)})}
    )


def _room(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)
