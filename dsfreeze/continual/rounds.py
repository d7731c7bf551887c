"""The rounds: train on a task, evaluate on all, write a row; method by method, seed by seed, draw by draw.

    output_dir/runs/METHOD/seed-S[-draw-D]/round-T/      a run's record, as `dsfreeze train` leaves it, and its model

A row that is written is never made again; a round that was stopped goes on from its checkpoint, and one that was stopped before it had
any begins anew. Every rank runs this, rank 0 alone writes and deletes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from dsfreeze.checkpoint import list_checkpoints
from dsfreeze.continual import weights
from dsfreeze.continual.measuring import Meter
from dsfreeze.continual.methods import METHODS
from dsfreeze.continual.prepare import prepare
from dsfreeze.continual.reading import Course, metric_of
from dsfreeze.continual.rendering import Rendered, pooled, read_rows, replayed, write_rows
from dsfreeze.continual.results import open_results, summarise, write_results
from dsfreeze.continual.spec import ALPHAS, Measured, MethodSpec
from dsfreeze.engine.process import agree, led, process_group, together
from dsfreeze.errors import UserError
from dsfreeze.interrupt import Interrupted
from dsfreeze.loop import train
from dsfreeze.metrics import score
from dsfreeze.recipe import Recipe
from dsfreeze.record import MODEL, SUMMARY
from dsfreeze.screen import screen
from dsfreeze.state_file import State

MIXED, MEMORY, PREFERENCE = "train.jsonl", "memory", "preference"


@dataclass(frozen=True)
class Trip:
    """One method with one seed and one draw, through all tasks. `alpha` is WiSE-FT's weight of the trained model."""

    method: MethodSpec
    seed: int
    draw: int | None = None
    alpha: float | None = None

    @property
    def label(self) -> str:
        """Of its row in tables."""
        return self.method.name if self.alpha is None else f"{self.method.name}@{self.alpha:g}"

    @property
    def key(self) -> str:
        return f"{self.label}/seed-{self.seed}" + ("" if self.draw is None else f"-draw-{self.draw}")


def trips(course: Course) -> Iterator[Trip]:
    """All of a sequence, those that train first."""
    spec = course.spec
    for method in sorted(spec.methods, key=lambda each: each.kind.merge is not None):
        draws: Sequence[int | None] = spec.draws if course.draws(method) else [None]
        alphas: Sequence[float | None] = [None]
        if method.kind.merge == "interpolate":
            alphas = method.alphas or ALPHAS
        for seed in spec.seeds:
            yield from (Trip(method, seed, draw, alpha) for draw in draws for alpha in alphas)


def run_course(course: Course, console: Console | None = None) -> State:
    """Run what is left of a sequence, and return its results, which the results file holds too.

    UserError for every mistake that can be known before the first round, on every rank; Interrupted after a signal.
    """
    console = console or screen()
    with _told_once(), process_group(course.measure_recipe(course.spec.tasks[0])) as ranks:
        agree(hashlib.sha256(course.spec.model_dump_json().encode()).hexdigest(), "the sequence of tasks")
        files = led(lambda: prepare(course))
        state = led(lambda: open_results(course.spec, files))
        leader = ranks.rank == 0
        rounds = Rounds(course, files, state, console if leader else Console(quiet=True), leader=leader)
        rounds.run()
        return rounds.state


@contextmanager
def _told_once() -> Iterator[None]:
    """What reading data has to say is said once, not once a round."""
    seen: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        told = record.getMessage()
        return told not in seen and not seen.add(told)  # type: ignore[func-returns-value]

    loggers = [logging.getLogger(name) for name in ("dsfreeze.data.sft", "dsfreeze.data.examples")]
    for logger in loggers:
        logger.addFilter(new)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(new)


