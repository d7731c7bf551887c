"""What the commands `evaluate`, `cache`, `export` and `merge` do: runs, recipes or models in; figures, or a model folder, out."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console

from dsfreeze.checkpoint import Checkpoint, find_checkpoint, list_checkpoints, open_checkpoint, require_same
from dsfreeze.data import num_steps_of
from dsfreeze.engine.process import agree, evaluation_engine, process_group, together
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.errors import UserError
from dsfreeze.evaluation import evaluate
from dsfreeze.export import export_delta, export_model, fill_delta, require_writable
from dsfreeze.job import load_task, prepare_evicted, prepare_job
from dsfreeze.merging import average as average_models
from dsfreeze.merging import interpolate, reset_frozen
from dsfreeze.model import read_anatomy
from dsfreeze.model_card import public_name
from dsfreeze.objectives import objective_of
from dsfreeze.prefix.cache import PrefixCache
from dsfreeze.prefix.eviction import CACHE
from dsfreeze.recipe import ModelOptions, Recipe, TrainOptions
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import MODEL, RECIPE
from dsfreeze.reference import reference_of_run


def recipe_of_run(folder: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a run's folder with its exported model as the model."""
    if not _is_run(folder):
        raise UserError(f"{folder} is no run: it has no {RECIPE}. Name the folder of a run, its train.output_dir.")
    model = folder / MODEL
    if not model.is_dir():
        raise UserError(f"{folder} has no exported model (folder model/). {_how_to_export(folder)}")
    return load_recipe(folder / RECIPE, [f"model.name={model}", *overrides])


def _is_run(folder: Path) -> bool:
    return (folder / RECIPE).is_file()


def _how_to_export(run: Path) -> str:
    if list_checkpoints(run):
        command = shlex.join(["dsfreeze", "export", str(run), "-o", str(run / MODEL)])
        return f"Write it from the newest checkpoint: `{command}`."
    return "It has no checkpoint to write one from either: train again, with train.export=true."


def evaluate_recipe(recipe: Recipe, run: Path | None = None) -> dict[str, float]:
    """Metrics of the recipe's model on its evaluation data; several ranks hold the whole model each, and share the data. `run`: the
    folder whose model it is, which a preference's reference is in."""
    with process_group(recipe) if read_ranks().world_size > 1 else nullcontext():
        agree(recipe.digest, "the recipe")
        _, data, module = together(lambda: load_task(recipe))
        if data.eval is None:
            raise UserError("The recipe has no evaluation data; name some in data.eval.")
        together(lambda: reference_of_run(data, run))
        engine = evaluation_engine(module, read_anatomy(module, recipe.model.name), recipe)
        engine.objective = objective_of(recipe)
        try:
            return evaluate(engine, data, recipe)
        finally:
            engine.close()  # one process may evaluate many models


def fill_cache(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Store what leaves the recipe's prefix for all of its examples, on disk, without ever holding the model; what was stored and where.

    Several ranks share the examples."""
    freeze = recipe.freeze.model_copy(update={"prefix_cache": "disk"})
    recipe = recipe.model_copy(update={"freeze": freeze})
    with process_group(recipe) as ranks:
        agree(recipe.digest, "the recipe")
        job = together(lambda: prepare_evicted(recipe, asked=CACHE))
        examples = job.data.train or job.data.eval
        assert examples is not None, "data without either is refused"
        epoch, steps = (
            num_steps_of(options, len(examples), ranks.world_size) for options in (_once(recipe), recipe.train)
        )
        cache = PrefixCache(job, ranks, console if ranks.rank == 0 else Console(quiet=True), steps, epoch)
        try:
            return {"model": public_name(recipe.model.name), **cache.prefill()}
        finally:
            cache.close()


def _once(recipe: Recipe) -> TrainOptions:
    return recipe.train.model_copy(update={"max_steps": -1, "num_train_epochs": 1.0})


def export_folder(source: Path, output: Path, *, delta: bool, base: str | None) -> Path:
    """Write a model folder (or, with `delta`, the trained tensors alone) from a run, a checkpoint or a delta.

    UserError when the recipe's model or plan is no longer what the checkpoint was trained with.
    """
    if base is not None:
        if delta:
            raise UserError("--delta writes a delta of a run, and --base makes a delta whole again: give one of them.")
        return fill_delta(source, ModelOptions(name=base), output)
    run = source if _is_run(source) else source.parent
    if not _is_run(run):
        raise UserError(f"{source} is no run: it has no {RECIPE}. Name a run's folder, or a checkpoint-N in one.")
    require_writable(output)
    checkpoint = open_checkpoint(source) if source != run else _newest_checkpoint(run)
    job = prepare_job(load_recipe(run / RECIPE, []), checkpoint.trainer_state["num_steps"], whole=True)
    require_same(checkpoint, job.plan, job.base)
    done = checkpoint.plan.until(checkpoint.step)
    weights = {name: entry["weight"] for name, entry in checkpoint.state().items()}
    if delta:
        return export_delta(output, weights, module=job.module, plan=done, base=job.base, recipe=job.recipe)
    return export_model(output, job.module, job.tokenizer, weights=weights, plan=done, recipe=job.recipe, metrics={})


def _newest_checkpoint(run: Path) -> Checkpoint:
    if not list_checkpoints(run):
        model = run / MODEL
        there = f" Its exported model is {model}." if model.is_dir() else " Train again, with train.export=true."
        raise UserError(f"{run} has no checkpoint to export from.{there}")
    return find_checkpoint(run, True)


def merge_folders(words: Sequence[str], output: Path, *, alpha: float | None, average: bool, reset: bool) -> Path:
    """Write a model between two, the mean of several, or one of two partly reset; `words` are folders, and a recipe's overrides."""
    folders = [Path(word).expanduser() for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if sum((average, reset, alpha is not None)) > 1:
        raise UserError("--alpha, --average and --reset are three different things: give one of them.")
    if overrides and not reset:
        raise UserError(f"'{overrides[0]}' is a recipe's key, which --reset alone reads. Name model folders.")
    if average:
        return average_models(folders, output)
    if len(folders) != 2:
        raise UserError(f"Two model folders are merged, START and END; {len(folders)} are named. For more, --average.")
    start, end = folders
    if reset:
        return reset_frozen(start, end, load_recipe(None, [f"model.name={end}", *overrides]), output)
    return interpolate(start, end, 0.5 if alpha is None else alpha, output)
