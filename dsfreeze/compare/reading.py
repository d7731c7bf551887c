"""Reading a comparison: a YAML file and `key=value` overrides in, a `Grid` out, or one error that lists every mistake. No torch.

Every recipe that the comparison will run is made here once, so that a mistake in the last one is told before the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsfreeze.compare.spec import PROTOCOLS, MethodSpec, ModelSpec, Spec, TaskSpec
from dsfreeze.errors import UserError
from dsfreeze.files import no_file, reader_of
from dsfreeze.layered import Layer, Layered, Mistake, checked, override, read_values, refuse
from dsfreeze.metrics import DEFAULTS, kind_of
from dsfreeze.recipe import FREEZE_KEYS, TASKS, Recipe
from dsfreeze.recipe_reader import Draft, report, resolve
from dsfreeze.recipe_yaml import Key
from dsfreeze.section_reader import problems
from dsfreeze.zero_config import deepspeed_config, is_local

#: Keys of a recipe that a comparison sets itself, and the key to write instead.
OWN_KEYS = {
    ("train", "seed"): "seeds", ("train", "output_dir"): "output_dir", ("train", "export"): "keep_models",
    ("train", "resume_from_checkpoint"): "nothing: a comparison always goes on where it was stopped",
    ("data", "max_train_examples"): "sizes", ("data", "metrics"): "metric, of a task", ("freeze", "seed"): "seeds",
    ("freeze", "prefix_cache"): "prefix_cache", ("freeze", "prefix_cache_dir"): "prefix_cache",
    ("analyze", "scores"): "nothing: a method says what it needs", ("analyze", "recommend"): "nothing: a method says what it needs",
    ("analyze", "output_dir"): "output_dir",
}  # fmt: skip
#: The folder of prefix caches, below output_dir.
PREFIX = "prefix"


@dataclass(frozen=True)
class Group:
    """A method on a model, a task and a size: its seeds have one learning rate."""

    model: ModelSpec
    task: TaskSpec
    method: MethodSpec
    size: int | None = None

    @property
    def key(self) -> str:
        size = "all" if self.size is None else self.size
        return f"{self.model.name}/{self.task.name}/{self.method.name}/size-{size}"


@dataclass(frozen=True)
class Cell:
    """One run of the comparison."""

    group: Group
    seed: int

    @property
    def key(self) -> str:
        return f"{self.group.key}/seed-{self.seed}"


@dataclass(frozen=True)
class Grid(Layered):
    """A comparison and where its keys stand; makes its recipes."""

    spec: Spec = field(kw_only=True)

    @property
    def groups(self) -> list[Group]:
        """In the order of the file: model, task, size, method."""
        spec = self.spec
        return [
            Group(model, task, method, size)
            for model in spec.models
            for task in spec.tasks
            for size in spec.sizes
            for method in spec.methods
        ]

    @property
    def cells(self) -> list[Cell]:
        return [Cell(group, seed) for group in self.groups for seed in self.spec.seeds]

    def recipe(self, group: Group, seed: int) -> Recipe:
        """A run's recipe; its learning rate, its adapters' rank and its scores are still those of the file."""
        return checked(self.draft_of(group, seed))

    def metric_of(self, task: TaskSpec) -> str:
        """The metric whose value is the score: the task's, or the first that evaluations of its kind report."""
        return task.metric or DEFAULTS[kind_of(self.spec.task_of(task), self._num_labels(task))][0]

    def _num_labels(self, task: TaskSpec) -> int | None:
        number = {**self.spec.data, **task.data}.get("num_labels")
        return number if isinstance(number, int) else None

    # -- drafts ------------------------------------------------------------------------------------------------

    def draft_of(self, group: Group, seed: int) -> Draft:
        spec, model, task, method = self.spec, group.model, group.task, group.method
        at = {name: (name, getattr(spec, name).index(one)) for name, one in self._parts(group)}
        heads: dict[str, tuple[Any, Key]] = {
            "model": (model.source, at["models"]), "zero": (spec.zero, ("zero",)),
            "task": (spec.task_of(task), (*at["tasks"], "task")),
        }  # fmt: skip
        layers: list[Layer] = [
            (("protocol",), PROTOCOLS[spec.protocol]),
            ((), {"data": spec.data, "train": spec.train, "analyze": spec.analyze}),
            (at["models"], {"data": model.data, "train": model.train}),
            (at["tasks"], {"data": task.data, "train": task.train}),
            (at["methods"], {"freeze": _placeholder(method)}),
            (at["methods"], {"freeze": method.freeze, "train": method.train}),
        ]
        draft = self.draft(heads, layers)
        self._set(draft, group, seed)
        return draft

    def _parts(self, group: Group) -> list[tuple[str, Any]]:
        return [("models", group.model), ("tasks", group.task), ("methods", group.method)]

    def _set(self, draft: Draft, group: Group, seed: int) -> None:
        """What a comparison sets itself."""
        freeze, data = draft.values["freeze"], draft.values["data"]
        if freeze.get("strategy") in FREEZE_KEYS["seed"]:
            freeze["seed"] = seed
        if self.spec.prefix_cache != "off":
            freeze |= {"prefix_cache": self.spec.prefix_cache, "prefix_cache_dir": str(self.spec.output_dir / PREFIX)}
        if group.size is not None:
            data["max_train_examples"] = group.size
        if group.task.metric is not None:
            data["metrics"] = [group.task.metric]
        folder = str(self.spec.output_dir / "runs" / group.key / f"seed-{seed}")
        draft.values["train"] |= {"seed": seed, "output_dir": folder, "export": self.spec.keep_models}


