"""01, anatomy and plan: what each plan trains, layer by layer and step by step, and its price. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.estimate import as_trained, estimate
from dsfreeze.notebook.runs import plan_of
from dsfreeze.picture import layer_states
from dsfreeze.plan import FreezePlan
from dsfreeze.record import RecordData
from dsfreeze.shapes import known_anatomy

Row = dict[str, Any]
#: Shares of parameters this near are called alike, and shares of FLOPs this far apart different, in percent.
ALIKE, APART = 10.0, 5.0


def anatomy_of(name: str) -> Anatomy:
    """The language model's shape, from what ships or was added; UserError for a name that is not known."""
    anatomy = known_anatomy(name, "causal_lm", None)
    if anatomy is None:
        raise UserError(
            f"The shape of model '{name}' is not known here. `dsfreeze models` lists those that are; add another with "
            "`dsfreeze models --add config.json`."
        )
    return anatomy


def plan_of_run(record: RecordData) -> tuple[Anatomy, FreezePlan]:
    """The shape of a run's model and the plan it followed; UserError where the shape is not known without its weights."""
    model, data = record.recipe.get("model") or {}, record.recipe.get("data") or {}
    name, task = str(model.get("name")), str(record.recipe.get("task"))
    anatomy, plan = known_anatomy(name, task, data.get("num_labels") or 2), plan_of(record)
    if anatomy is None or not plan.ever_trained <= {t.name for t in plan.adapted(anatomy).tensors}:
        raise UserError(f"The shape of its model, '{name}' for {task}, is not known without its weights.")
    return anatomy, plan


def anatomy_rows(anatomy: Anatomy) -> list[Row]:
    """Elements of every layer by category of tensor."""
    return [
        {
            "layer": layer.name,
            "category": category,
            "elements": sum(t.numel for t in layer.tensors if t.category == category),
        }
        for layer in anatomy.layers
        for category in dict.fromkeys(t.category for t in layer.tensors)
    ]


def state_rows(anatomy: Anatomy, plans: Mapping[str, FreezePlan]) -> list[Row]:
    """The state of each layer (a key of `picture.STATES`) in the first phase of each plan."""
    return [
        {"plan": name, "layer": layer, "state": state}
        for name, plan in plans.items()
        for layer, state in layer_states(as_trained(anatomy, plan), plan, plan.phases[0]).items()
    ]


def phase_rows(anatomy: Anatomy, plan: FreezePlan, num_steps: int) -> list[Row]:
    """The state of each layer in each phase of a plan that moves, over a run of `num_steps`."""
    adapted = as_trained(anatomy, plan)
    return [
        {"first_step": phase.first_step, "last_step": min(phase.end or num_steps, num_steps) - 1, "layer": layer, "state": state}
        for phase in plan.phases
        if phase.first_step < num_steps
        for layer, state in layer_states(adapted, plan, phase).items()
    ]  # fmt: skip


def price_rows(
    anatomy: Anatomy,
    plans: Mapping[str, FreezePlan],
    *,
    sequence_length: int,
    num_steps: int,
    dtype_bytes: int = 2,
) -> list[Row]:
    """Each plan's elements, FLOPs of a token, and bytes of model states on one device (ZeRO 0)."""
    rows = []
    for name, plan in plans.items():
        cost = estimate(
            anatomy, plan, stage=0, dtype_bytes=dtype_bytes, sequence_length=sequence_length, num_steps=num_steps
        )
        rows.append({
            "plan": name, "trainable": cost.trainable, "percent": cost.percent,
            "forward": cost.forward_flops, "backward": cost.backward_flops, "flops_percent": 100 * cost.flops_ratio,
            "weights": cost.weights, "gradients": cost.gradients, "masters": cost.masters, "moments": cost.optimizer_state,
        })  # fmt: skip
    return rows


def price_finding(rows: Sequence[Row]) -> str:
    """Whether plans that train alike many parameters cost alike many FLOPs."""
    alike: list[tuple[Row, Row]] = [
        pair
        for pair in combinations([row for row in rows if row["flops_percent"] < 100], 2)
        if abs(pair[0]["percent"] - pair[1]["percent"]) <= ALIKE
    ]
    if not alike:
        return f"No two of these {len(rows)} plans train alike many parameters."
    apart = max(alike, key=lambda pair: abs(float(pair[0]["flops_percent"] - pair[1]["flops_percent"])))
    cheap, dear = sorted(apart, key=lambda row: float(row["flops_percent"]))
    both = (
        f"{cheap['plan']} ({cheap['percent']:.0f} % of the parameters) costs {cheap['flops_percent']:.0f} % of full tuning's FLOPs, "
        f"{dear['plan']} ({dear['percent']:.0f} %) {dear['flops_percent']:.0f} %"
    )
    if dear["flops_percent"] - cheap["flops_percent"] < APART:
        return f"Plans that train alike many parameters cost about the same here: {both}."
    return f"What trains is not what you pay: {both}. What counts is how far down the gradient must go."


def anatomy_finding(anatomy: Anatomy) -> str:
    largest = max(anatomy.layers, key=lambda layer: layer.numel)
    return (
        f"{anatomy.name} has {anatomy.numel / 1e6:,.1f} million parameters in {len(anatomy.blocks)} transformer layers and what lies around "
        f"them; the largest of its layers, {largest.name}, holds {100 * largest.numel / anatomy.numel:.0f} %."
    )


def moving_finding(anatomy: Anatomy, plans: Mapping[str, FreezePlan]) -> str:
    """How much of the model plans that move train at once, and over the whole run."""
    numel = {name: {t.name: t.numel for t in as_trained(anatomy, plan).tensors} for name, plan in plans.items()}

    def percent(name: str, trained: Iterable[str]) -> float:
        return 100 * sum(numel[name][tensor] for tensor in trained) / sum(numel[name].values())

    told = [
        f"{name} trains at most {max(percent(name, phase.trainable) for phase in plan.phases):.0f} % of the parameters at once and "
        f"{percent(name, plan.ever_trained):.0f} % over the whole run"
        for name, plan in plans.items()
    ]
    return "; ".join(told) + "." if told else "None of these plans moves."
