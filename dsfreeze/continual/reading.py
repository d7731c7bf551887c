"""Reading a sequence: a YAML file and `key=value` overrides in, a `Course` out, or one error that lists every mistake. No torch.

Every recipe that the sequence will run is made here once, so that a mistake in the last round's is told before the first. A mistake
stands where its key does: in a task, a method, or the part that all have in common.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsfreeze.continual.methods import ROUND_KEYS
from dsfreeze.continual.spec import COMMON, Measured, MethodSpec, ProbeSpec, Spec, TaskSpec
from dsfreeze.continual.trace import suite_values
from dsfreeze.errors import UserError
from dsfreeze.layered import Layer, Layered, checked, override, read_values, refuse
from dsfreeze.named import DEFAULT_METRICS
from dsfreeze.recipe import FREEZE_KEYS, TASKS, Recipe, TrainOptions
from dsfreeze.recipe_reader import Draft, report, resolve
from dsfreeze.recipe_yaml import Key
from dsfreeze.section_reader import problems
from dsfreeze.zero_config import deepspeed_config, is_local

#: Keys of a recipe that a sequence sets itself, and the key to write instead.
OWN_KEYS = {
    ("train", "seed"): "seeds", ("train", "output_dir"): "output_dir", ("train", "export"): "keep_models",
    ("train", "resume_from_checkpoint"): "nothing: a sequence always goes on where it was stopped",
    ("train", "eval_strategy"): "nothing: every task is evaluated after every round", ("freeze", "seed"): "draws",
    ("retain", "memory"): "nothing: rounds hand their memory on", ("retain", "remember"): "nothing: rounds hand their memory on",
    ("data", "metrics"): "metric, of a task",
}  # fmt: skip
#: Keys that say what lies below a file.
_SUITE = ("suite", "folder")
#: Tasks whose models are the same: a decoder of text. Any other task has a head, or a model, of its own.
TEXT_TASKS = ("sft", "causal_lm", "preference")


@dataclass(frozen=True)
class Course(Layered):
    """A sequence and where its keys stand; makes its recipes."""

    spec: Spec = field(kw_only=True)

    def round_recipe(self, task: TaskSpec, method: MethodSpec, number: int = 1, seed: int = 0, draw: int = 0) -> Recipe:
        """Round `number` (from 1) of a method on a task; its files and its model are still those of the task and of the start."""
        return checked(self.round_draft(task, method, number, seed, draw))

    def measure_recipe(self, measured: Measured) -> Recipe:
        """The evaluation of the start model on a task or probe."""
        return checked(self.measure_draft(measured))

    def draws(self, method: MethodSpec) -> bool:
        """Whether what trains is drawn, so that there is a run for each draw."""
        strategy = self._freeze(method)[0]
        return strategy in FREEZE_KEYS["seed"] or method.kind.merge == "reset"

    # -- drafts ------------------------------------------------------------------------------------------------

    def round_draft(self, task: TaskSpec, method: MethodSpec, number: int, seed: int, draw: int) -> Draft:
        spec, kind = self.spec, method.kind
        strategy, freezing = self._freeze(method)
        key = self._key("methods", method)
        layers: list[Layer] = [
            *self._common(task),
            *freezing,
            *self._measured(task),
            *([((), {"retain": spec.retain}), (key, {"retain": {**kind.changes["retain"], **method.retain}})] if kind.retains else []),
            (key, {"train": method.train}),
        ]  # fmt: skip
        draft = self._draft(layers, task)
        _scale(draft.values.setdefault("train", {}), kind.rate, kind.length)
        draft.values["train"] |= {"seed": seed, "eval_strategy": "no"}
        options = draft.values.setdefault("freeze", {})
        if strategy in FREEZE_KEYS["seed"]:
            options["seed"] = draw
        if strategy in ROUND_KEYS:
            options[ROUND_KEYS[strategy]] = number - 1
        return draft

    def measure_draft(self, measured: Measured) -> Draft:
        draft = self._draft([*self._common(measured), *self._measured(measured)], measured)
        draft.values.setdefault("data", {})["train"] = None
        draft.values["data"]["metrics"] = [metric_of(self.spec, measured)]
        draft.values["freeze"] = {"strategy": "full"}
        return draft

    def _draft(self, layers: Sequence[Layer], measured: Measured) -> Draft:
        heads: dict[str, tuple[Any, Key]] = {name: (getattr(self.spec, name), (name,)) for name in ("model", "zero")}
        task = self.spec.task_of(measured), (*self._key("tasks", measured), "task")
        return self.draft({**heads, "task": task}, layers)

    def _common(self, measured: Measured) -> Iterator[Layer]:
        yield (), {"data": self.spec.data, "train": self.spec.train}
        if self.spec.task_of(measured) == "preference":
            yield (), {"preference": self.spec.preference}

    def _measured(self, measured: Measured) -> Iterator[Layer]:
        key = self._key("tasks", measured)
        train = measured.train if isinstance(measured, TaskSpec) else {}
        yield key, {"data": measured.data, "train": train}

    def _freeze(self, method: MethodSpec) -> tuple[str, list[Layer]]:
        """The strategy, and the layers that say what freezes: what is below one that names a strategy does not count."""
        key = self._key("methods", method)
        layers: list[Layer] = [
            ((), {"freeze": {"strategy": "full"}}), ((), {"freeze": self.spec.freeze}),
            (key, {"freeze": method.kind.changes.get("freeze", {})}), (key, {"freeze": method.freeze}),
        ]  # fmt: skip
        first = max(n for n, (_, sections) in enumerate(layers) if "strategy" in sections["freeze"])
        return str(layers[first][1]["freeze"]["strategy"]), layers[first:]

    def _key(self, group: str, one: Measured | MethodSpec) -> Key:
        group = "probes" if isinstance(one, ProbeSpec) else group
        names = [each.name for each in getattr(self.spec, group)]
        return (group, names.index(one.name))


def metric_of(spec: Spec, measured: Measured) -> str:
    """The metric whose value is the score."""
    task = spec.task_of(measured)
    return measured.metric or DEFAULT_METRICS.get(task, "accuracy")


def _scale(train: dict[str, Any], rate: float, length: float) -> None:
    """Another learning rate and length, where a method has one; a wrong value is left for the recipe to blame."""
    for key, factor in (("learning_rate", rate), ("max_steps", length), ("num_train_epochs", length)):
        value = train.get(key, TrainOptions.model_fields[key].default)
        if factor == 1 or not isinstance(value, int | float) or value <= 0:
            continue
        train[key] = max(1, round(value * factor)) if key == "max_steps" else value * factor


# -- reading -------------------------------------------------------------------------------------------------------


def read_course(path: Path, overrides: Sequence[str] = ()) -> Course:
    """The sequence of a file with `key=value` laid over it; one UserError naming every mistake.

    A key inside a list is named by the element's number or name: `tasks.news.train.max_steps=3`.
    """
    values, where, mistakes = read_values(path, "sequence of tasks")
    about_suite = [word for word in overrides if word.partition("=")[0] in _SUITE]
    for word in about_suite:
        mistakes += override(values, where, word)
    if values.get("suite") is not None:
        values = suite_values(values, path.parent)
    for word in overrides:
        mistakes += override(values, where, word) if word not in about_suite else []
    refuse(mistakes)
    try:
        spec = Spec.model_validate(values)
    except ValidationError as error:
        raise UserError(report(problems(Spec, error, where, str(path)))) from None
    course = Course(str(path), path.parent, where, spec=spec)
    refuse([*_own_keys(course), *_lacks(course), *_kinds(course), *_metrics(course), *_recipes(course)])
    return course


# -- mistakes that no section sees by itself -----------------------------------------------------------------------


def _own_keys(course: Course) -> Iterator[tuple[str, str]]:
    """Keys of a recipe that the sequence sets."""
    spec = course.spec
    holders: list[tuple[Key, Any]] = [((), spec)]
    for group in ("tasks", "probes", "methods"):
        holders += [((group, n), each) for n, each in enumerate(getattr(spec, group))]
    yield from course.own_keys(holders, OWN_KEYS, "the sequence")


def _lacks(course: Course) -> Iterator[tuple[str, str]]:
    """Tasks and probes without data."""
    for measured in (*course.spec.tasks, *course.spec.probes):
        data = {**course.spec.data, **measured.data}
        place = course.place(course._key("tasks", measured))
        needed = ("eval",) if isinstance(measured, ProbeSpec) else ("train", "eval")
        what = "probe" if isinstance(measured, ProbeSpec) else "task"
        for key in needed:
            if not data.get(key):
                use = "train on" if key == "train" else "measure it on"
                yield place, f"{what} '{measured.name}' has no data.{key}: name what to {use}"


def _kinds(course: Course) -> Iterator[tuple[str, str]]:
    """Tasks that one model cannot do, and methods that mix what cannot be mixed."""
    spec = course.spec
    kinds = {measured.name: spec.task_of(measured) for measured in (*spec.tasks, *spec.probes)}
    if any(kind not in TEXT_TASKS for kind in kinds.values()) and len(set(kinds.values())) > 1:
        odd = next(name for name, kind in kinds.items() if kind not in TEXT_TASKS)
        place = course.place(("tasks",))
        yield (
            place,
            (
                f"'{odd}' is of task {kinds[odd]}, whose model cannot do the others; write all of them as {', '.join(TEXT_TASKS)}: "
                "a classification as sft, with a prompt and an answer"
            ),
        )
    trained = {kinds[task.name] for task in spec.tasks}
    for index, method in enumerate(spec.methods):
        if method.kind.rows == "all" and len(trained) > 1:
            place = course.place(("methods", index))
            yield (
                place,
                f"method '{method.name}' trains on all tasks at once, and these are of {', '.join(sorted(trained))}",
            )
    if trained & {"classification", "tokens"}:
        yield from _heads(course)


def _heads(course: Course) -> Iterator[tuple[str, str]]:
    """One head serves all tasks, so they have the same classes."""
    spec = course.spec
    labels = {tuple({**spec.data, **task.data}.get("labels") or ()) for task in spec.tasks}
    if labels == {()} or len(labels) > 1:
        place = course.place(("tasks",))
        yield (
            place,
            (
                "data.labels: tasks that share a head have the same classes; name them once, in the sequence's data.labels, or write "
                "the tasks as sft, with prompts and answers"
            ),
        )


def _metrics(course: Course) -> Iterator[tuple[str, str]]:
    """Metrics that are not for their task."""
    spec = course.spec
    for measured in (*spec.tasks, *spec.probes):
        task, labels = spec.task_of(measured), {**spec.data, **measured.data}.get("num_labels")
        if task in TASKS:
            key = (*course._key("tasks", measured), "metric")
            yield from course.metric_mistake(key, task, labels, metric_of(spec, measured))


def _recipes(course: Course) -> Iterator[tuple[str, str]]:
    """What is wrong with any recipe that the sequence will run."""
    spec = course.spec
    drafts = [course.measure_draft(measured) for measured in (*spec.tasks, *spec.probes)]
    for method in spec.methods:
        tasks = spec.tasks if method.kind.merge is None or method.kind.changes else []
        drafts += [course.round_draft(task, method, 1, spec.seeds[0], spec.draws[0]) for task in tasks]
    found = [resolve(draft) for draft in drafts]
    yield from (mistake for draft in drafts for mistake in draft.mistakes.values())
    if not any(draft.mistakes for draft in drafts) and not is_local(found[0]):
        try:
            deepspeed_config(found[0], int(os.environ.get("WORLD_SIZE", "1")))
        except UserError as error:
            yield course.place(("zero",)), str(error)


assert set(COMMON) <= set(Spec.model_fields)
