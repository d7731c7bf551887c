"""What `dsfreeze plan` was asked for: a recipe, where it would run, and how the table is cut. No torch unless the model is unknown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsfreeze.activations import Activations
from dsfreeze.anatomy import Anatomy
from dsfreeze.budget import parse_limit
from dsfreeze.errors import UserError
from dsfreeze.estimate.caching import CacheCost
from dsfreeze.estimate.price import PlanCost, Price
from dsfreeze.hardware import DEVICES, Device, find_device
from dsfreeze.plan import FreezePlan
from dsfreeze.planner.caching import cache_of, visits_of
from dsfreeze.planner.calibration import Calibration, calibrate
from dsfreeze.planner.fit import Fit
from dsfreeze.planner.sweep import STRATEGIES, Ground, plans_of
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record
from dsfreeze.setting import setting_of, workload_of
from dsfreeze.shapes import known_activations
from dsfreeze.strategies import make_plan

MOST_GPUS = 65_536
ReadAnatomy = Callable[[Recipe], tuple[Anatomy, tuple[str, ...]]]


@dataclass(frozen=True)
class Request:
    """The options of `dsfreeze plan` beside its recipe, as they were typed; None where they were not."""

    gpus: str | None = None
    device: str | None = None
    fit: str | None = None
    calibrate: Path | None = None
    global_batch_size: int | None = None
    prefix_cache: bool = False

    @property
    def wants_table(self) -> bool:
        """Whether more was asked for than the picture of one plan."""
        return any((self.gpus, self.device, self.fit, self.calibrate, self.global_batch_size, self.prefix_cache))


def words_of(
    words: Sequence[str] | None, model: str | None, sequence_length: int | None, micro_batch: int | None, checkpointing: bool | None,
    device: str | None,
) -> list[str]:  # fmt: skip
    """The recipe's words with those that short options stand for. A bare `--model` means a language model, in bf16 on an accelerator,
    one sequence a micro-batch, checkpointing on: what large models are trained with."""
    given = list(words or ())
    keys = {word.partition("=")[0] for word in given}

    def add(key: str, value: Any) -> None:
        if value is not None and key not in keys:
            given.append(f"{key}={value}")

    if model is not None and not {"model", "model.name"} & keys:
        add("model.name", model)
    add("data.max_length", sequence_length)
    add("train.per_device_train_batch_size", micro_batch)
    add("train.gradient_checkpointing", None if checkpointing is None else str(checkpointing).lower())
    if model is not None and all("=" in word for word in given):
        keys = {word.partition("=")[0] for word in given}
        large = (device or "h100").casefold() != "cpu"
        add("task", "causal_lm")
        add("train.per_device_train_batch_size", 1)
        add("train.bf16", str(large).lower())
        add("train.gradient_checkpointing", str(large).lower())
    return given


def parse_gpus(text: str) -> tuple[int, ...]:
    """`8,16,64`, or `1..1024` for the powers of two from one to the other (and the other itself)."""
    form = re.fullmatch(r"\s*(\d+)\s*\.\.\s*(\d+)\s*", text)
    if form:
        low, high = map(int, form.groups())
        counts = [low, *(low * 2**i for i in range(1, 17) if low and low * 2**i <= high), high]
    else:
        parts = text.split(",")
        if not all(re.fullmatch(r"\s*\d{1,9}\s*", part) for part in parts):
            raise UserError(f"--gpus {text}: write numbers such as 8,16,64, or a range such as 1..1024.")
        counts = [int(part) for part in parts]
    if not counts or min(counts) < 1 or max(counts) > MOST_GPUS or (form and low > high):
        raise UserError(
            f"--gpus {text}: a cluster has 1 to {MOST_GPUS:,} devices, and a range goes up. Write 8,16,64 or 1..1024."
        )
    return tuple(sorted(set(counts)))


def parse_budget(text: str) -> int:
    """Bytes of `80GiB`; UserError with the right form."""
    try:
        limit = parse_limit("memory", text)
    except ValueError as error:
        raise UserError(f"--fit: {error}.") from None
    if limit.relative:
        raise UserError(f"--fit {text}: write the bytes of a device, such as 80GiB.")
    return int(limit.amount)


@dataclass(frozen=True)
class Planner:
    """A request made concrete."""

    recipe: Recipe
    ground: Ground
    gpus: tuple[int, ...]
    global_batch_size: int | None
    calibration: Calibration | None
    notes: tuple[str, ...]

    def plans(self) -> tuple[dict[str, Any], dict[str, str]]:
        """(plans, reasons of those left out): the recipe's own where it chooses one, and the usual ones to compare with."""
        options = dict(STRATEGIES)
        own = self.recipe.freeze.model_dump(exclude_unset=True)
        if own:
            options = {f"yours: {self.recipe.freeze.strategy}": own, **options}
        return plans_of(self.ground.anatomy, options, self.ground.num_steps)

    def caches(self, plans: Mapping[str, FreezePlan]) -> dict[str, CacheCost]:
        """The prefix cache of those that have a prefix, on the largest cluster; {} where none was asked for."""
        ground, work = self.ground, self.ground.workload
        found = {
            label: cache_of(
                ground.anatomy, plan, storage=work.prefix_cache_dtype, dtype_bytes=ground.dtype_bytes,
                sequence_length=ground.sequence_length, device=ground.device, ranks=max(self.gpus),
                visits=visits_of(self.recipe), scale=ground.scale,
            )
            for label, plan in plans.items()
            if work.prefix_cache
        }  # fmt: skip
        return {label: cost for label, cost in found.items() if cost is not None}

    def fit(self, gpus: int) -> Fit:
        return Fit(self.ground, gpus, self.global_batch_size)


