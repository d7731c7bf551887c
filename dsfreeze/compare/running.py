"""Running a comparison: every cell in a process of its own, its outcome in the results file as soon as it has ended. No torch.

    output_dir/
      results.json                                    rewritten, by renaming, after every run
      runs/MODEL/TASK/METHOD/size-N/seed-S/           records, as `dsfreeze train` leaves them
      tuning/MODEL/TASK/METHOD/size-N/trial-K/        those of learning rates' trials
      analyses/MODEL/TASK/size-N/SCORE/               what methods need that measure beforehand
      recipes/, logs/                                 of each run, under the same names
      prefix/                                         states that runs share, with prefix_cache

A finished cell is never run again; one that was stopped goes on from its checkpoint, or begins anew without one; one that failed is
tried again by the next call. One comparison at a time works in a folder: the lock is held by its runs too, should it be killed itself.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from dsfreeze.budget import parse_limit
from dsfreeze.compare.pricing import LIBRARIES, Match, Prices, free_memory
from dsfreeze.compare.processes import SCORES, Processes, alone, finished
from dsfreeze.compare.queue import Process, Queue, Result, Source, Work
from dsfreeze.compare.reading import Cell, Grid, Group
from dsfreeze.compare.results import measured, open_results, write_results
from dsfreeze.compare.slurm import write_array
from dsfreeze.compare.tuning import require_optuna, search
from dsfreeze.errors import UserError
from dsfreeze.interrupt import Interrupt, Interrupted
from dsfreeze.layered import refuse
from dsfreeze.planner.request import ReadAnatomy
from dsfreeze.recipe import FreezeOptions, Recipe
from dsfreeze.record import SUMMARY, holds_record
from dsfreeze.screen import screen
from dsfreeze.state_file import State
from dsfreeze.tables import gib

#: Outcomes that a call may still change by running something.
_OPEN = ("waiting", "interrupted")
#: Bytes of a job that nobody can predict.
UNKNOWN = 16 * 2**30


def run_grid(grid: Grid, read: ReadAnatomy, console: Console | None = None) -> State:
    """Run what is left of a comparison, and return its results, which the results file holds too.

    UserError for every mistake that can be known before the first run; Interrupted after a signal, once what ran has ended.
    """
    console = console or screen()
    with alone(Path(grid.spec.output_dir)) as lock:
        comparison = Comparison(grid, read, console, lock)
        with Interrupt() as interrupt:
            comparison.run(interrupt)
        if interrupt.signal:
            raise Interrupted.of(interrupt.signal, "Run the same command again to go on.")
        return comparison.state


def write_jobs(grid: Grid, read: ReadAnatomy, console: Console | None = None) -> tuple[State, Path | None]:
    """What an earlier call's jobs have left, and the script of what is to run now; None where nothing is."""
    with alone(Path(grid.spec.output_dir)):
        comparison = Comparison(grid, read, console or screen())
        comparison.prime()
        works = comparison.queue.waiting
        if not works:
            return comparison.state, None
        sizes = [comparison.bytes_of(work) or UNKNOWN for work in works]
        return comparison.state, write_array(comparison.processes, works, max(sizes), sys.executable)


