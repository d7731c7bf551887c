"""A scaling study: models x strategies x devices x ZeRO stages, from one YAML file, written as a record. No torch.

Of every cell the fullest moment of a device, whether that fits, and what `tokens` of training take there; of every plan the
smallest cluster that holds it, and where a prefix cache pays. A plan is profiled once (`PlanCost`), a cell is a few milliseconds.

Of a plan with transformer layers below all that trains, two ways to the hidden state that enters what trains, recomputed or read
from host memory or from storage, a token's seconds by `estimate.caching`; and the whole step with the cache against without it, at
the plan's smallest cluster: that step reads from storage, and spares the memory traffic of the prefix too. Filling the cache costs no pass
over the data, but `bytes_a_token` of storage: it pays from the second epoch on, or a later one.

Left out: what the formulas leave out; more than data parallelism (no tensor, pipeline or sequence parallel); a price of idle devices.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from rich.console import Console

from dsfreeze import __version__
from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.estimate.caching import CacheCost, cached_layers
from dsfreeze.estimate.price import PlanCost
from dsfreeze.files import write_whole
from dsfreeze.hardware import FIGURES, Device, find_device
from dsfreeze.plan import FreezePlan
from dsfreeze.planner.caching import cache_of
from dsfreeze.planner.request import MOST_GPUS, parse_gpus
from dsfreeze.planner.sweep import WORTH, Ground, cell
from dsfreeze.progress import Watch, watched
from dsfreeze.recipe import FreezeOptions
from dsfreeze.recipe_reader import report
from dsfreeze.recipe_section import Section, Texts
from dsfreeze.recipe_yaml import dump_yaml, parse_yaml, read_file
from dsfreeze.section_reader import dotted, problems
from dsfreeze.setting import Workload
from dsfreeze.shapes import known_activations, known_anatomy
from dsfreeze.strategies import make_plan

FORMAT_VERSION = 1
RECORD, RESOLVED = "study.json", "study.yaml"
#: From so many cells on a study takes seconds, and shows how far it is.
_LONG = 1000

Row = dict[str, Any]


def _numbers(value: Any) -> Any:
    """`1..1024` and `8,64` as `--gpus` reads them; one number as a list; the rest is pydantic's to judge."""
    if isinstance(value, str):
        try:
            return list(parse_gpus(value))
        except UserError as error:
            raise ValueError(str(error).removeprefix("--gpus ")) from None
    return [value] if isinstance(value, int) and not isinstance(value, bool) else value


def _options(value: Any) -> Any:
    return {"strategy": value} if isinstance(value, str) else value


Devices = Annotated[list[Annotated[int, Field(ge=1, le=MOST_GPUS)]], BeforeValidator(_numbers), Field(min_length=1)]
Strategies = Annotated[list[Annotated[FreezeOptions, BeforeValidator(_options)]], Field(min_length=1)]
Stages = Annotated[list[Literal[0, 1, 2, 3]], Field(min_length=1)]


class Study(Section):
    """What a scaling study compares."""

    models: Annotated[Texts, Field(min_length=1)]
    """Shipped names or hub ids, as `dsfreeze models` lists them."""
    strategies: Strategies
    """Words such as full or lora, or mappings of freeze options such as {strategy: bottom, fraction: 0.5}."""
    gpus: Devices
    """Numbers of devices, or a range such as 1..1024, doubling from one end to the other."""
    device: str
    """The device, such as h200."""
    sequence_length: Annotated[int, Field(ge=1)] = 4096
    """Positions of a sequence."""
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences of a device's micro-batch."""
    gradient_checkpointing: bool = True
    """Whether layers recompute."""
    stages: Stages = Field(default=[0, 1, 2, 3])
    """ZeRO stages."""
    bf16: bool = True
    """bf16 weights with fp32 masters; false: fp32."""
    tokens: Annotated[float, Field(gt=0)] = 1e9
    """Tokens of the whole training."""
    price_per_gpu_hour: Annotated[float, Field(ge=0)] | None = None
    """What a device costs an hour, in any currency."""
    output_dir: Path = Path("runs/study")
    """The record's folder."""

    @field_validator("models", "gpus", "stages")
    @classmethod
    def _once(cls, value: list[Any]) -> list[Any]:
        return list(dict.fromkeys(value))

    @field_validator("strategies")
    @classmethod
    def _named_once(cls, value: list[FreezeOptions]) -> list[FreezeOptions]:
        return list({label(options): options for options in value}.values())

    @property
    def dtype_bytes(self) -> int:
        return 2 if self.bf16 else 4

    def resolved(self) -> dict[str, Any]:
        """Plain values that read back as the same study."""
        plain = self.model_dump(mode="json", exclude={"strategies"})
        return {**plain, "strategies": [given(options) for options in self.strategies]}


