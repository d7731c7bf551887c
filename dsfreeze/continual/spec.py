"""What a sequence of tasks is made of, as immutable sections that check themselves; `reading.py` makes one from a file. No torch.

model: smollm2-135m                  # and zero, data, freeze, train ...: a recipe that all rounds have in common
tasks:
- {name: news, data: {train: news.jsonl, eval: test.jsonl}, prompt: "{text}\\nTopic:", answer: "{topic}"}
- {name: chats, data: {train: alpaca.jsonl, eval: alpaca_test.jsonl}, metric: rouge_l, train: {num_train_epochs: 1}}
methods: [full, half, {name: gentle, method: full, train: {learning_rate: 1e-6}}, wise_ft]
seeds: [1, 2, 3]
probes: [{name: wikitext, data: {eval: wikitext.jsonl, text: text}}]
"""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsfreeze import named
from dsfreeze.continual.matrix import Denominator
from dsfreeze.continual.methods import METHODS, Method
from dsfreeze.errors import did_you_mean
from dsfreeze.named import Name, Seeds, entry, refuse_doubles
from dsfreeze.recipe_section import Section, Seed, Texts

#: Sections of a recipe that a sequence's file may hold, for all rounds.
COMMON = ("model", "task", "data", "freeze", "zero", "train", "preference", "retain")
#: WiSE-FT's weights of the trained model.
ALPHAS = tuple(step / 10 for step in range(11))


def fields_of(template: str) -> tuple[str, ...]:
    """The columns that a template names in braces, in order; ValueError when it is no template."""
    found = [
        (name, spec, conversion) for _, name, spec, conversion in string.Formatter().parse(template) if name is not None
    ]
    for name, spec, conversion in found:
        if not name or spec or conversion or any(mark in name for mark in ".[]"):
            raise ValueError(f"'{template}': write columns as {{column}}, and a brace that is meant as one twice")
    return tuple(dict.fromkeys(name for name, _, _ in found))


class Measured(named.Measured):
    """What a score is taken on: a task, or a probe of general ability. Without a task of its own it is sft (a probe without templates:
    causal_lm), whose metric is exact_match (perplexity)."""

    prompt: str | None = None
    """sft: the prompt, with columns in braces: "{text} Topic:"; none reads the usual shapes of chats."""
    answer: str | None = None
    """sft: the answer, likewise."""

    @field_validator("prompt", "answer")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            fields_of(value)
        return value

    @model_validator(mode="after")
    def _pair(self) -> Measured:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError(f"'{self.name}' has a prompt or an answer alone; write both, or neither")
        return self


class TaskSpec(Measured):
    """One task of the sequence: a round of training, and a column of the matrix."""

    train: dict[str, Any] = {}
    """`train:` of a recipe, over the sequence's: num_train_epochs, max_steps, learning_rate ..."""


class ProbeSpec(Measured):
    """Something the sequence does not train on: text whose perplexity is taken, or a task to be done without training."""


class MethodSpec(Section):
    """A method, and what it does differently here."""

    name: Name
    """Its name in tables."""
    method: str | None = None
    """Which of the methods it is; none: the one of that name."""
    freeze: dict[str, Any] = {}
    """`freeze:` of a recipe, over the method's."""
    train: dict[str, Any] = {}
    """`train:` of a recipe, over the tasks' own."""
    retain: dict[str, Any] = {}
    """`retain:` of a recipe, over the method's."""
    replay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Mix in this share of each earlier task's rows, whatever the method."""
    alphas: list[Annotated[float, Field(ge=0, le=1)]] | None = None
    """wise_ft: weights of the trained model; none takes 0 to 1 in steps of 0.1."""

    @model_validator(mode="after")
    def _known(self) -> MethodSpec:
        if (self.method or self.name) not in METHODS:
            what = f"method '{self.method or self.name}' does not exist."
            raise ValueError(what + did_you_mean(self.method or self.name, METHODS, how_many_listed=len(METHODS)))
        if self.alphas is not None and self.kind.merge != "interpolate":
            raise ValueError(f"alphas are wise_ft's; '{self.name}' reads none")
        if self.kind.merge and (self.train or self.retain or self.replay):
            raise ValueError(f"'{self.name}' trains nothing, so that train, retain and replay say nothing")
        return self

    @property
    def kind(self) -> Method:
        return METHODS[self.method or self.name]


