"""05, scaling: the cluster that each plan of each model needs, and what a longer sequence takes; by formula, nothing measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.hardware import find_device
from dsfreeze.notebook.memory import costs_of
from dsfreeze.notebook.plans import anatomy_of
from dsfreeze.planner.sweep import RESERVED, plans_of
from dsfreeze.setting import Workload

Row = dict[str, Any]
FULL = "full"
#: Items of a price that grow with the sequence; the others are the model's.
GROWING = ("activations", "logits and loss")


def cluster_rows(study: Mapping[str, Any]) -> list[Row]:
    """Of each plan the smallest cluster that holds it (None: none of those tried): of a study's record, or of the benchmark's."""
    try:
        return [_cluster(plan, _smallest(study, plan)) for plan in study["plans"]]
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"This is no study: {error!r} is missing or wrong. `dsfreeze plan --study STUDY.yaml` writes one."
        ) from None


def _smallest(study: Mapping[str, Any], plan: Mapping[str, Any]) -> Mapping[str, Any]:
    if "fastest_that_fits" in plan:
        cells = plan["fastest_that_fits"]
        return dict(zip(study["columns"], cells[0], strict=True)) if cells else {}
    return plan["smallest"] or {}


def _cluster(plan: Mapping[str, Any], smallest: Mapping[str, Any]) -> Row:
    return {
        "model": plan["model"], "parameters": plan["parameters"], "strategy": plan["strategy"].replace(" fraction=", " "),
        "trainable_percent": 100 * plan["trainable"] / plan["parameters"], "flops_percent": 100 * plan["flops_vs_full"],
        **{name: smallest.get(name) for name in ("gpus", "stage", "bytes", "gpu_hours")},
    }  # fmt: skip


def cluster_finding(rows: Sequence[Row]) -> str:
    """What freezing does to the largest model's cluster, and to its hours."""
    largest = max(rows, key=lambda row: row["parameters"])["model"]
    own = [row for row in rows if row["model"] == largest and row["gpus"]]
    full = next((row for row in own if row["strategy"] == FULL), None)
    if not own:
        return f"No cluster that was tried holds {largest} under any of these plans."
    least = min(own, key=lambda row: (row["gpus"], row["gpu_hours"]))
    if full is None:
        return f"By formula {largest} needs {least['gpus']:,} devices under {least['strategy']}; no cluster tried holds full tuning."
    cheap = min(own, key=lambda row: row["gpu_hours"])
    return (
        f"By formula full tuning of {largest} needs {full['gpus']:,} devices; {least['strategy']} needs {least['gpus']:,}, and "
        f"{cheap['strategy']} takes the fewest device-hours, {100 * cheap['gpu_hours'] / full['gpu_hours']:.0f} % of full tuning's."
    )


def length_rows(
    model: str,
    options: Mapping[str, Mapping[str, Any]],
    lengths: Sequence[int],
    *,
    device: str,
    gpus: int,
    stage: int = 3,
    gradient_checkpointing: bool = True,
) -> list[Row]:
    """Bytes of one device at its peak, of one sequence of each length, beside what such a device offers."""
    offered = find_device(device)
    usable = offered.memory - RESERVED
    plans, _ = plans_of(anatomy_of(model), options, None)
    work = Workload(gradient_checkpointing=gradient_checkpointing)
    rows = []
    for length in lengths:
        for name, cost in costs_of(model, plans, work, sequence_length=length).items():
            price = cost.at(stage, gpus)
            peak = price.peaks.most
            rows.append({
                "plan": name, "length": length, "peak": peak, "usable": usable, "fits": peak <= usable,
                "growing": sum(price.items[item] for item in GROWING), "tokens_per_second": gpus * price.tokens / price.on(offered).total,
            })  # fmt: skip
    return rows


def length_finding(rows: Sequence[Row]) -> str:
    """The longest sequence that each plan holds."""
    longest = {
        plan: max((row["length"] for row in rows if row["plan"] == plan and row["fits"]), default=0)
        for plan in dict.fromkeys(row["plan"] for row in rows)
    }
    told = ", ".join(f"{plan} {length:,}" if length else f"{plan} none" for plan, length in longest.items())
    if len(set(longest.values())) == 1:
        return f"By formula freezing does not change the longest sequence that fits, in tokens of those tried: {told}."
    return f"By formula the longest sequence that fits, in tokens of those tried, is: {told}."
