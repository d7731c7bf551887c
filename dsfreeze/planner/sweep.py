"""Strategies x ZeRO stages x world sizes, each at its price on a device, and which stage to take. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsfreeze.activations import TaskActivations
from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.estimate.price import PlanCost, Price
from dsfreeze.estimate.seconds import Seconds
from dsfreeze.hardware import Device
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.setting import Workload
from dsfreeze.strategies import make_plan

STAGES = (0, 1, 2, 3)
#: What the table compares where nothing else is asked for.
STRATEGIES: dict[str, dict[str, Any]] = {
    "full": {"strategy": "full"},
    "bottom 25 %": {"strategy": "bottom", "fraction": 0.25},
    "bottom 50 %": {"strategy": "bottom", "fraction": 0.5},
    "bottom 75 %": {"strategy": "bottom", "fraction": 0.75},
    "interval 50 %": {"strategy": "interval", "fraction": 0.5},
    "lora": {"strategy": "lora"},
}
#: Bytes of an accelerator that the framework, its context and the communication library take (assumption: 0.5 to 1.5 GB and fragments).
RESERVED = 2 * 2**30
#: A higher stage is advised only where it is faster by more than this: that its gathers hide wholly is an assumption, and links are worse
#: than their sheet.
WORTH = 0.10


@dataclass(frozen=True)
class Ground:
    """What all cells of a table share."""

    anatomy: Anatomy
    activations: TaskActivations
    workload: Workload
    device: Device
    dtype_bytes: int = 2
    sequence_length: int = 512
    num_steps: int | None = None
    scale: float = 1.0
    budget: int | None = None
    """Bytes of a device that may be used; None: all but what the framework takes."""

    def usable(self, gpus: int) -> int:
        """Bytes of each of so many devices; the ranks of a CPU share its memory."""
        if self.budget:
            return self.budget
        return self.device.memory // self.device.sharers(gpus) - (0 if self.device.shared else RESERVED)

    def cost(self, plan: FreezePlan, workload: Workload | None = None) -> PlanCost:
        return PlanCost(
            self.anatomy, plan, self.activations, workload or self.workload, dtype_bytes=self.dtype_bytes,
            sequence_length=self.sequence_length, num_steps=self.num_steps,
        )  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One price: bytes at the peak and whether they fit, seconds of a step, tokens a second of the whole cluster."""

    gpus: int
    price: Price
    seconds: Seconds
    fits: bool

    @property
    def tokens_per_second(self) -> float:
        return self.gpus * self.price.tokens / self.seconds.total


@dataclass(frozen=True)
class Row:
    """A strategy at a stage, over world sizes."""

    strategy: str
    percent: float
    stage: int
    cells: tuple[Cell, ...]


def plans_of(
    anatomy: Anatomy, options: Mapping[str, Mapping[str, Any]], num_steps: int | None
) -> tuple[dict[str, FreezePlan], dict[str, str]]:
    """(plans, reasons of those that this model cannot have), by label."""
    plans, left_out = {}, {}
    for label, entry in options.items():
        try:
            plans[label] = make_plan(anatomy, FreezeOptions(**entry), num_steps)
        except UserError as error:
            left_out[label] = str(error)
    return plans, left_out


def cell(ground: Ground, cost: PlanCost, stage: int, gpus: int, *, offload: bool = False) -> Cell:
    price = cost.at(stage, gpus, offload=offload)
    return Cell(gpus, price, price.on(ground.device, ground.scale), price.peaks.most <= ground.usable(gpus))


def sweep(
    ground: Ground, plans: Mapping[str, FreezePlan], gpus: Sequence[int], stages: Iterable[int] = STAGES
) -> list[Row]:
    """A row for each plan and stage."""
    rows = []
    for label, plan in plans.items():
        cost = ground.cost(plan)
        for stage in stages:
            cells = tuple(cell(ground, cost, stage, count) for count in gpus)
            rows.append(Row(label, cells[0].price.states.percent, stage, cells))
    return rows


def advice(rows: Iterable[Row], index: int) -> dict[str, int | None]:
    """For the world size at `index`, the stage of each strategy: the fastest that fits, a lower one where it is no slower to
    speak of; None where none fits."""
    found: dict[str, tuple[int, float] | None] = {}
    for row in sorted(rows, key=lambda row: row.stage):
        at = row.cells[index]
        best = found.setdefault(row.strategy, None)
        if at.fits and (best is None or at.seconds.total < (1 - WORTH) * best[1]):
            found[row.strategy] = row.stage, at.seconds.total
    return {strategy: best and best[0] for strategy, best in found.items()}


def rows_as_dicts(ground: Ground, rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Plain values, a dict for each cell."""
    return [
        {
            "strategy": row.strategy, "percent_trainable": row.percent, "stage": row.stage, "gpus": at.gpus,
            "fits": at.fits, "peak_bytes": at.price.peaks.most, "peaks": asdict(at.price.peaks), "bytes": at.price.items,
            "host_bytes": at.price.host, "seconds_per_step": at.seconds.total, "seconds": asdict(at.seconds),
            "tokens_per_second": at.tokens_per_second, "flops_per_token": at.price.flops_per_token,
            "flops_per_step": at.price.flops_per_step, "sent_bytes": at.price.sent.sent, "sent": asdict(at.price.sent),
            "cache_bandwidth": at.price.cache_bandwidth(ground.device, ground.scale),
        }
        for row in rows
        for at in row.cells
    ]  # fmt: skip
