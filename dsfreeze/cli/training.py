"""`train`, and the quickstart's."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from dsfreeze.cli.known import anatomy_of, num_steps_of
from dsfreeze.cli.output import print_json, show, write
from dsfreeze.cli.words import AsJson, Words, read_words
from dsfreeze.recipe import Recipe
from dsfreeze.screen import screen


def train(
    words: Words = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved recipe and DeepSpeed config.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Fine-tune: `dsfreeze train recipe.yaml freeze.fraction=0.75`."""
    recipe = read_words(words)
    if print_config:
        return _print_config(recipe, as_json)
    from dsfreeze.checkpoint import seek_start

    sought = seek_start(recipe)  # its checksums are made while the libraries load
    from dsfreeze.loop import train as train_recipe

    summary = train_recipe(recipe, screen(), sought=sought)
    if as_json:
        print_json(summary)
    else:
        from dsfreeze.tables import summary_table

        show(summary_table(summary))
    return 0


def _print_config(recipe: Recipe, as_json: bool) -> int:
    from dsfreeze.recipe_yaml import dump_yaml

    config, notes = _deepspeed_config(recipe)
    resolved = {"recipe": recipe.model_dump(mode="json"), "deepspeed": config}
    if as_json:
        print_json({**resolved, "notes": notes})
    else:
        write("".join(f"# note: {note}\n" for note in notes) + dump_yaml(resolved))
    return 0


def _deepspeed_config(recipe: Recipe) -> tuple[dict[str, Any], list[str]]:
    """What DeepSpeed will be given, {} without it, and notes on what is not certain before the run."""
    from dsfreeze.zero_config import deepspeed_config, is_local

    if is_local(recipe):
        return {}, []
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    try:
        anatomy, notes = anatomy_of(recipe)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        note = f"bucket sizes are upper bounds, a run takes no more than its plan trains; the model could not be read: {why}"
        return deepspeed_config(recipe, world_size), [note]
    from dsfreeze.engine.process import engine_config
    from dsfreeze.setting import setting_of
    from dsfreeze.strategies import make_plan

    freeze_plan = make_plan(anatomy, recipe.planned_freeze, num_steps_of(recipe), setting_of(recipe, world_size))
    return engine_config(recipe, freeze_plan, freeze_plan.adapted(anatomy), world_size), list(notes)


def quickstart(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the quickstart's recipe.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Fine-tune SmolLM2-135M with its bottom 75 % frozen on a built-in task, and show what that saved."""
    from dsfreeze.quickstart import quickstart as start

    return start(words or [], as_json=as_json)