def given(options: FreezeOptions) -> dict[str, Any]:
    """The strategy and every option that is not at its default."""
    return {"strategy": options.strategy, **options.model_dump(mode="json", exclude_defaults=True)}


def label(options: FreezeOptions) -> str:
    """A strategy as a table's row calls it: `bottom fraction=0.5`."""
    _, *rest = given(options).items()
    return " ".join([options.strategy, *(f"{key}={value}" for key, value in rest)])


# -- reading -----------------------------------------------------------------------------------------------------------


def read_study(path: Path | str) -> Study:
    """The study that a YAML file describes; one UserError naming every mistake with its line."""
    document = parse_yaml(read_file(Path(path), "study"), str(path))
    where = {key: f"{path}:{line}" for key, line in document.lines.items()}
    told = [(f"{path}:{line}", f"{dotted(key)}: {text}") for key, line, text in document.mistakes]
    if not told:
        try:
            return Study.model_validate(document.values)
        except ValidationError as error:
            told = problems(Study, error, where, str(path))
    raise UserError(report(told))


# -- running -----------------------------------------------------------------------------------------------------------


def run_study(study: Study, console: Console | None = None) -> dict[str, Any]:
    """Price the study and write its record; returns what it wrote.

    UserError, before anything is priced, for a model or a device that nobody knows and for a folder that holds another
    study. What a model cannot do is under `left_out` with its reason.
    """
    device = find_device(study.device)
    models = {name: _known(name) for name in study.models}
    folder, resolved = study.output_dir, study.resolved()
    _require_same(folder / RESOLVED, dump_yaml(resolved))
    record = {"format_version": FORMAT_VERSION, "version": __version__, "study": resolved, "device": _facts(device)}
    record |= _priced(study, models, device, console)
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    _require_same(folder / RECORD, text)
    _write(folder / RESOLVED, dump_yaml(resolved))
    _write(folder / RECORD, text)
    return record


def _known(name: str) -> Anatomy | UserError:
    """A model's shape, or why it cannot be studied; UserError when nobody knows it."""
    try:
        anatomy = known_anatomy(name, "causal_lm", None)
    except UserError as reason:
        return reason
    if anatomy is None:
        raise UserError(
            f"The shape of model '{name}' is not known here. `dsfreeze models` lists those that are; add another with "
            "`dsfreeze models --add config.json`."
        )
    return anatomy


def _facts(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        **{figure: getattr(device, figure) for figure in FIGURES},
        "sources": dict(device.sources),
    }


def _priced(
    study: Study, models: Mapping[str, Anatomy | UserError], device: Device, console: Console | None
) -> dict[str, Any]:
    """The record's tables: `rows`, `plans`, `prefix_cache`, `left_out`."""
    tables: dict[str, list[Row]] = {"rows": [], "plans": [], "prefix_cache": [], "left_out": []}
    pairs = [(name, options) for name in models for options in study.strategies]
    cells = len(pairs) * len(study.gpus) * len(study.stages)
    for name, options in _with_progress(pairs, console if cells >= _LONG else None):
        names = {"model": name, "strategy": label(options)}
        try:
            case = _case(study, models[name], name, options, device)
        except UserError as reason:
            tables["left_out"].append({**names, "reason": str(reason)})
            continue
        rows = [{**names, **case.cell(gpus, stage)} for gpus in study.gpus for stage in study.stages]
        smallest = smallest_cluster(rows)
        tables["rows"] += rows
        tables["plans"].append({**names, **case.summary(), "smallest": smallest and _without(smallest, names)})
        if smallest and case.has_prefix:
            tables["prefix_cache"].append({**names, **case.cache(smallest["gpus"], smallest["stage"])})
    return tables


def _with_progress(
    pairs: Sequence[tuple[str, FreezeOptions]], console: Console | None
) -> Iterable[tuple[str, FreezeOptions]]:
    if console is None:
        return pairs
    watch: Watch[tuple[str, FreezeOptions]] = watched(console, "pricing plans")
    return watch(pairs)


def smallest_cluster(rows: Iterable[Mapping[str, Any]]) -> Row | None:
    """Of the cells of a plan, the fewest devices that hold it, at the fastest stage; a lower one where it is no slower to speak
    of (`sweep.WORTH`). None where none holds it."""
    holding = sorted((row for row in rows if row["fits"]), key=lambda row: (row["gpus"], row["stage"]))
    found: Row | None = None
    for row in (row for row in holding if row["gpus"] == holding[0]["gpus"]):
        if found is None or row["seconds_per_step"] < (1 - WORTH) * found["seconds_per_step"]:
            found = dict(row)
    return found