class Comparison:
    """One call's way through a grid; the queue's shop."""

    def __init__(self, grid: Grid, read: ReadAnatomy, console: Console, lock: int | None = None) -> None:
        self.grid, self.spec, self.console = grid, grid.spec, console
        self.folder = Path(self.spec.output_dir)
        self.prices = Prices(read)
        self.cells = {cell.key: cell for cell in grid.cells}
        self.results: dict[str, Result] = {}
        self.processes = Processes(self.folder, lock=lock, jobs=self.spec.jobs, keep_models=self.spec.keep_models)
        self._require_models()
        self.state = open_results(grid)
        if self.spec.tuned and any(group.key not in self.state["tuning"] for group in grid.groups):
            require_optuna()
        for cell in self.cells.values():
            self._stands(cell)
        self.queue = Queue(self, jobs=self.spec.jobs, memory=self._memory(), told=self._tell)
        self.began, self.ended_here = time.monotonic(), 0

    def run(self, interrupt: Interrupt) -> None:
        try:
            self.prime()
            self.queue.run(lambda: bool(interrupt.signal))
        finally:
            for _, process, _ in self.queue.running.values():  # only where something went wrong here
                process.terminate()
            self.processes.close()

    def prime(self) -> None:
        """Say of every cell what can be said without running anything."""
        self.queue.add([self._source(number, group) for number, group in enumerate(self.grid.groups)])
        self._write()

    def _memory(self) -> int | None:
        if self.spec.memory is not None:
            return int(parse_limit("memory", self.spec.memory).amount)
        return free_memory() if self.spec.jobs > 1 else None

    def _require_models(self) -> None:
        """UserError for models of which no task can be planned."""
        mistakes = []
        for index, model in enumerate(self.spec.models):
            groups = [g for g in self.grid.groups if g.model is model]
            told = [self._unreadable(group) for group in groups]
            if all(told):
                mistakes.append((self.grid.place(("models", index)), f"models[{index}]: {told[0]}"))
        refuse(mistakes)

    def _unreadable(self, group: Group) -> str | None:
        try:
            self.prices.anatomy(self.grid.recipe(group, self.spec.seeds[0]))
        except UserError as error:
            return str(error)
        return None

    def _stands(self, cell: Cell) -> None:
        """A record without its end is a run that was stopped."""
        folder, outcome = self._folder("runs", cell.key), self.state["cells"][cell.key]
        if outcome["status"] in _OPEN and holds_record(folder) and not (folder / SUMMARY).is_file():
            outcome |= {"status": "interrupted", "reason": "its record has no end", "run": self._relative(folder)}

    # -- what is to run ----------------------------------------------------------------------------------------

    def _source(self, number: int, group: Group) -> Source:
        """A group's runs: an analysis where its method needs one, trials of its learning rate, then a run for each seed."""
        if all(self._outcome(group, seed)["status"] == "done" for seed in self.spec.seeds):
            return
        try:
            recipes = {seed: self._matched(group, seed) for seed in self.spec.seeds}
        except UserError as error:
            self._close(group, Result("impossible", str(error)))
            return
        if group.method.kind.analyze and "scores" not in group.method.freeze:
            (found,) = yield [self._analysis(number, group, recipes[self.spec.seeds[0]])]
            if found.status != "done":
                self._close(group, Result(found.status, f"its analysis: {found.reason}"))
                return
            recipes = {seed: _with_scores(recipe, self._scores(group)) for seed, recipe in recipes.items()}
        if refused := self._refused(recipes[self.spec.seeds[0]]):
            self._close(group, refused)
            return
        if self.spec.tuned:
            recipes = yield from self._tuned(number, group, recipes)
        yield [
            Work(f"{group.key}/seed-{seed}", recipe, order=(1, n, number))
            for n, (seed, recipe) in enumerate(recipes.items())
        ]

    def _matched(self, group: Group, seed: int) -> Recipe:
        """A run's recipe, its adapters' rank chosen where it matches another method."""
        recipe, method = self.grid.recipe(group, seed), group.method
        if method.match is None or method.to is None:
            return recipe
        other = self.grid.recipe(replace(group, method=self.spec.method(method.to)), seed)
        return Match(self.prices, recipe, other, method.match, (method.name, method.to)).matched()

    def _scores(self, group: Group) -> Path:
        """Where the analysis of a group leaves what it measured."""
        size = group.key.rpartition("/")[2]
        key = f"{group.model.name}/{group.task.name}/{size}/{group.method.kind.analyze}"
        return self._folder("analyses", key) / SCORES

    def _analysis(self, number: int, group: Group, recipe: Recipe) -> Work:
        folder, score = self._scores(group).parent, group.method.kind.analyze
        analysis = recipe.analyze.model_copy(update={"scores": [score], "recommend": score, "output_dir": folder})
        update = {"freeze": FreezeOptions(strategy="full"), "analyze": analysis}
        return Work(self._relative(folder), recipe.model_copy(update=update), "analyze", order=(0, 0, number))

    def _tuned(
        self, number: int, group: Group, recipes: dict[int, Recipe]
    ) -> Generator[list[Work], list[Result], dict[int, Recipe]]:
        """The recipes with the learning rate that trials found; a group all of whose trials failed has no runs (a source's part)."""
        first = recipes[self.spec.seeds[0]]

        def trial(index: int, rate: float) -> Work:
            folder = self._folder("tuning", f"{group.key}/trial-{index}")
            train = first.train.model_copy(update={"learning_rate": rate, "output_dir": folder, "export": False})
            data = first.data.model_copy(update={"eval": None})
            return Work(
                self._relative(folder),
                first.model_copy(update={"train": train, "data": data}),
                order=(0, index, number),
            )

        found = self.state["tuning"].get(group.key)
        if found is None or found["learning_rate"] is None:  # never looked for, or all trials failed
            found = yield from search(self.spec.tune, trial)
            if found is None:
                return {}
            self.state["tuning"][group.key] = found
            self._write()
        rate = found["learning_rate"]
        if rate is None:
            reasons = "; ".join(dict.fromkeys(str(each["reason"]) for each in found["trials"]))
            self._close(
                group, Result("failed", f"none of its {len(found['trials'])} trials ended with a score: {reasons}")
            )
            return {}
        return {seed: _at_rate(recipe, rate) for seed, recipe in recipes.items()}

    # -- the queue's shop --------------------------------------------------------------------------------------

    def known(self, work: Work) -> Result | None:
        if self.state["cells"].get(work.key, {}).get("status") == "done":
            return Result("done")
        if work.key not in self.results and (found := finished(work)) is not None:
            self.results[work.key] = found
        return self.results.get(work.key)

    def bytes_of(self, work: Work) -> int | None:
        """Of an analysis those of full tuning, which its recipe plans: it holds no optimizer state, and less of gradients."""
        return self._bytes(work.recipe)

    def _bytes(self, recipe: Recipe) -> int | None:
        try:
            return self.prices.peak(recipe) + LIBRARIES
        except (UserError, ImportError, OSError, RuntimeError):  # of a kind that cannot be priced
            return None

    def start(self, work: Work) -> Process:
        return self.processes.start(work)

    def ended(self, work: Work, code: int) -> Result:
        self.ended_here += 1
        self.results[work.key] = self.processes.ended(work, code)
        return self.results[work.key]

    def _refused(self, recipe: Recipe) -> Result | None:
        """Of a run that can never be: the model cannot have its plan, or memory is too small for it alone."""
        try:
            self.prices.plan(recipe)
        except UserError as error:
            return Result("impossible", str(error))
        size, memory = (self._bytes(recipe), self.queue.memory) if self.spec.memory is not None else (None, None)
        if size is None or memory is None or size <= memory:
            return None
        return Result("impossible", f"it takes {gib(size)} by prediction, and memory is {gib(memory)}")

    # -- what is told ------------------------------------------------------------------------------------------

    def _tell(self, work: Work, result: Result) -> None:
        """Put a cell's result in the results file, and say how far the comparison is."""
        cell = self.cells.get(work.key)
        if cell is not None and self._note(cell, result):
            self._write()
        elif cell is not None or not self.ended_here:  # as an earlier call left it
            return
        self._say(work.key, result)

    def _close(self, group: Group, result: Result) -> None:
        """One result for all that a group has not done."""
        for seed in self.spec.seeds:
            cell = Cell(group, seed)
            self.results[cell.key] = result
            if self._outcome(group, seed)["status"] != "done" and self._note(cell, result):
                self._say(cell.key, result)
        self._write()

    def _note(self, cell: Cell, result: Result) -> bool:
        """Whether that changes the cell's outcome, which is changed."""
        outcome, folder = self._outcome(cell.group, cell.seed), self._folder("runs", cell.key)
        before = dict(outcome)
        if outcome["status"] != "done":
            outcome |= {"status": result.status, "reason": result.reason}
            outcome["run"] = self._relative(folder) if holds_record(folder) else None
            if result.record is not None:
                outcome |= measured(result.record, self.grid.metric_of(cell.group.task))
        return bool(outcome != before)

    def _say(self, key: str, result: Result) -> None:
        outcome = self.state["cells"].get(key, {})
        figure = f" {outcome['score']:.1f}" if outcome.get("score") is not None else ""
        reason = f": {escape(result.reason)}" if result.reason else ""
        left = self._left()
        pace = (time.monotonic() - self.began) / self.ended_here if self.ended_here else None
        rest = "" if pace is None or not left else f", about {pace * left / 60:.0f} min left"
        self.console.print(f"[bold]{key}[/] {result.status}{figure}{reason} ({left} runs to go{rest})", highlight=False)

    def _left(self) -> int:
        """Runs to come, trials with them."""
        cells = [cell for cell in self.cells.values() if self._is_open(cell)]
        if not self.spec.tuned:
            return len(cells)
        groups = {cell.group.key for cell in cells} - set(self.state["tuning"])
        return len(cells) + sum(map(self._trials_left, groups))

    def _is_open(self, cell: Cell) -> bool:
        """Whether a cell is still to run; one that failed in an earlier call is."""
        status = self._outcome(cell.group, cell.seed)["status"]
        return status in _OPEN or (status == "failed" and cell.key not in self.results)

    def _trials_left(self, key: str) -> int:
        return self.spec.tune.trials - sum(name.startswith(f"tuning/{key}/") for name in self.results)

    # -- files -------------------------------------------------------------------------------------------------

    def _outcome(self, group: Group, seed: int) -> State:
        outcome: State = self.state["cells"][f"{group.key}/seed-{seed}"]
        return outcome

    def _folder(self, kind: str, key: str) -> Path:
        return self.folder / kind / key

    def _relative(self, folder: Path) -> str:
        return folder.relative_to(self.folder).as_posix()

    def _write(self) -> None:
        write_results(self.folder, self.state)


def _with_scores(recipe: Recipe, path: Path) -> Recipe:
    return recipe.model_copy(update={"freeze": recipe.freeze.model_copy(update={"scores": path})})


def _at_rate(recipe: Recipe, rate: float) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"learning_rate": rate})})
