"""Commands on runs and models that are there, and on the prefix they share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dsfreeze.cli.output import escape, is_leader, print_json, say, show, write
from dsfreeze.cli.words import AsJson, Words, read_words
from dsfreeze.screen import screen


def analyze(words: Words = None, as_json: AsJson = False) -> int:
    """Say where to fine-tune: how much each layer matters, how sure that is, and what to train within a budget."""
    from dsfreeze.analyze import FIGURE, SCORES_FILE
    from dsfreeze.analyze import analyze as analyze_recipe

    recipe = read_words(words)
    content = analyze_recipe(recipe, screen())
    if not is_leader():
        return 0
    from dsfreeze.analyze.figure import draw_figure
    from dsfreeze.tables import scores_table

    folder = Path(recipe.analyze.output_dir)
    missing = draw_figure(content, folder / FIGURE)
    if as_json:
        print_json(content)
        return 0
    show(scores_table(content))
    for source, reason in content["left_out"].items():
        say(f"left out: {source}. {escape(reason)}")
    advice = content["recommendation"]
    write("\n".join(["", advice["sentence"], *advice.get("told", ()), "", advice.get("recipe", "")]))
    say(
        f"wrote {escape(str(folder / SCORES_FILE))}"
        + (f"; no figure: {escape(missing)}" if missing else f" and {FIGURE}")
    )
    return 0


def cache(words: Words = None, as_json: AsJson = False) -> int:
    """Store what leaves the frozen prefix for every example, on disk, for all runs with that prefix: seeds, rates, methods."""
    from dsfreeze.commands import fill_cache

    filled = fill_cache(read_words(words), screen())
    if as_json:
        if is_leader():
            print_json(filled)
    else:
        from dsfreeze.tables import filled_table

        show(filled_table(filled))
    return 0


def evaluate(words: Words = None, as_json: AsJson = False) -> int:
    """Evaluate a model without training: a recipe, or a run's folder (its exported model)."""
    from dsfreeze.commands import evaluate_recipe, recipe_of_run

    folder = next((word for word in words or () if os.path.isdir(word)), None)
    rest = [word for word in words or () if word != folder]
    recipe = recipe_of_run(Path(folder), rest) if folder else read_words(rest)
    metrics = evaluate_recipe(recipe, Path(folder) if folder else None)
    if as_json:
        print_json({"model": recipe.model.name, "metrics": metrics})
    else:
        from dsfreeze.tables import metrics_table

        show(metrics_table(recipe.model.name, metrics))
    return 0


def export(
    run_folder: Annotated[
        Path, typer.Argument(help="A run's folder, a checkpoint-N folder, or, with --base, a delta.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    delta: Annotated[bool, typer.Option("--delta", help="Write the trained tensors alone.")] = False,
    base: Annotated[str | None, typer.Option("--base", help="Fill a delta in again from this model.")] = None,
    as_json: AsJson = False,
) -> int:
    """Write a complete `from_pretrained` folder from a run or checkpoint, a delta, or a delta made whole again."""
    if not is_leader():
        return 0  # one process's work
    from dsfreeze.commands import export_folder

    folder = export_folder(run_folder, output, delta=delta, base=base)
    if as_json:
        print_json({"folder": str(folder)})
    else:
        say(f"wrote {escape(str(folder))}")
    return 0


def merge(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="START END | MEMBER...", help="Model folders; with --reset, also KEY=VALUE of a recipe."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    alpha: Annotated[
        float | None, typer.Option(help="Of END so much, of START the rest; 0.5 unless it is said.")
    ] = None,
    average: Annotated[bool, typer.Option("--average", help="The mean of all the folders.")] = False,
    reset: Annotated[
        bool, typer.Option("--reset", help="END with START's values where the plan of freeze.* would freeze.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Make a model of models, without training: between two (WiSE-FT), the mean of several (a soup), or one partly reset."""
    if not is_leader():
        return 0  # one process's work
    from dsfreeze.commands import merge_folders

    folder = merge_folders(words, output, alpha=alpha, average=average, reset=reset)
    if as_json:
        print_json({"folder": str(folder)})
    else:
        say(f"wrote {escape(str(folder))}")
    return 0
