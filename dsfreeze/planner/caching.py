"""What a planner says of the prefix cache: bytes, the bandwidth from which reading beats recomputing, the epoch from which it pays.
Whatever the data, per million tokens; of a plan that moves, for what lies below all that ever trains. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from typing import Any

from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate import as_trained
from dsfreeze.estimate.caching import TIERS, CacheCost, Tier, bytes_a_token, cache_cost, cached_layers, epochs
from dsfreeze.hardware import Device, find_device
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import Recipe
from dsfreeze.setting import setting_of
from dsfreeze.tables import gib

MILLION = 1_000_000
_WHERE: dict[Tier, str] = {"memory": "in memory", "disk": "on disk"}


def visits_of(recipe: Recipe) -> float | None:
    """Epochs of a recipe's run; None where it counts steps, for the data's length is not read here."""
    return None if recipe.train.max_steps > 0 else recipe.train.num_train_epochs


def cache_of(
    anatomy: Anatomy, plan: FreezePlan, *, storage: str, dtype_bytes: int, sequence_length: int, device: Device, ranks: int,
    visits: float | None = None, scale: float = 1.0,
) -> CacheCost | None:  # fmt: skip
    """The cache of a million tokens under a plan; None where no layer is frozen below all that trains, or nobody knows yet."""
    adapted = as_trained(anatomy, plan)
    if plan.decide_at is not None or not cached_layers(adapted, plan.ever_trained):
        return None
    return cache_cost(
        adapted, plan.ever_trained, train_tokens=MILLION, sequence_length=sequence_length,
        token_bytes=bytes_a_token(anatomy.hidden_size, storage, dtype_bytes), device=device,
        sharers=min(ranks, device.per_node), visits=inf if visits is None else visits, dtype_bytes=dtype_bytes,
        scale=scale,
    )  # fmt: skip


def cache_of_run(
    recipe: Recipe, anatomy: Anatomy, plan: FreezePlan, world_size: int
) -> tuple[CacheCost | None, Device]:
    """That of a recipe's run, and the device it is priced on: an h100 in bf16, in fp32 this machine's CPU."""
    device, setting = find_device("h100" if recipe.train.bf16 else "cpu"), setting_of(recipe, world_size)
    found = cache_of(
        anatomy, plan, storage=recipe.freeze.prefix_cache_dtype, dtype_bytes=setting.dtype_bytes,
        sequence_length=setting.sequence_length, device=device, ranks=world_size, visits=visits_of(recipe),
    )  # fmt: skip
    return found, device


def cache_as_dict(cost: CacheCost, device: Device) -> dict[str, Any]:
    """Plain values; seconds of one device and one token, bandwidths of one device."""
    return {
        "device": device.name,
        "layers": cost.layers,
        "token_bytes": cost.token_bytes,
        "bytes_per_million_tokens": cost.size,
        "recompute_seconds": cost.recompute_seconds,
        "needed_bandwidth": cost.needed_bandwidth,
        "read_seconds": {tier: cost.read_seconds(tier) for tier in TIERS},
        "bandwidth": {tier: cost.token_bytes / cost.read_seconds(tier) for tier in TIERS},
        "break_even_epoch": {tier: cost.break_even(tier) for tier in TIERS},
        "visits": None if cost.visits == inf else cost.visits,
    }


def cache_line(cost: CacheCost, device: Device, chosen: str) -> str:
    """One plan's cache in three lines, as the picture's other figures; `chosen` is the recipe's freeze.prefix_cache."""
    disk, memory = (cost.token_bytes / cost.read_seconds(tier) / 1e9 for tier in reversed(TIERS))
    found = {tier: epoch for tier, epoch in _break_even(cost).items() if epoch}
    twice = cost.visits > 1
    pays = f"pays {_when(found)}" if twice else f"no example comes twice in {epochs(cost.visits)}"
    advice = "; off here: freeze.prefix_cache=auto" if found and twice else ""
    blank = " " * 17
    return (
        f"prefix cache     {gib(cost.token_bytes)} a token of {_layers(cost)}, {gib(cost.size)} a million tokens\n"
        f"{blank}reading pays above {_speed(cost.needed_bandwidth)} ({device.name}: disk {disk:.3g}, memory {memory:.3g} GB/s)\n"
        f"{blank}{pays}{advice if chosen == 'off' else f'; here: {chosen}'}"
    )


def cache_caption(caches: Mapping[str, CacheCost], device: Device, ranks: int, tier: Tier) -> Iterator[str]:
    """A table's caption: how fast the device reads, and for each plan from when on that pays. `tier` is what the table's seconds read."""
    if not caches:
        yield "No plan has a transformer layer below all that trains: there is nothing to cache."
        return
    one = next(iter(caches.values()))
    speeds = " and ".join(f"{_speed(one.token_bytes / one.read_seconds(t))} from {t}" for t in TIERS)
    sharing = min(ranks, device.per_node)
    shared = f" ({sharing} share the disk)" if sharing > 1 else ""
    yield (
        f"Prefix cache: {gib(one.token_bytes)} a token, {gib(one.size)} a million tokens. A device reads {speeds}{shared}; the "
        f"seconds above are with {tier}. Reading beats recomputing:"
    )
    for label, cost in caches.items():
        yield f"  {label}: above {_speed(cost.needed_bandwidth)}; pays {_when(_break_even(cost))}"


def _break_even(cost: CacheCost) -> dict[Tier, int | None]:
    return {tier: cost.break_even(tier) for tier in TIERS}


def _when(found: Mapping[Tier, int | None]) -> str:
    """Break-even epochs in words: once where every tier has the same, else by tier; never where there is none."""
    if len(found) in (0, len(TIERS)) and len(set(found.values())) <= 1:
        return _epoch(next(iter(found.values()), None))
    return ", ".join(f"{_WHERE[tier]} {_epoch(epoch)}" for tier, epoch in found.items())


def _epoch(epoch: int | None) -> str:
    return "never" if epoch is None else f"from epoch {epoch}"


def _layers(cost: CacheCost) -> str:
    return f"{cost.layers} layer{'s' * (cost.layers > 1)}"


def _speed(bandwidth: float) -> str:
    """GB/s or MB/s (powers of ten, as data sheets have it) in three digits."""
    return f"{bandwidth / 1e9:.3g} GB/s" if bandwidth >= 1e9 else f"{bandwidth / 1e6:.3g} MB/s"