class Rounds:
    """One rank's way through a sequence."""

    def __init__(self, course: Course, files: dict[str, Any], state: State, console: Console, *, leader: bool) -> None:
        self.course, self.spec, self.state, self.console, self.leader = course, course.spec, state, console, leader
        self.files = {name: Rendered(**values) for name, values in files.items()}
        self.tasks = self.spec.sequence
        self.trips = list(trips(course))
        self.folder = Path(self.spec.output_dir)
        self.meter = Meter()
        self.began, self.done = time.monotonic(), 0

    def run(self) -> None:
        for note in (note for each in self.files.values() for note in each.notes):
            self.console.print(f"[yellow]note:[/] {note}", highlight=False)
        self._require_models()
        if self.state["start"] is None:
            self.console.print("the start model", highlight=False)
            known = [each for each in (*self.tasks, *self.spec.probes) if self.spec.task_of(each) != PREFERENCE]
            self.state["start"] = self._measured(self._start().model.name, known)
            self._write()
        for trip in self.trips:
            self._travel(trip)
        if not self.spec.keep_models:
            for trip in self.trips:
                self._on_leader(partial(self._drop_models, trip, len(self.tasks)))
        self._write()

    # -- rounds ------------------------------------------------------------------------------------------------

    def _travel(self, trip: Trip) -> None:
        run = self.state["runs"].setdefault(
            trip.key,
            {
                "label": trip.label,
                "method": trip.method.name,
                "seed": trip.seed,
                "draw": trip.draw,
                "alpha": trip.alpha,
                "rounds": [],
            },
        )
        for number in self._left(trip):
            self._tell(trip, number)
            row = self._merge_round(trip, number) if trip.method.kind.merge else self._train_round(trip, number)
            run["rounds"].append(row)
            self.done += 1
            self._write()
            self._on_leader(partial(self._tidy, trip, number))

    def _left(self, trip: Trip) -> list[int]:
        """The rounds that have no row yet."""
        numbers = [len(self.tasks)] if trip.method.kind.rows == "all" else list(range(1, len(self.tasks) + 1))
        done = {row["round"] for row in self.state["runs"].get(trip.key, {"rounds": []})["rounds"]}
        return [number for number in numbers if number not in done]

    def _train_round(self, trip: Trip, number: int) -> dict[str, Any]:
        folder = self._round(trip, number)
        stood = led(lambda: _look(folder))
        recipe = self._recipe(trip, number, resume=stood == "stopped")
        if stood == "trained":
            summary = led(lambda: json.loads((folder / SUMMARY).read_text(encoding="utf-8")))
        else:
            self._on_leader(lambda: self._write_mixed(trip, number, Path(str(recipe.data.train))))
            began = time.monotonic()
            try:
                summary = train(recipe, self.console)
            except Interrupted as interrupted:
                interrupted.args = (
                    f"{str(interrupted).partition(' Continue')[0]} Run the same command again to go on.",
                )
                raise
            summary["seconds"] = time.monotonic() - began
        return {
            **self._row(trip, number, folder / MODEL),
            "steps": summary["steps"], "loss": summary["loss"], "plan_digest": summary["plan_digest"],
            "trainable": summary["trainable"], "total": summary["total"],
            "trainable_share": summary["trainable"] / summary["total"], "seconds": summary.get("seconds"),
        }  # fmt: skip

    def _merge_round(self, trip: Trip, number: int) -> dict[str, Any]:
        """A round of a method without training: its model is made of those that full tuning left."""
        full = self._full(trip)
        same = self._same_row(trip, full, number)
        if same is not None:
            return {**same, "round": number, "task": self.tasks[number - 1].name}
        folder = self._round(trip, number) / MODEL
        self._on_leader(lambda: self._merge(trip, full, number, folder))
        return self._row(trip, number, folder)

    def _same_row(self, trip: Trip, full: Trip, number: int) -> dict[str, Any] | None:
        """What needs no model: an interpolation at 0 is the start model, one at 1 and a mean of one are full tuning's."""
        if trip.alpha == 0:
            return {**self.state["start"], "update_norm": 0.0}
        if trip.alpha == 1 or (trip.method.kind.merge == "average" and number == 1):
            row = next(row for row in self.state["runs"][full.key]["rounds"] if row["round"] == number)
            return {key: row[key] for key in ("scores", "numbers", "update_norm")}
        return None

    def _merge(self, trip: Trip, full: Trip, number: int, out: Path) -> None:
        if out.is_dir():
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        ends = [self._round(full, each) / MODEL for each in range(1, number + 1)]
        start = self._start_folder()
        if trip.method.kind.merge == "average":
            weights.averaged(ends, out)
        elif trip.alpha is not None:
            weights.interpolated(start, ends[-1], trip.alpha, out)
        else:
            drawn = self.course.round_recipe(self.tasks[number - 1], trip.method, number, trip.seed, trip.draw or 0)
            weights.half_reset(start, ends[-1], self._start().model_copy(update={"freeze": drawn.freeze}), out)

    def _row(self, trip: Trip, number: int, model: Path) -> dict[str, Any]:
        task = self.tasks[number - 1]
        return {
            "round": number, "task": "all" if trip.method.kind.rows == "all" else task.name,
            **self._measured(str(model), self._wanted(trip, number), trip),
            "update_norm": led(lambda: weights.update_norm(self._start_folder(), model)),
        }  # fmt: skip

    def _wanted(self, trip: Trip, number: int) -> Sequence[Measured]:
        """What a round is measured on: everything, but for bounds and curves, of which the diagonal and the last row are read. A
        preference has no reference before its own round."""
        if trip.method.kind.alone or (trip.alpha is not None and number < len(self.tasks)):
            return [self.tasks[number - 1]]
        to_come = [each for each in self.tasks[number:] if self.spec.task_of(each) == PREFERENCE]
        return [each for each in (*self.tasks, *self.spec.probes) if each not in to_come]

    # -- recipes -----------------------------------------------------------------------------------------------

    def _recipe(self, trip: Trip, number: int, *, resume: bool) -> Recipe:
        kind, task, folder = trip.method.kind, self.tasks[number - 1], self._round(trip, number)
        recipe = self.course.round_recipe(task, trip.method, number, trip.seed, trip.draw or 0)
        mixed = kind.rows != "own" or trip.method.replay is not None
        evaluated = self.files[task.name].eval if recipe.task == PREFERENCE else None  # for its reference
        data = _rendered_data(recipe, str(folder / MIXED) if mixed else self.files[task.name].train, evaluated)
        options: dict[str, Any] = {"output_dir": folder, "export": True, "resume_from_checkpoint": resume or None}
        if kind.rows == "all":
            steps = [each.train.max_steps for each in self._alike(trip)]
            options |= {"max_steps": sum(steps)} if min(steps) > 0 else {"max_steps": -1, "num_train_epochs": 1.0}
        update = {"data": data, "train": recipe.train.model_copy(update=options)}
        if kind.start == "previous" and number > 1:
            name = str(self._round(trip, number - 1) / MODEL)
            update["model"] = recipe.model.model_copy(update={"name": name})
        if kind.retains:
            before, last = self._round(trip, number - 1) / MEMORY, number == len(self.tasks)
            hand = {"memory": before if number > 1 else None, "remember": None if last else folder / MEMORY}
            update["retain"] = recipe.retain.model_copy(update=hand)
        return recipe.model_copy(update=update)

    def _alike(self, trip: Trip) -> list[Recipe]:
        """Each task's own recipe."""
        return [self.course.round_recipe(task, trip.method, 1, trip.seed, trip.draw or 0) for task in self.tasks]

    def _write_mixed(self, trip: Trip, number: int, path: Path) -> None:
        """The rows of a round that trains on more than its own task's; nothing to do for the others."""
        if path.name != MIXED or path.parent != self._round(trip, number):
            return
        tasks = [self.files[task.name] for task in self.tasks]
        if trip.method.kind.rows == "all":
            recipes = self._alike(trip)
            by_steps = min(recipe.train.max_steps for recipe in recipes) > 0
            write_rows(
                path, pooled(tasks, [1 if by_steps else math.ceil(recipe.train.num_train_epochs) for recipe in recipes])
            )
            return
        own, options = tasks[number - 1], self.spec.replay
        if trip.method.replay is not None:
            options = options.model_copy(update={"ratio": trip.method.replay})
        earlier = [task for task in tasks[: number - 1] if task.task == own.task]
        write_rows(path, [*read_rows(str(own.train)), *replayed(earlier, options, trip.seed)])

    def _start(self) -> Recipe:
        """The evaluation of the start model on the first task."""
        return self._at(self.tasks[0], self.course.measure_recipe(self.tasks[0]))

    def _start_folder(self) -> Path:
        """The start model as a folder, in the dtype of training, whatever the file calls it (rank 0 alone)."""
        return weights.start_folder(self._start(), self.folder / "start")

    def _at(self, measured: Measured, recipe: Recipe) -> Recipe:
        """The recipe with the rendered files."""
        files = self.files[measured.name]
        data = _rendered_data(recipe, None, files.eval)
        if files.max_new_tokens is not None:
            data = data.model_copy(update={"max_new_tokens": files.max_new_tokens})
        return recipe.model_copy(update={"data": data})

    def _measured(self, model: str, wanted: Sequence[Measured], trip: Trip | None = None) -> dict[str, Any]:
        """Scores (0 to 100) and all numbers of a model by task and probe; a number that is not finite is None."""
        scores, numbers = {}, {}
        by_name = {measured.name: measured for measured in wanted}
        found = self.meter.numbers((name, *self._evaluation(each, model, trip)) for name, each in by_name.items())
        for name, values in found.items():
            scores[name] = score(metric_of(self.spec, by_name[name]), values)
            numbers[name] = {metric: value if math.isfinite(value) else None for metric, value in values.items()}
        return {"scores": scores, "numbers": numbers}

    def _evaluation(self, measured: Measured, model: str, trip: Trip | None) -> tuple[Recipe, Path | None]:
        """The recipe, and the run whose reference a preference is measured against."""
        recipe = _of_model(self._at(measured, self.course.measure_recipe(measured)), model)
        if recipe.task != PREFERENCE:
            return recipe, None
        assert trip is not None, "the start model has no preference"
        return recipe, self._reference(trip, measured)

    def _reference(self, trip: Trip, measured: Measured) -> Path:
        """The folder of the round that trained on a preference: what it began with is what the preference is measured against."""
        source = self._full(trip) if trip.method.kind.merge else trip
        number = (
            len(self.tasks)
            if trip.method.kind.rows == "all"
            else 1 + [task.name for task in self.tasks].index(measured.name)
        )
        return self._round(source, number)

    # -- files -------------------------------------------------------------------------------------------------

    def _round(self, trip: Trip, number: int) -> Path:
        return self.folder / "runs" / trip.key / f"round-{number}"

    def _full(self, trip: Trip) -> Trip:
        """The trip of full tuning whose models another is made of."""
        plain = METHODS["full"]
        return next(each for each in self.trips if each.method.kind is plain and each.seed == trip.seed)

    def _require_models(self) -> None:
        """UserError when models that are to be merged were deleted by an earlier call."""
        for trip in self.trips:
            if not (trip.method.kind.merge and self._left(trip)):
                continue
            full = self._full(trip)
            done = set(range(1, len(self.tasks) + 1)) - set(self._left(full))
            gone = [number for number in sorted(done) if not (self._round(full, number) / MODEL).is_dir()]
            if gone:
                raise UserError(
                    f"{trip.method.name} is made of the models that {full.method.name} left after each round, and that of round {gone[0]} "
                    "is gone: they are kept with keep_models: true, or while a method that needs them is in the same file. Name "
                    "another output_dir."
                )

    def _tidy(self, trip: Trip, number: int) -> None:
        """Drop what a round leaves and nobody reads any more."""
        folder = self._round(trip, number)
        for checkpoint in list_checkpoints(folder):
            shutil.rmtree(checkpoint, ignore_errors=True)
        (folder / MIXED).unlink(missing_ok=True)
        shutil.rmtree(self._round(trip, number - 1) / MEMORY, ignore_errors=True)
        needed = trip.method.kind is METHODS["full"] and self.spec.merged
        if not self.spec.keep_models and not needed:
            self._drop_models(trip, number)

    def _drop_models(self, trip: Trip, number: int) -> None:
        """The models before round `number`; of single tasks and of merged models that one's too."""
        ends = number + (trip.method.kind.alone or trip.method.kind.merge is not None)
        for each in range(1, ends):
            shutil.rmtree(self._round(trip, each) / MODEL, ignore_errors=True)

    def _write(self) -> None:
        self.state["summary"] = summarise(self.state)
        self._on_leader(lambda: write_results(self.folder, self.state))

    def _on_leader(self, action: Callable[[], object]) -> None:
        together(action if self.leader else lambda: None)

    def _tell(self, trip: Trip, number: int) -> None:
        """Which round of which method, and how long the rest will take at the pace so far."""
        left = sum(len(self._left(each)) for each in self.trips)
        pace = (time.monotonic() - self.began) / self.done if self.done else None
        rest = "" if pace is None else f", about {pace * left / 60:.0f} min left"
        self.console.print(
            f"[bold]{trip.key}[/] round {number} of {len(self.tasks)}: {self.tasks[number - 1].name} ({left} rounds to go{rest})",
            highlight=False,
        )


def _look(folder: Path) -> str:
    """What a round that has no row left in its folder: it is trained, was stopped with a checkpoint, or is to begin; then the folder
    is emptied, for a record without a checkpoint is of no use."""
    if (folder / SUMMARY).is_file() and (folder / MODEL).is_dir():
        return "trained"
    if list_checkpoints(folder):
        return "stopped"
    shutil.rmtree(folder, ignore_errors=True)
    return "new"


def _of_model(recipe: Recipe, model: str) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": model})})


def _rendered_data(recipe: Recipe, train_file: str | None, eval_file: str | None) -> Any:
    """`data:` with rendered files, sampled already."""
    update: dict[str, Any] = {"train": train_file, "eval": eval_file, "max_train_examples": None}
    if recipe.task == "sft":
        update |= {"format": "prompt_completion", "text": None, "max_eval_examples": None}
    return recipe.data.model_copy(update=update)