def _without(row: Row, keys: Iterable[str]) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


@dataclass(frozen=True)
class _Case:
    """One model under one plan."""

    study: Study
    ground: Ground
    plan: FreezePlan

    @cached_property
    def _cost(self) -> PlanCost:
        return self.ground.cost(self.plan)

    def cell(self, gpus: int, stage: int) -> Row:
        """One row of the table."""
        found = cell(self.ground, self._cost, stage, gpus)
        token = 1 / found.tokens_per_second
        return {
            "gpus": gpus,
            "stage": stage,
            "bytes": found.price.peaks.most,
            "fits": found.fits,
            "seconds_per_step": found.seconds.total,
            "seconds_per_token": token,
            **training_cost(token, gpus, self.study),
        }

    def summary(self) -> Row:
        """What is the same on every cluster."""
        states = self._cost.at(0, 1).states
        return {"parameters": states.total, "trainable": states.trainable, "flops_vs_full": states.flops_ratio}

    @property
    def has_prefix(self) -> bool:
        """Whether transformer layers lie below all that ever trains."""
        return cached_layers(self._cost.anatomy, self.plan.ever_trained) > 0

    def _cache(self, gpus: int) -> CacheCost:
        found = cache_of(
            self.ground.anatomy, self.plan, storage="auto", dtype_bytes=self.study.dtype_bytes,
            sequence_length=self.study.sequence_length, device=self.ground.device, ranks=gpus,
        )  # fmt: skip
        assert found is not None, "asked for where there is a prefix"
        return found

    def cache(self, gpus: int, stage: int) -> Row:
        """Reading a token's prefix against recomputing it, and the step with it against without (formulas: above)."""
        found = self._cache(gpus)
        with_cache = self.ground.cost(self.plan, replace(self.ground.workload, prefix_cache=True))
        without, cached = (cell(self.ground, cost, stage, gpus).seconds.total for cost in (self._cost, with_cache))
        return {
            "gpus": gpus,
            "stage": stage,
            "bytes_a_token": found.token_bytes,
            "recompute_seconds": found.recompute_seconds,
            "host_seconds": found.memory_seconds,
            "storage_seconds": found.disk_seconds,
            "host_pays": found.recompute_seconds / found.memory_seconds,
            "storage_pays": found.recompute_seconds / found.disk_seconds,
            "seconds_per_step": without,
            "cached_seconds_per_step": cached,
            "step_speedup": without / cached,
        }


def training_cost(seconds_per_token: float, gpus: int, study: Study) -> Row:
    """Device-hours of the study's tokens, and their price where an hour has one."""
    hours = seconds_per_token * study.tokens * gpus / 3600
    each = study.price_per_gpu_hour
    return {"gpu_hours": hours, "price": None if each is None else each * hours}


def _case(study: Study, anatomy: Anatomy | UserError, name: str, options: FreezeOptions, device: Device) -> _Case:
    """UserError, to be told as a reason, for what the model cannot do."""
    if isinstance(anatomy, UserError):
        raise anatomy
    known = known_activations(name)
    if known is None:
        raise UserError(f"The activations of model '{name}' are not known here.")
    work = Workload(
        micro_batch_size=study.per_device_train_batch_size, gradient_checkpointing=study.gradient_checkpointing
    )
    ground = Ground(
        anatomy, known.of(work.task, work.attention, study.dtype_bytes), work, device,
        dtype_bytes=study.dtype_bytes, sequence_length=study.sequence_length,
    )  # fmt: skip
    return _Case(study, ground, make_plan(anatomy, options))


# -- the record --------------------------------------------------------------------------------------------------------


def _require_same(path: Path, text: str) -> None:
    """UserError where a record is of another study, or was priced by other formulas; nothing is ever lost to a rerun."""
    if not path.exists() or path.read_text(encoding="utf-8") == text:
        return
    what = "another study" if path.name == RESOLVED else "this study with other figures (an earlier version's)"
    raise UserError(f"{path.parent} holds {what}. Name another output_dir, or remove {path.parent}.")


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}. Name another output_dir.") from None


def fitting(record: Mapping[str, Any]) -> Iterator[Row]:
    """Of each plan and number of devices the fastest stage that fits."""
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in record["rows"]:
        groups.setdefault((row["model"], row["strategy"], row["gpus"]), []).append(row)
    yield from filter(None, map(smallest_cluster, groups.values()))
