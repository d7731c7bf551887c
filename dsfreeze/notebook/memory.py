"""03, memory: a plan's bytes item by item over ZeRO stages, and predictions beside what was measured. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.estimate.price import PlanCost
from dsfreeze.notebook.plans import anatomy_of
from dsfreeze.plan import FreezePlan
from dsfreeze.setting import Workload
from dsfreeze.shapes import known_activations

Row = dict[str, Any]
#: Items of a price, as a figure stacks them; the rest is small, and shown together.
SHOWN = ("frozen weights", "trainable weights", "gradients", "masters", "moments", "activations", "logits and loss")
REST = "buffers"


def costs_of(
    model: str, plans: Mapping[str, FreezePlan], work: Workload, *, sequence_length: int, dtype_bytes: int = 2
) -> dict[str, PlanCost]:
    """The price of each plan of a model that `dsfreeze models` lists; UserError where its activations are not known."""
    anatomy, known = anatomy_of(model), known_activations(model)
    if known is None:
        raise UserError(f"The activations of model '{model}' are not known here; `dsfreeze models --add` reads them.")
    found = known.of(work.task, work.attention, dtype_bytes)
    return {
        name: PlanCost(anatomy, plan, found, work, dtype_bytes=dtype_bytes, sequence_length=sequence_length)
        for name, plan in plans.items()
    }


def item_rows(costs: Mapping[str, PlanCost], stages: Sequence[int], gpus: int) -> list[Row]:
    """Bytes on one device by item, for each plan and stage. Items are not all alive at once: `peak` is less than their sum."""
    rows = []
    for plan, cost in costs.items():
        for stage in stages:
            price = cost.at(stage, gpus)
            items = {name: price.items[name] for name in SHOWN}
            items[REST] = sum(price.items.values()) - sum(items.values())
            rows += [
                {"plan": plan, "percent": price.states.percent, "stage": stage, "item": name, "bytes": size, "peak": price.peaks.most}
                for name, size in items.items()
            ]  # fmt: skip
    return rows


def item_finding(rows: Sequence[Row], gpus: int) -> str:
    """What freezing saves at the lowest stage and at the highest."""
    peaks = {(row["plan"], row["stage"]): row["peak"] for row in rows}
    stages = sorted({stage for _, stage in peaks})
    full = max({row["plan"]: row["percent"] for row in rows}.items(), key=lambda each: each[1])[0]
    told, shares = [], []
    for stage in (stages[0], stages[-1]):
        at = {plan: peak for (plan, each), peak in peaks.items() if each == stage}
        least = min(at, key=at.__getitem__)
        shares.append(at[least] / at[full])
        told.append(f"at ZeRO {stage} {least} peaks at {100 * shares[-1]:.0f} % of {full}")
    word = (
        "the more is shared, the less freezing saves"
        if shares[0] < shares[1]
        else "sharing more leaves freezing no less to save"
    )
    return f"On {gpus} devices, {', '.join(told)}: {word}."


# -- predicted beside measured -------------------------------------------------------------------------------------


def counted_rows(record: Mapping[str, Any]) -> list[Row]:
    """Of the benchmark of states: bytes that were counted in a live engine, and those that the plan's formula gives."""
    return [
        {
            "setting": setting, **dict(zip(("stage", "precision", "plan"), setting.split(), strict=True)),
            "item": item.replace("_", " "), "counted": counted, "predicted": found["by_plan"][item],
        }
        for setting, found in record["bytes"].items()
        for item, counted in found["counted"].items()
    ]  # fmt: skip


def activation_rows(record: Mapping[str, Any]) -> list[Row]:
    """Of the planner's benchmark: the passes' peak of activations, measured and predicted."""
    return [
        {"shape": shape, "plan": plan, "measured": found["activation_bytes"], "predicted": found["predicted_activation_bytes"]}
        for shape, plans in record["shapes"].items()
        for plan, found in plans.items()
        if isinstance(found, Mapping) and "activation_bytes" in found
    ]  # fmt: skip


def counted_finding(rows: Sequence[Row]) -> str:
    wrong = [row for row in rows if row["counted"] != row["predicted"]]
    if not wrong:
        return (
            f"All {len(rows)} figures of gradients, masters and optimizer state are, to the byte, those of the formula."
        )
    worst = max(wrong, key=lambda row: abs(row["counted"] - row["predicted"]))
    return (
        f"{len(wrong)} of {len(rows)} figures differ from the formula's, most of all {worst['item']} at {worst['setting']}: "
        f"{worst['counted']:,} bytes counted, {worst['predicted']:,} predicted."
    )


def error_finding(rows: Sequence[Row], what: str) -> str:
    """How far off a prediction is at the worst; rows hold `measured` and `predicted`, and a name under `run` or `plan`."""
    if not rows:
        return f"No run here has a prediction of {what}."
    worst = max(rows, key=lambda row: abs(row["measured"] / row["predicted"] - 1))
    error = 100 * (worst["measured"] / worst["predicted"] - 1)
    return (
        f"The prediction of {what} is within {abs(error):.1f} % of what was measured in all {len(rows)} cases; the farthest is "
        f"{worst.get('run', worst.get('plan'))} ({error:+.1f} %)."
    )
