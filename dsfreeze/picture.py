"""The plan as a picture in the terminal, and as a dict for `--json`.

One glyph a layer, input first; under 80 columns, and readable without colour. Where layers train in part, a row for
each category of tensor shows which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.padding import Padding
from rich.text import Text

from dsfreeze.anatomy import Anatomy, Layer, Tensor
from dsfreeze.estimate import Estimate, as_trained, estimate
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.tables import gib, million

#: State of a layer -> (glyph, glyph on a terminal that has ASCII alone, colour, what the legend says).
STATES = {
    "prefix": ("·", ".", "blue", "frozen prefix: no gradient, no activations kept"),
    "frozen": ("░", "-", "cyan", "frozen, but the gradient crosses it"),
    "partly": ("▒", "+", "yellow", "trains in part"),
    "adapter": ("◆", "@", "magenta", "adapters train, the weights are frozen"),
    "trainable": ("█", "#", "green", "trains"),
}
ABSENT = " "
PER_ROW = 60
#: Phases that are drawn one by one; of more, the first ones are, and steps are counted by layer.
DRAWN_WHOLE, DRAWN_FIRST = 6, 3
COUNTS_PER_ROW = 8


@dataclass(frozen=True)
class Row:
    """A line of the picture: a label, and the state of each glyph (None draws a blank)."""

    label: str
    states: tuple[str | None, ...]


def draw(anatomy: Anatomy, plan: FreezePlan, cost: Estimate | None = None) -> Group:
    """The plan for a terminal: layers, legend, what trains, optimizer-state bytes and FLOPs against full tuning, notes.

    `cost` defaults to `estimate`'s own defaults (ZeRO-2 on one rank, fp32).
    """
    anatomy = as_trained(anatomy, plan)
    cost = cost or estimate(anatomy, plan)
    parts: list[Any] = [Text(_title(anatomy, plan), style="bold")]
    shown: set[str] = set()
    many = len(plan.phases) > DRAWN_WHOLE
    for phase in plan.phases[:DRAWN_FIRST] if many else plan.phases:
        if len(plan.phases) > 1:
            parts.append(Text(f"steps {phase.first_step} to {'the end' if phase.end is None else phase.end - 1}"))
        rows = list(_rows(anatomy, plan, phase))
        shown |= {state for row in rows for state in row.states if state}
        parts.append(Padding(Picture(tuple(rows)), (1, 0, 1, 2)))
    if many:
        parts += [Text(line) for line in _summary(anatomy, plan)]
    parts.append(Padding(Legend(tuple(state for state in STATES if state in shown)), (0, 0, 1, 2)))
    if len(plan.phases) > 1:
        parts.append(Text("bytes are those of the phase that holds most, FLOPs the mean over the run:"))
    parts += [Text(line) for line in _figures(cost)]
    notes = [*plan.notes]
    if plan.decide_at is not None:
        notes.append(
            f"after {plan.decide_at} steps what trains is decided anew, from what the run has measured by then"
        )
    parts += [Text(f"note: {note}", style="italic") for note in notes]
    return Group(*parts)


def plan_as_dict(anatomy: Anatomy, plan: FreezePlan, cost: Estimate) -> dict[str, Any]:
    """The same for programs: plain values, the cost, the phases, the digest; every distinct set of tensors once, as
    layers with their state and counts (`sets`), to which phases refer by number."""
    anatomy = as_trained(anatomy, plan)
    firsts: dict[tuple[str, ...], Phase] = {}
    for phase in plan.phases:
        firsts.setdefault(phase.trainable, phase)
    number = {chosen: index for index, chosen in enumerate(firsts)}
    return {
        "model": anatomy.name,
        "model_type": anatomy.model_type,
        "num_layers": len(anatomy.blocks),
        "strategy": plan.strategy,
        "digest": plan.digest,
        "trainable": cost.trainable,
        "held": cost.held,
        "total": cost.total,
        "percent": cost.percent,
        "bytes_per_rank": {key: getattr(cost, key) for key in _BYTES},
        "flops_per_token": {"forward": cost.forward_flops, "backward": cost.backward_flops,
                            "full_forward": cost.full_forward_flops, "full_backward": cost.full_backward_flops,
                            "ratio": cost.flops_ratio},
        "adapter": asdict(plan.adapter) if plan.adapter else None,
        "steps_trained": steps_trained(anatomy, plan),
        "sets": [_layers_as_dicts(anatomy, plan, phase) for phase in firsts.values()],
        "phases": [
            {"first_step": p.first_step, "num_steps": p.num_steps, "lr_step": p.lr_step, "set": number[p.trainable]}
            for p in plan.phases
        ],
        "notes": [*plan.notes, *anatomy.notes],
    }  # fmt: skip


_BYTES = ("weights", "gradients", "masters", "optimizer_state", "parked", "on_host")


def layer_states(anatomy: Anatomy, plan: FreezePlan, phase: Phase) -> dict[str, str]:
    """The state of every layer, by name: a key of `STATES`."""
    trainable = frozenset(phase.trainable)
    lowest = anatomy.lowest_trainable(trainable)
    return {
        layer.name: _state(layer.tensors, plan, trainable, in_prefix=index < lowest)
        for index, layer in enumerate(anatomy.layers)
        if layer.tensors
    }


def _state(tensors: Iterable[Tensor], plan: FreezePlan, trainable: frozenset[str], *, in_prefix: bool) -> str:
    active = [t for t in tensors if t.name in trainable]
    if not active:
        return "prefix" if in_prefix else "frozen"
    if all(t.category == "adapter" for t in active):
        return "adapter"
    whole = len(active) == len(tuple(tensors)) and not any(t.name in plan.held_back for t in active)
    return "trainable" if whole else "partly"


def _rows(anatomy: Anatomy, plan: FreezePlan, phase: Phase) -> Iterator[Row]:
    states = layer_states(anatomy, plan, phase)
    blocks = [layer for layer in anatomy.layers if layer.is_block]
    if "embed" in states:
        yield Row("embed", (states["embed"],))
    yield from _wrapped("layers", [states[layer.name] for layer in blocks])
    if any(states[layer.name] == "partly" for layer in blocks):
        yield from _category_rows(anatomy, plan, phase, blocks)
    for end in ("norm", "head"):
        if end in states:
            yield Row(end, (states[end],))


def _category_rows(anatomy: Anatomy, plan: FreezePlan, phase: Phase, blocks: list[Layer]) -> Iterator[Row]:
    """Below the layers: for each category, the state of its tensors in each layer."""
    trainable = frozenset(phase.trainable)
    lowest = anatomy.lowest_trainable(trainable)
    indices = {layer.name: index for index, layer in enumerate(anatomy.layers)}
    for category in dict.fromkeys(t.category for layer in blocks for t in layer.tensors):
        states: list[str | None] = []
        for layer in blocks:
            own = [t for t in layer.tensors if t.category == category]
            states.append(_state(own, plan, trainable, in_prefix=indices[layer.name] < lowest) if own else None)
        yield from _wrapped("  " + category, states)


def _wrapped(label: str, states: Iterable[str | None]) -> Iterator[Row]:
    """Rows of at most PER_ROW glyphs; later rows are labelled with the first layer they show."""
    states = tuple(states)
    for start in range(0, len(states), PER_ROW):
        yield Row(label if start == 0 else f"  from {start}", states[start : start + PER_ROW])


def steps_trained(anatomy: Anatomy, plan: FreezePlan) -> dict[str, int | None]:
    """For each layer, the steps in which any of its tensors trains; None when it trains to an end that is not known."""
    trains = {chosen: {anatomy.layer_of[name].name for name in chosen} for chosen in {p.trainable for p in plan.phases}}
    counts: dict[str, int | None] = {layer.name: 0 for layer in anatomy.layers if layer.tensors}
    for phase in plan.phases:
        for name in trains[phase.trainable]:
            so_far = counts[name]
            assert so_far is not None, "only the last phase is open"
            counts[name] = None if phase.num_steps is None else so_far + phase.num_steps
    return counts


def _summary(anatomy: Anatomy, plan: FreezePlan) -> Iterator[str]:
    """Of a plan with many phases: how many follow, and how long each layer trains."""
    end = plan.phases[-1].end
    yield f"and {len(plan.phases) - DRAWN_FIRST} more phases. Steps that each layer trains{f', of {end}' if end else ''}:"
    yield ""
    counts = {name: "to the end" if n is None else str(n) for name, n in steps_trained(anatomy, plan).items()}
    blocks = [counts[layer.name] for layer in anatomy.blocks]
    width = max(map(len, blocks), default=0) + 2
    per_row = min(COUNTS_PER_ROW, PER_ROW // width)
    for end_name in ("embed", "norm", "head"):
        if end_name == "norm":
            for start in range(0, len(blocks), per_row):
                row = "".join(count.rjust(width) for count in blocks[start : start + per_row])
                yield f"  {'layers' if start == 0 else f'  from {start}':<11}{row}"
        if end_name in counts:
            yield f"  {end_name:<11}{counts[end_name].rjust(width)}"
    yield ""


@dataclass(frozen=True)
class Picture:
    """Rows of glyphs, in ASCII where the terminal has nothing else."""

    rows: tuple[Row, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for row in self.rows:
            line = Text(f"{row.label:<11}")
            for state in row.states:
                line.append(*_glyph(state, options))
            yield line


@dataclass(frozen=True)
class Legend:
    """What the glyphs that occur mean, a line each."""

    states: tuple[str, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for state in self.states:
            yield Text.assemble(_glyph(state, options), f" {STATES[state][3]}")


def _glyph(state: str | None, options: ConsoleOptions) -> tuple[str, str]:
    if state is None:
        return ABSENT, ""
    glyph, plain, colour, _ = STATES[state]
    return (plain if options.ascii_only else glyph), colour


def _title(anatomy: Anatomy, plan: FreezePlan) -> str:
    depth = len(anatomy.blocks)
    return f"{anatomy.name} ({anatomy.model_type}, {depth} layers), strategy {plan.strategy}, plan {plan.digest[:12]}"


def _figures(cost: Estimate) -> Iterator[str]:
    states = cost.masters + cost.optimizer_state
    yield f"trainable        {million(cost.trainable)} of {million(cost.total)} parameters ({cost.percent:.2f} %)"
    if cost.held > cost.trainable:
        yield f"in tensors of    {million(cost.held)}, which gradients and optimizer state are of"
    yield f"optimizer state  {gib(states)} a rank ({gib(cost.masters)} masters + {gib(cost.optimizer_state)} moments)"
    if cost.parked:
        yield f"parked state     {gib(cost.parked)} a rank, of tensors that trained before and wait"
    yield f"weights          {gib(cost.weights)} a rank, gradients {gib(cost.gradients)}"
    if cost.on_host:
        yield f"in host memory   {gib(cost.on_host)} of all these"
    yield (
        f"FLOPs per token  {_si(cost.flops_per_token)} (forward {_si(cost.forward_flops)}, "
        f"backward {_si(cost.backward_flops)})"
    )
    yield f"                 {100 * cost.flops_ratio:.0f} % of full tuning's {_si(cost.full_flops_per_token)}"


def _si(number: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}FLOP"
    return f"{number:.0f} FLOP"


def _layers_as_dicts(anatomy: Anatomy, plan: FreezePlan, phase: Phase) -> list[dict[str, Any]]:
    trainable = frozenset(phase.trainable)
    states = layer_states(anatomy, plan, phase)
    return [
        {
            "name": layer.name,
            "state": states[layer.name],
            "trainable": sum(plan.elements_of(t) for t in layer.tensors if t.name in trainable),
            "total": layer.numel,
        }
        for layer in anatomy.layers
        if layer.tensors
    ]
