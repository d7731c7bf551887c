"""04, throughput: steps against what FLOPs promise, and when the prefix cache pays. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsfreeze.estimate.caching import TIERS
from dsfreeze.hardware import find_device
from dsfreeze.notebook.plans import anatomy_of
from dsfreeze.planner.caching import cache_of
from dsfreeze.recipe import FreezeOptions
from dsfreeze.record import RecordData
from dsfreeze.strategies import make_plan

Row = dict[str, Any]


def speed_rows(record: Mapping[str, Any]) -> list[Row]:
    """Of a benchmark of steps: times faster than full tuning, with quartiles over rounds, and what FLOPs promise (None where nobody
    computed it)."""
    return [
        {
            "plan": plan, "faster": found["times_faster_than_full"]["median"], "q1": found["times_faster_than_full"]["q1"],
            "q3": found["times_faster_than_full"]["q3"], "promised": found.get("by_flops"),
        }
        for plan, found in record["plans"].items()
    ]  # fmt: skip


def speed_finding(rows: Sequence[Row]) -> str:
    """How much of the promised speed-up was measured, over the plans that have one."""
    known = [row for row in rows if row["promised"] and row["promised"] > 1]
    if not known:
        return "No plan here promises to be faster than full tuning."
    kept = {row["plan"]: row["faster"] / row["promised"] for row in known}
    least, most = min(kept, key=kept.__getitem__), max(kept, key=kept.__getitem__)
    fastest = max(known, key=lambda row: row["faster"])
    return (
        f"Measured steps are {kept[least]:.2f} ({least}) to {kept[most]:.2f} ({most}) of what FLOPs promise; the fastest plan, "
        f"{fastest['plan']}, is {fastest['faster']:.2f} times as fast as full tuning."
    )


def epoch_rows(without: float, cached: float, epochs: int) -> list[Row]:
    """Times faster than full tuning over whole runs of 1 .. `epochs` epochs, of a plan that is `without` times as fast and reads its
    prefix at `cached` times. The first epoch fills the cache at the plan's own speed; writing is taken to cost nothing."""
    return [
        {"epochs": number, "way": way, "faster": number / (1 / without + (number - 1) / later)}
        for number in range(1, epochs + 1)
        for way, later in (("computed anew", without), ("prefix cached", cached))
    ]


def epoch_finding(rows: Sequence[Row], measured: Mapping[str, Any] | None = None) -> str:
    """What the cache adds to a whole run; `measured`: the epochs of real runs, and how fast they were with it and without."""
    last = max(row["epochs"] for row in rows)
    at = {row["way"]: row["faster"] for row in rows if row["epochs"] == last}
    gain = at["prefix cached"] / at["computed anew"]
    word = f"becomes {gain:.2f} times as fast with it" if gain > 1.02 else "becomes no faster with it"
    sentence = f"In one epoch the cache can only be filled; a run of {last} epochs {word}"
    if measured is None:
        return f"{sentence} (from measured steps)."
    real = measured["cached"] / measured["computed"]
    return f"{sentence} (from measured steps); whole runs of {measured['epochs']} epochs really became {real:.2f} times as fast."


def bandwidth_rows(
    models: Iterable[str], fraction: float, devices: Iterable[str], *, sequence_length: int = 1024, ranks: int = 1
) -> list[Row]:
    """Of a bottom plan of each model on each device, by formula: the bandwidth above which reading a token's prefix beats computing it,
    what each tier has, and the epoch from which it pays (None: never)."""
    rows = []
    for model in models:
        anatomy = anatomy_of(model)
        plan = make_plan(anatomy, FreezeOptions(strategy="bottom", fraction=fraction))
        for name in devices:
            device = find_device(name)
            cost = cache_of(
                anatomy, plan, storage="auto", dtype_bytes=2, sequence_length=sequence_length, device=device, ranks=ranks
            )  # fmt: skip
            if cost is None:
                continue
            rows += [
                {
                    "model": model, "parameters": anatomy.numel, "device": device.name, "tier": tier, "needed": cost.needed_bandwidth,
                    "has": cost.token_bytes / cost.read_seconds(tier), "pays_from_epoch": cost.break_even(tier),
                }
                for tier in TIERS
            ]  # fmt: skip
    return rows


def bandwidth_finding(rows: Sequence[Row]) -> str:
    paying = [row for row in rows if row["pays_from_epoch"] is not None]
    failing = sorted(
        {(row["parameters"], row["model"], row["tier"], row["device"]) for row in rows if row not in paying}
    )
    if not failing:
        return f"Reading beats computing in all {len(rows)} cases, memory and disk alike."
    told = "; ".join(f"{model} from {tier} on {device}" for _, model, tier, device in failing[:4])
    more = f" and {len(failing) - 4} more" if len(failing) > 4 else ""
    return f"By formula reading beats computing in {len(paying)} of {len(rows)} cases; it never does for {told}{more}."


# -- runs of one's own ---------------------------------------------------------------------------------------------


def run_speed_rows(records: Mapping[str, RecordData]) -> list[Row]:
    """Of finished runs: seconds of a step, and FLOPs against full tuning, where the prefix was read without what that spares."""
    rows = []
    for name, record in records.items():
        summary = record.summary
        if not summary or not summary.get("seconds_per_step"):
            continue
        cache = summary.get("prefix_cache") or {}
        reads = bool(cache.get("hits"))
        spared = cache["flops_spared"] / summary["full_flops_per_token"] if reads else 0.0
        seconds = (cache.get("seconds_per_cached_step") if reads else None) or summary["seconds_per_step"]
        rows.append({
            "run": name, "strategy": summary["strategy"] + (", cached" if reads else ""), "seconds": seconds,
            "flops_percent": 100 * (summary["flops_vs_full"] - spared),
        })  # fmt: skip
    return rows


def run_speed_finding(rows: Sequence[Row]) -> str:
    """Of runs that lie together: fastest against slowest, beside their FLOPs."""
    if len(rows) < 2:
        return f"There is {'one finished run' if rows else 'no finished run'} here, and nothing to compare."
    fast, slow = min(rows, key=lambda row: row["seconds"]), max(rows, key=lambda row: row["seconds"])
    return (
        f"Among these runs a step of {fast['run']} took {fast['seconds'] / slow['seconds']:.2f} of the time of one of {slow['run']}, at "
        f"{fast['flops_percent'] / slow['flops_percent']:.2f} of its FLOPs. Runs do not take turns as a benchmark's rounds do: on a busy machine such a ratio misleads."
    )
