"""What the commands `evaluate` and `export` do: a run's folder, or a recipe, in; figures, or a model folder, out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsfreeze.checkpoint import find_checkpoint, open_checkpoint
from dsfreeze.engine.local import LocalEngine
from dsfreeze.errors import UserError
from dsfreeze.evaluation import evaluate
from dsfreeze.export import export_delta, export_model, fill_delta
from dsfreeze.job import load_task, prepare_job
from dsfreeze.model import read_anatomy
from dsfreeze.recipe import ModelOptions, Recipe
from dsfreeze.recipe_reader import load_recipe


def recipe_of_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run's folder with its exported model as the model."""
    model = folder / "model"
    if not model.is_dir():
        raise UserError(
            f"{folder} has no exported model (folder model/): let the run finish, or `dsfreeze export {folder}`."
        )
    return load_recipe(folder / "recipe.yaml", [f"model.name={model}", *overrides])


def evaluate_recipe(recipe: Recipe) -> dict[str, float]:
    """Metrics of the recipe's model on its evaluation data, in this process."""
    _, data, module = load_task(recipe)
    if data.eval is None:
        raise UserError("The recipe has no evaluation data; name some in data.eval.")
    engine = LocalEngine(module, read_anatomy(module, recipe.model.name), recipe)
    return evaluate(engine, data, recipe)


def export_folder(source: Path, output: Path, *, delta: bool, base: str | None) -> Path:
    """Write a model folder (or, with `delta`, the trained tensors alone) from a run, a checkpoint or a delta."""
    if base is not None:
        return fill_delta(source, ModelOptions(name=base), output)
    run = source.parent if source.name.startswith("checkpoint-") else source
    if not (run / "recipe.yaml").is_file():
        raise UserError(
            f"{source} is no run: {run / 'recipe.yaml'} is missing. Name a run's folder, or its checkpoint-N."
        )
    recipe = load_recipe(run / "recipe.yaml", [])
    checkpoint = open_checkpoint(source) if source != run else find_checkpoint(run, True)
    job = prepare_job(recipe)
    weights = {name: entry["weight"] for name, entry in checkpoint.state().items()}
    if delta:
        return export_delta(output, weights, module=job.module, plan=job.plan, base=job.base, recipe=recipe)
    return export_model(output, job.module, job.tokenizer, weights=weights, plan=job.plan, recipe=recipe, metrics={})
