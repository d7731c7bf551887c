"""Whether a stretch of the run is worth caching, and where: what `freeze.prefix_cache` asks for, held against what there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.engine.process import everyones, together
from dsfreeze.engine.ranks import Ranks
from dsfreeze.errors import UserError
from dsfreeze.estimate.caching import MEMORY_SHARE, CacheCost, Choice, asked_for, cache_cost, choose, require_room
from dsfreeze.hardware import DEVICES, Device, find_device
from dsfreeze.job import Job, dtype_of, room_of
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.eviction import groups_of
from dsfreeze.prefix.levels import disk_root, free_disk, free_memory
from dsfreeze.prefix.passage import cut_of
from dsfreeze.prefix.streaming import scratch_bytes
from dsfreeze.recipe import Recipe


@dataclass(frozen=True)
class Stretch:
    """Steps, the next one to the last, in which no layer of the prefix trains; `layers` are the prefix's, input first."""

    cut: int
    layers: tuple[Layer, ...]
    trainable: tuple[str, ...]
    num_steps: int


def stretch_of(plan: FreezePlan, anatomy: Anatomy, phase: Phase, step: int, num_steps: int) -> Stretch:
    """From `step` on, while the phases that follow leave this one's prefix alone. What an adaptive plan has not decided yet counts
    as leaving it alone."""
    cut = cut_of(anatomy, phase.trainable)
    blocks = [layer for layer in anatomy.prefix(phase.trainable) if layer.is_block]
    layers = anatomy.layers[: anatomy.layers.index(blocks[-1]) + 1] if blocks else ()
    held = {tensor.name for layer in layers for tensor in layer.tensors}
    ends = (p.first_step for p in plan.phases if p.first_step > phase.first_step and held & set(p.trainable))
    return Stretch(cut, layers, phase.trainable, min(min(ends, default=num_steps), num_steps) - step)


@dataclass(frozen=True)
class There:
    """What lies on disk already of a stretch's states; asked for only where it matters (both collective)."""

    complete: Callable[[], bool]
    """Whether every rank finds the states of all training examples."""
    nbytes: Callable[[], int]
    """Bytes of states that are there."""


def choose_tier(
    job: Job,
    ranks: Ranks,
    stretch: Stretch,
    steps_per_epoch: int,
    tokens: tuple[int, int],
    there: There,
    *,
    first: bool,
) -> Choice:
    """The tier, and why (collective: all ranks choose alike). UserError where the one asked for has no room at the `first` choice of a
    run; later on the run goes on without."""
    wanted = job.recipe.freeze.prefix_cache
    if not stretch.cut:
        return Choice("off", "off: no transformer layer lies below all that trains")
    assert wanted != "off", "nobody asks then"
    cost = _cost(job, ranks, stretch, steps_per_epoch, tokens)
    waiting = _waiting_bytes(job, sum(tokens))
    least = _least_room(ranks, job.recipe.freeze.prefix_cache_dir)
    room = {where: max(0, free - waiting) for where, free in least.items()}
    if wanted == "auto":
        if cost.read_seconds("disk") < cost.recompute_seconds and there.complete():
            return Choice("disk", "disk: the states of all examples are stored already")
        choice = choose(cost, **room)
        if choice.tier != "off" or job.eviction is None:
            return choice
        # without its weights a prefix can only be read
        wanted = "memory" if MEMORY_SHARE * cost.size <= room["free_memory"] else "disk"
    if wanted == "disk" and cost.size > room["free_disk"]:
        room["free_disk"] += cost.size if there.complete() else there.nbytes()
    try:
        require_room(wanted, cost, **room)
    except UserError as problem:
        if first:
            raise
        return Choice("off", f"off from here on: {problem}")
    return asked_for(wanted, cost)


def _waiting_bytes(job: Job, num_tokens: int) -> int:
    """Of states that wait between groups of layers while the cache of an evicted prefix is filled."""
    if job.eviction is None:
        return 0
    dtype = dtype_of(job.recipe)
    groups = groups_of(job.plain.blocks[: job.eviction.cut], room_of(job.recipe, job.plan, job.plain), dtype)
    return scratch_bytes(num_tokens, job.anatomy.hidden_size, dtype, len(groups))


def _least_room(ranks: Ranks, folder: Path | None) -> dict[str, int]:
    """What the rank that has least has free, in bytes: machines differ, and figures change from one moment to the next."""
    told = [json.loads(text) for text in everyones(json.dumps(together(lambda: _room(ranks, folder))))]
    return {"free_memory": min(memory for memory, _ in told), "free_disk": min(disk for _, disk in told)}


def _room(ranks: Ranks, folder: Path | None) -> tuple[int, int]:
    try:
        return free_memory(ranks), free_disk(folder)
    except OSError as error:
        raise UserError(
            f"freeze.prefix_cache_dir: {disk_root(folder)} cannot be looked at: {error.strerror or error}."
        ) from error


def _cost(job: Job, ranks: Ranks, stretch: Stretch, steps_per_epoch: int, tokens: tuple[int, int]) -> CacheCost:
    codec = CODECS[stored_as(job.recipe)]
    device = _device(ranks.device)
    return cache_cost(
        job.anatomy, stretch.trainable, train_tokens=tokens[0], eval_tokens=tokens[1], sequence_length=job.recipe.data.max_length,
        token_bytes=codec.bytes_per_token(job.anatomy.hidden_size), device=device, sharers=min(ranks.world_size, device.per_node),
        visits=stretch.num_steps / steps_per_epoch, dtype_bytes=2 if job.recipe.train.bf16 else 4,
    )  # fmt: skip


def _device(device: torch.device) -> Device:
    """What we know of the machine's device; a GPU that is not in our list is taken for the one it resembles most, an H100."""
    if device.type == "cpu":
        return find_device("cpu")
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return find_device(next((known for known in DEVICES if known in name), "h100"))


def stored_as(recipe: Recipe) -> str:
    """The codec's name: `freeze.prefix_cache_dtype`, of which auto is the run's own precision."""
    wanted = recipe.freeze.prefix_cache_dtype
    return precise(recipe) if wanted == "auto" else wanted


def precise(recipe: Recipe) -> str:
    """The codec that stores the run's states as they are."""
    return "bf16" if recipe.train.bf16 else "fp32"