def _placeholder(method: MethodSpec) -> dict[str, Any]:
    """The method's own options; scores that an analysis has yet to take are named, for strategies that cannot do without."""
    kind = method.kind
    return {**kind.freeze, **({"scores": "scores.json"} if kind.analyze and "scores" not in method.freeze else {})}


# -- reading -------------------------------------------------------------------------------------------------------


def read_grid(path: Path, overrides: Sequence[str] = ()) -> Grid:
    """The comparison of a file with `key=value` laid over it; one UserError naming every mistake.

    A key inside a list is named by the element's number or name: `tasks.rte.train.max_steps=3`.
    """
    values, where, mistakes = read_values(path, "comparison")
    for word in overrides:
        mistakes += override(values, where, word)
    refuse(mistakes)
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        raise UserError(report(problems(Spec, error, where, str(path)))) from None
    grid = Grid(str(path), path.parent, where, spec=spec)
    refuse([*_own_keys(grid), *_lacks(grid), *_metrics(grid), *_recipes(grid)])
    return grid


def _own_keys(grid: Grid) -> Iterator[Mistake]:
    holders: list[tuple[Key, Any]] = [((), grid.spec)]
    for name in ("models", "tasks", "methods"):
        holders += [((name, n), each) for n, each in enumerate(getattr(grid.spec, name))]
    yield from grid.own_keys(holders, OWN_KEYS, "the comparison")


def _lacks(grid: Grid) -> Iterator[Mistake]:
    """Tasks without data, or whose files are not there."""
    for index, task in enumerate(grid.spec.tasks):
        data = {**grid.spec.data, **task.data}
        for key, use in (("train", "train on"), ("eval", "measure it on")):
            source = data.get(key)
            if not source:
                yield grid.place(("tasks", index)), f"task '{task.name}' has no data.{key}: name what to {use}"
            elif reader_of(path := Path(grid.located(str(source)))) and not path.is_file():
                missing = no_file(grid.folder / path if grid.folder else path)
                yield grid.place(("tasks", index, "data", key)), f"task '{task.name}', data.{key}: {missing}"


def _metrics(grid: Grid) -> Iterator[Mistake]:
    """Metrics that are not for their task."""
    for index, task in enumerate(grid.spec.tasks):
        kind = grid.spec.task_of(task)
        if kind in TASKS and task.metric is not None:
            yield from grid.metric_mistake(("tasks", index, "metric"), kind, grid._num_labels(task), task.metric)


def _recipes(grid: Grid) -> Iterator[Mistake]:
    """What is wrong with any recipe that the comparison will run; seeds and sizes change nothing about that."""
    spec = grid.spec
    groups = [
        Group(model, task, method, spec.sizes[0])
        for model in spec.models
        for task in spec.tasks
        for method in spec.methods
    ]
    drafts = [grid.draft_of(group, spec.seeds[0]) for group in groups]
    found = [resolve(draft) for draft in drafts]
    yield from (mistake for draft in drafts for mistake in draft.mistakes.values())
    for draft, recipe in zip(drafts, found, strict=True):
        if recipe.train.eval_strategy == "no":
            yield (
                draft.place(("train", "eval_strategy")),
                "train.eval_strategy: no measures nothing; write end, steps or epoch",
            )
    if not any(draft.mistakes for draft in drafts) and not is_local(found[0]):
        try:
            deepspeed_config(found[0], int(os.environ.get("WORLD_SIZE", "1")))
        except UserError as error:
            yield grid.place(("zero",)), str(error)