def make_planner(recipe: Recipe, request: Request, read: ReadAnatomy, num_steps: int | None) -> Planner:
    """Everything a table or a fit needs; UserError for a device, a batch, a calibration or a model that cannot be priced."""
    device = _device(request)
    gpus = parse_gpus(request.gpus or ("1" if device.name == "cpu" else "1,8,64"))
    anatomy, notes = read(recipe)
    dtype_bytes = 2 if recipe.train.bf16 else 4
    workload = workload_of(recipe)
    workload = replace(workload, prefix_cache=workload.prefix_cache or request.prefix_cache)
    if request.global_batch_size is not None and request.fit is None:
        workload = replace(
            workload,
            gradient_accumulation_steps=_accumulation(request.global_batch_size, workload.micro_batch_size, gpus),
        )
    ground = Ground(
        anatomy=anatomy,
        activations=activations_of(recipe, dtype_bytes).of(recipe.task, recipe.model.attn_implementation, dtype_bytes),
        workload=workload,
        device=device,
        dtype_bytes=dtype_bytes,
        sequence_length=recipe.data.max_length,
        num_steps=num_steps,
        budget=parse_budget(request.fit) if request.fit else None,
    )
    calibration = None
    if request.calibrate is not None:
        calibration = calibrate(request.calibrate, device, lambda *run: price_of_run(read, *run))
        ground = replace(ground, scale=calibration.scale)
    return Planner(recipe, ground, gpus, request.global_batch_size, calibration, notes)


def price_of_run(read: ReadAnatomy, recipe: Recipe, world_size: int, length: int) -> Price:
    """The price of a run's own plan at its own setting."""
    anatomy, _ = read(recipe)
    setting = setting_of(recipe, world_size)
    num_steps = recipe.train.max_steps if recipe.train.max_steps > 0 else None
    plan = make_plan(anatomy, recipe.freeze, num_steps, setting)
    found = activations_of(recipe, setting.dtype_bytes).of(
        recipe.task, recipe.model.attn_implementation, setting.dtype_bytes
    )
    cost = PlanCost(
        anatomy, plan, found, workload_of(recipe), dtype_bytes=setting.dtype_bytes, sequence_length=length, num_steps=num_steps
    )  # fmt: skip
    return cost.at(setting.stage, world_size, offload=setting.offload)


def activations_of(recipe: Recipe, dtype_bytes: int) -> Activations:
    """Shipped, added, or read from the model's config (which imports torch)."""
    known = known_activations(recipe.model.name)
    if known is not None:
        return known
    from dsfreeze.model import activations_of as read_from_config

    return read_from_config(
        recipe.model, recipe.task, attention=recipe.model.attn_implementation, dtype_bytes=dtype_bytes
    )


def _device(request: Request) -> Device:
    """The one named, or the calibrating run's; nothing is taken for granted, since every figure depends on it."""
    if request.device is not None:
        return find_device(request.device)
    if request.calibrate is not None:
        return find_device(str(read_record(request.calibrate).environment.get("device", "unknown")))
    raise UserError(f"Say on which device: --device, one of {', '.join(DEVICES)}.")


def _accumulation(global_batch_size: int, micro: int, gpus: Iterable[int]) -> int:
    """Micro-steps that make the global batch on the one cluster asked for; they must be whole on every one."""
    found = set()
    for count in gpus:
        whole, rest = divmod(global_batch_size, micro * count)
        if rest or not whole:
            raise UserError(
                f"A global batch of {global_batch_size} sequences cannot be shared by {count} devices in micro-batches of {micro}: "
                f"write a multiple of {micro * count} in --global-batch, or another --batch or --gpus."
            )
        found.add(whole)
    if len(found) > 1:
        raise UserError(
            "--global-batch with several --gpus asks for several accumulations: name one cluster, or leave it to --fit."
        )
    return found.pop()
