"""A recipe from the command line's words, and what the commands have in common in theirs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RECIPE.yaml] [KEY=VALUE]...", help="A recipe, overrides of its keys, or both."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def read_words(words: Sequence[str] | None) -> Recipe:
    """A recipe from the command line's words: at most one file, the rest `key=value`."""
    from dsfreeze.recipe_reader import load_recipe

    # os.path's answer to a name that is too long is no; Path's is an error
    files = [word for word in words or () if "=" not in word or os.path.isfile(word)]
    overrides = [word for word in words or () if word not in files]
    if len(files) > 1:
        raise UserError(f"Two recipes given: {files[0]} and {files[1]}. Name one; overrides are written key=value.")
    return load_recipe(Path(files[0]) if files else None, overrides)