class ReplayOptions(Section):
    """How much of earlier tasks comes back, for the method replay."""

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each earlier task's training rows that is mixed into every later round."""
    choose: Literal["sample", "first"] = "sample"
    """A sample drawn by the run's seed, or the first rows of the file (as TRACE's code)."""


class Spec(Section):
    """A sequence of tasks, the methods that are compared on it, and what is measured."""

    model: str | dict[str, Any]
    """The start model, as in a recipe."""
    task: str = "sft"
    """The task of those that name none."""
    data: dict[str, Any] = {}
    """`data:` of a recipe, for all tasks."""
    freeze: dict[str, Any] = {}
    """`freeze:` of a recipe, for methods that name no strategy; full tuning, unless it says otherwise."""
    zero: str = "zero2"
    """As in a recipe."""
    train: dict[str, Any] = {}
    """`train:` of a recipe, for all rounds; seed and output_dir are the sequence's to set."""
    preference: dict[str, Any] = {}
    """`preference:` of a recipe, for the tasks that are one."""
    retain: dict[str, Any] = {}
    """`retain:` of a recipe, for the methods that retain."""
    suite: Literal["trace", "trace-official"] | None = None
    """A known sequence: its tasks, order, metrics and settings stand for all that this file leaves out."""
    folder: Path | None = None
    """Where the suite's files are."""
    tasks: Annotated[list[TaskSpec], Field(min_length=1)]
    """The tasks, in the order of training."""
    order: Texts | None = None
    """Another order: the tasks' names."""
    permutation_seed: Seed | None = None
    """Another order: a shuffle drawn by this seed."""
    methods: Annotated[list[Annotated[MethodSpec, BeforeValidator(entry)]], Field(min_length=1)]
    """Names, or mappings with a name and what is different here."""
    seeds: Seeds = [42]
    """train.seed of the runs; every method has one run for each."""
    draws: Seeds = [0]
    """freeze.seed of the runs of methods that draw what trains; each seed has a run for each."""
    probes: list[ProbeSpec] = []
    """General ability, measured beside the tasks."""
    replay: ReplayOptions = ReplayOptions()
    """For the method replay."""
    bwt: Denominator = "T-1"
    """What backward transfer is divided by in tables; the results have both."""
    long_answers: Literal["refuse", "cut"] = "refuse"
    """Answers longer than data.max_length: a mistake, or cut from the right with a note."""
    keep_models: bool = False
    """Keep the model of every round; false keeps the last one of each run."""
    output_dir: Path = Path("runs/continual")
    """Where results, rendered tasks and runs go."""

    @field_validator("seeds", "draws")
    @classmethod
    def _once(cls, value: list[int]) -> list[int]:
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _agree(self) -> Spec:
        for key, names in (
            ("tasks", self.names),
            ("probes", [p.name for p in self.probes]),
            ("methods", [m.name for m in self.methods]),
        ):
            refuse_doubles(key, names)
        refuse_doubles("tasks and probes", [*self.names, *(probe.name for probe in self.probes)])
        if self.order is not None and self.permutation_seed is not None:
            raise ValueError("order and permutation_seed both say in which order; keep one")
        if self.order is not None and sorted(self.order) != sorted(self.names):
            odd = next((name for name in self.order if name not in self.names), None)
            told = (
                f"names '{odd}', which is no task.{did_you_mean(odd, self.names)}"
                if odd
                else "is to name every task once"
            )
            raise ValueError(f"order {told}")
        if self.merged and "full" not in [method.method or method.name for method in self.methods]:
            raise ValueError(
                f"method '{self.merged[0].name}' is made of the models that full leaves; add full to methods"
            )
        return self

    @property
    def names(self) -> list[str]:
        """Of the tasks, as written."""
        return [task.name for task in self.tasks]

    @property
    def sequence(self) -> list[TaskSpec]:
        """The tasks in the order of training."""
        if self.order is not None:
            return sorted(self.tasks, key=lambda task: (self.order or []).index(task.name))
        tasks = list(self.tasks)
        if self.permutation_seed is not None:
            random.Random(self.permutation_seed).shuffle(tasks)
        return tasks

    @property
    def merged(self) -> list[MethodSpec]:
        """The methods without training."""
        return [method for method in self.methods if method.kind.merge]

    def task_of(self, measured: Measured) -> str:
        """The recipe's task of a task or probe."""
        if measured.task is None and isinstance(measured, ProbeSpec) and measured.prompt is None:
            return "causal_lm"
        return measured.task or (self.task if isinstance(measured, TaskSpec) else "sft")
