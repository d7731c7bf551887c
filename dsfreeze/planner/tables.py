"""A planner's answers for people and for programs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dsfreeze.estimate.caching import CacheCost, Tier
from dsfreeze.estimate.price import Price
from dsfreeze.planner.caching import cache_caption
from dsfreeze.planner.fit import Found
from dsfreeze.planner.request import Planner
from dsfreeze.planner.sweep import Cell, Row, advice
from dsfreeze.tables import gib, million


def plan_table(planner: Planner, rows: Sequence[Row], caches: Mapping[str, CacheCost] | None = None) -> RenderableType:
    """Peak bytes and seconds of a step for each strategy, stage and cluster; what does not fit in red, what to take in bold; below it,
    where a prefix cache was asked for, when that pays."""
    table = Table(title=_title(planner), title_justify="left", box=SIMPLE, pad_edge=False, caption_justify="left")
    for name, width in (("strategy", 13), ("trains", 6), ("ZeRO", 4)):
        table.add_column(name, no_wrap=True, min_width=width)
    for gpus in planner.gpus:
        table.add_column(f"{gpus} x {planner.ground.device.name}", no_wrap=True, justify="right", min_width=11)
    chosen = [advice(rows, index) for index in range(len(planner.gpus))]
    shown = ""
    for row in rows:
        first = row.strategy != shown
        shown = row.strategy
        cells = [_cell(at, chosen[i][row.strategy] == row.stage) for i, at in enumerate(row.cells)]
        table.add_row(row.strategy if first else "", f"{row.percent:.3g}%" if first else "", str(row.stage), *cells)
    lines, work = _caption(planner), planner.ground.workload
    if work.prefix_cache:
        tier: Tier = "memory" if work.cache_in_memory else "disk"
        lines += cache_caption(caches or {}, planner.ground.device, max(planner.gpus), tier)
    return Group(table, Text("\n".join(lines), style="italic"))


def _cell(at: Cell, advised: bool) -> str:
    figures = f"{_short(at.price.peaks.most / 2**30)} {_short(at.seconds.total):>5}"
    if not at.fits:
        return f"[red]{figures}[/]"
    return f"[bold green]{figures}[/]" if advised else figures


def _short(number: float) -> str:
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _title(planner: Planner) -> str:
    ground, work = planner.ground, planner.ground.workload
    steps = f"micro-batch {work.micro_batch_size} x {ground.sequence_length}"
    steps += f" x {work.gradient_accumulation_steps} micro-steps" if work.gradient_accumulation_steps > 1 else ""
    recompute = "with" if work.gradient_checkpointing else "without"
    precision = "bf16" if ground.dtype_bytes == 2 else "fp32"
    return (
        f"{ground.anatomy.name}, {million(ground.anatomy.numel)} parameters, {steps}, {precision}, {recompute} gradient checkpointing, "
        f"{ground.activations.attention} attention" + (", prefix cached" if work.prefix_cache else "")
    )


def _caption(planner: Planner) -> list[str]:
    ground = planner.ground
    lines = [
        f"GiB on a device at the peak, and seconds of a step. Red: over {gib(ground.usable(planner.gpus[0]))} of its {gib(ground.device.memory)}. "
        "Green: the stage to take, the fastest that fits.",
    ]
    if planner.calibration:
        lines.append(f"Seconds calibrated by {planner.calibration.source}: x {planner.calibration.scale:.3g}.")
    else:
        lines.append(
            "Seconds by data sheets and assumed efficiencies; compare them with each other, and calibrate (--calibrate RUN)."
        )
    return [*lines, *planner.notes]


def peak_line(price: Price, micro_batch_size: int) -> str:
    """One plan's peak and what it is made of, in a line."""
    peaks = price.peaks
    passes = price.items["activations"] + price.items["logits and loss"]
    return (
        f"peak             {gib(peaks.most)} a rank (forward {gib(peaks.forward)}, backward {gib(peaks.backward)}, step {gib(peaks.step)}),\n"
        f"                 of it {gib(passes)} of activations and logits at {micro_batch_size} x {price.setting.sequence_length} tokens"
    )


def fit_table(planner: Planner, found: Mapping[int, Sequence[Found]]) -> RenderableType:
    """For each cluster the most layers that fit, trained the fastest way, and fewer layers beside it."""
    table = Table(title=_title_of_fit(planner), title_justify="left", box=SIMPLE, pad_edge=False)
    left = ("devices", "ZeRO", "recompute")
    for name in ("devices", "layers", "ZeRO", "micro", "recompute", "peak", "host", "a step", "tokens/s"):
        table.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    depth = len(planner.ground.anatomy.blocks)
    for gpus, choices in found.items():
        for number, choice in enumerate(choices):
            at = choice.at
            shown = (
                str(gpus) if number == 0 else "", f"{choice.trained} of {depth}",
                f"{choice.stage}{' offload' if choice.offload else ''}", str(choice.micro_batch_size),
                "yes" if choice.checkpointing else "no", gib(at.price.peaks.most), gib(at.price.host),
                _seconds(at.seconds.total), f"{at.tokens_per_second:,.0f}",
            )  # fmt: skip
            table.add_row(*shown, style="bold" if number == 0 else "")
    return Group(
        table,
        Text(
            "\n".join(["Bold: the most layers that fit, the fastest way to train them.", *_caption(planner)[1:]]),
            style="italic",
        ),
    )


def _title_of_fit(planner: Planner) -> str:
    ground = planner.ground
    return f"{ground.anatomy.name} in {gib(ground.usable(planner.gpus[0]))} a device ({ground.device.name}), sequences of {ground.sequence_length}"


def planner_as_dict(planner: Planner) -> dict[str, Any]:
    """What the figures rest on."""
    ground, calibration = planner.ground, planner.calibration
    return {
        "model": ground.anatomy.name,
        "parameters": ground.anatomy.numel,
        "device": {
            "name": ground.device.name,
            "memory": ground.device.memory,
            "usable": ground.usable(planner.gpus[0]),
            "sources": dict(ground.device.sources),
        },
        "dtype_bytes": ground.dtype_bytes,
        "sequence_length": ground.sequence_length,
        "workload": vars(ground.workload),
        "attention": ground.activations.attention,
        "calibration": calibration and {"scale": calibration.scale, "source": calibration.source},
        "notes": list(planner.notes),
    }


def found_as_dict(found: Found) -> dict[str, Any]:
    return {
        "gpus": found.at.gpus, "layers_trained": found.trained, "stage": found.stage, "offload": found.offload,
        "micro_batch_size": found.micro_batch_size, "gradient_checkpointing": found.checkpointing,
        "peak_bytes": found.at.price.peaks.most, "host_bytes": found.at.price.host,
        "seconds_per_step": found.at.seconds.total, "tokens_per_second": found.at.tokens_per_second,
    }  # fmt: skip
