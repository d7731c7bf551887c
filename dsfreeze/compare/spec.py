"""What a comparison is made of, as immutable sections that check themselves; `reading.py` makes one from a file. No torch.

models: [minilm-l6]
tasks: [{name: nli, data: {train: "builtin:nli", eval: "builtin:nli"}}]
methods: [full, bottom50, {name: lora_params, method: lora, match: parameters, to: bottom50}]
seeds: [1, 2, 3]
sizes: [1000, all]
protocol: converged
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsfreeze.budget import parse_limit
from dsfreeze.compare.methods import METHODS, Method
from dsfreeze.errors import did_you_mean
from dsfreeze.named import Measured, Name, Seeds, entry, refuse_doubles
from dsfreeze.recipe_section import Section, Seed

Protocol = Literal["paper", "converged"]
#: What a protocol says where a file says nothing. `paper`: Hwang et al. (Applied Sciences 15:10434), 100 steps at 5e-5, batches of 32,
#: at most 3,200 examples. `converged` [ours]: up to 20 epochs, ended by a tenth of the training data that is set aside with seed 0;
#: a rate that does not fall, so that where a run ends does not depend on where it might have ended.
PROTOCOLS: dict[Protocol, dict[str, dict[str, Any]]] = {
    "paper": {
        "data": {"max_train_examples": 3200},
        "train": {"max_steps": 100, "learning_rate": 5e-5, "per_device_train_batch_size": 32, "save_strategy": "no"},
    },
    "converged": {
        "data": {"held_out": 0.1, "held_out_seed": 0},
        "train": {
            "num_train_epochs": 20.0, "early_stopping_patience": 3, "eval_strategy": "epoch", "per_device_train_batch_size": 32,
            "lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.03, "save_strategy": "no",
        },
    },
}  # fmt: skip


def _model(value: Any) -> Any:
    """A hub id or folder alone is named by its last part."""
    return {"name": value.rstrip("/").rpartition("/")[2], "model": value} if isinstance(value, str) else value


def _sizes(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    return [None if each == "all" else each for each in values]


class ModelSpec(Section):
    """A model, and what it needs that others do not."""

    name: Name
    """Its name in tables and as a folder."""
    model: str | dict[str, Any] | None = None
    """As in a recipe; none: the model of that name."""
    data: dict[str, Any] = {}
    """`data:` of a recipe, over the file's."""
    train: dict[str, Any] = {}
    """`train:` of a recipe, over the file's."""

    @property
    def source(self) -> str | dict[str, Any]:
        """`model:` of a recipe."""
        return self.name if self.model is None else self.model


class TaskSpec(Measured):
    """A task, and what its runs need that others' do not."""

    train: dict[str, Any] = {}
    """`train:` of a recipe, over the model's."""


class MethodSpec(Section):
    """A method, and what it does differently here."""

    name: Name
    """Its name in tables and as a folder."""
    method: str | None = None
    """Which of the methods it is; none: the one of that name, or, with freeze.strategy, none of them."""
    freeze: dict[str, Any] = {}
    """`freeze:` of a recipe, over the method's."""
    train: dict[str, Any] = {}
    """`train:` of a recipe, over the task's."""
    match: Literal["parameters", "memory"] | None = None
    """Choose the adapters' rank so that as many parameters train as in another method, or so that the predicted peak is no higher."""
    to: str | None = None
    """The method that is matched."""

    @model_validator(mode="after")
    def _known(self) -> MethodSpec:
        name = self.method or self.name
        if name not in METHODS and (self.method is not None or "strategy" not in self.freeze):
            listed = did_you_mean(name, METHODS, how_many_listed=len(METHODS))
            raise ValueError(f"method '{name}' does not exist.{listed} Another one gives its freeze.strategy.")
        if (self.match is None) != (self.to is None):
            raise ValueError(
                f"'{self.name}' has match or to alone; write both, such as {{match: parameters, to: bottom50}}"
            )
        if self.match is not None and not self._has_adapter:
            raise ValueError(f"'{self.name}' has no adapter whose rank could match; write method: lora")
        return self

    @property
    def kind(self) -> Method:
        name = self.method or self.name
        return METHODS.get(name) or Method("as freeze says", {})

    @property
    def _has_adapter(self) -> bool:
        options = {**self.kind.freeze, **self.freeze}
        return options.get("strategy") in ("lora", "dora") or bool(options.get("adapter"))


