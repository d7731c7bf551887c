"""Many models on the same tasks and probes: a model is read once for all of them, and rows are tokenised once for all models."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dsfreeze.continual.reading import TEXT_TASKS
from dsfreeze.data import TaskData, prepare
from dsfreeze.engine import Engine
from dsfreeze.engine.process import agree, evaluation_engine, together
from dsfreeze.evaluation import evaluate
from dsfreeze.job import task_module
from dsfreeze.model import load_tokenizer, read_anatomy
from dsfreeze.objectives import objective_of
from dsfreeze.recipe import Recipe
from dsfreeze.reference import reference_of_run


class Meter:
    """Evaluates recipes whose models have the same tokenizer."""

    def __init__(self) -> None:
        self._data: dict[str, TaskData] = {}

    def numbers(self, wanted: Iterable[tuple[str, Recipe, Path | None]]) -> dict[str, dict[str, float]]:
        """What `commands.evaluate_recipe` says of each (name, recipe, the run whose reference a preference is measured against), all
        of one model; several ranks share the examples (collective)."""
        found: dict[str, dict[str, float]] = {}
        engine, held = None, None
        try:
            for name, recipe, run in wanted:
                agree(recipe.digest, "the recipe")
                data = together(partial(self._prepared, name, recipe, run))
                kind = _kind(recipe, data)
                if engine is None or kind != held:
                    if engine is not None:
                        engine.close()
                    engine, held = _engine(recipe, data), kind
                engine.objective = objective_of(recipe)
                found[name] = evaluate(engine, data, recipe)
        finally:
            if engine is not None:
                engine.close()
        return found

    def _prepared(self, name: str, recipe: Recipe, run: Path | None) -> TaskData:
        """A preference's rows know their reference, which is another one for each run."""
        if recipe.task == "preference":
            data = prepare(recipe, load_tokenizer(recipe.model))
            reference_of_run(data, run)
            return data
        if name not in self._data:
            self._data[name] = prepare(recipe, load_tokenizer(recipe.model))
        return self._data[name]


def _kind(recipe: Recipe, data: TaskData) -> tuple[Any, ...]:
    """Recipes alike in this can share a model in memory: text of any kind has the same head."""
    return "text" if recipe.task in TEXT_TASKS else recipe.task, data.num_labels, data.labels, recipe.train.bf16


def _engine(recipe: Recipe, data: TaskData) -> Engine:
    module = together(lambda: task_module(recipe, data, recipe.model))
    return evaluation_engine(module, read_anatomy(module, recipe.model.name), recipe)