class TuneOptions(Section):
    """How `converged` looks for each method's learning rate: every one has the same number of trials in the same range, on its first
    seed, and is judged by the rows set aside."""

    trials: Annotated[int, Field(ge=0, le=1000)] = 6
    """Runs for each model, task, method and size; 0 tunes nothing."""
    low: Annotated[float, Field(gt=0)] = 1e-5
    """Lowest learning rate."""
    high: Annotated[float, Field(gt=0)] = 3e-3
    """Highest learning rate."""
    sampler: Literal["grid", "tpe", "random"] = "grid"
    """Rates evenly spaced in the logarithm, the same for every method; Optuna's TPE; or draws from the range, the same for every method."""
    seed: Seed = 0
    """Of tpe and random."""

    @model_validator(mode="after")
    def _range(self) -> TuneOptions:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}; low must be below high")
        return self


class Spec(Section):
    """A comparison: every method on every model, task, size and seed."""

    models: Annotated[list[Annotated[ModelSpec, BeforeValidator(_model)]], Field(min_length=1)]
    """Names, hub ids or folders, or mappings with a name and what is different for that model."""
    tasks: Annotated[list[TaskSpec], Field(min_length=1)]
    """What is learnt: mappings with a name, data, and perhaps task, metric and train."""
    methods: Annotated[list[Annotated[MethodSpec, BeforeValidator(entry)]], Field(min_length=1)]
    """Names, or mappings with a name and what is different here."""
    seeds: Seeds = [42]
    """train.seed of the runs, and freeze.seed of methods that draw what trains."""
    sizes: Annotated[list[Annotated[int, Field(ge=1)] | None], BeforeValidator(_sizes), Field(min_length=1)] = [None]
    """Numbers of training examples, a seeded sample; `all` takes all (of `paper`, 3,200)."""
    protocol: Protocol = "paper"
    """What all runs have in common where this file says nothing: paper or converged."""
    tune: TuneOptions = TuneOptions()
    """converged: how learning rates are looked for."""
    task: str = "classification"
    """The task of those that name none."""
    data: dict[str, Any] = {}
    """`data:` of a recipe, for all runs."""
    train: dict[str, Any] = {}
    """`train:` of a recipe, for all runs."""
    analyze: dict[str, Any] = {}
    """`analyze:` of a recipe, for methods that need an analysis: num_examples, batch_size ..."""
    zero: str = "zero2"
    """As in a recipe."""
    prefix_cache: Literal["off", "disk", "auto"] = "off"
    """freeze.prefix_cache of all runs, in one folder that they share; seconds are then those of runs that find it filled or not."""
    memory: str | None = None
    """What runs at once may take together by prediction, such as 8GiB; none takes what is free in host memory."""
    jobs: Annotated[int, Field(ge=1, le=1024)] = 1
    """Most runs at once; fewer where memory is short."""
    keep_models: bool = False
    """Keep the trained models and checkpoints; false keeps the records."""
    output_dir: Path = Path("runs/compare")
    """Where results, recipes and runs go."""

    @field_validator("seeds", "sizes")
    @classmethod
    def _once(cls, value: list[Any]) -> list[Any]:
        return list(dict.fromkeys(value))

    @field_validator("memory")
    @classmethod
    def _bytes(cls, value: str | None) -> str | None:
        if value is not None and parse_limit("memory", value).relative:
            raise ValueError(f"'{value}' is a share; write the bytes that runs may take together, such as 8GiB")
        return value

    @model_validator(mode="after")
    def _agree(self) -> Spec:
        for key in ("models", "tasks", "methods"):
            refuse_doubles(key, [each.name for each in getattr(self, key)])
        for method in self.methods:
            self._matched(method)
        if self.protocol == "paper" and self.tune != TuneOptions():
            raise ValueError("tune is read by protocol converged alone; write that, or leave tune out")
        return self

    def _matched(self, method: MethodSpec) -> None:
        if method.to is None:
            return
        others = {each.name: each for each in self.methods if each is not method}
        if method.to not in others:
            raise ValueError(
                f"'{method.name}' matches '{method.to}', which is no other method here.{did_you_mean(method.to, others)}"
            )
        if others[method.to].match is not None:
            raise ValueError(
                f"'{method.name}' matches '{method.to}', which matches another itself; name what has a size of its own"
            )

    @property
    def tuned(self) -> bool:
        """Whether learning rates are looked for."""
        return self.protocol == "converged" and self.tune.trials > 0

    def task_of(self, task: TaskSpec) -> str:
        """The recipe's task."""
        return task.task or self.task

    def method(self, name: str) -> MethodSpec:
        return next(each for each in self.methods if each.name == name)
