"""`models`: what can be named, and one name more."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsfreeze.cli.output import escape, is_leader, print_json, say, show
from dsfreeze.cli.words import AsJson
from dsfreeze.errors import UserError


def models(
    add: Annotated[
        Path | None,
        typer.Option(metavar="CONFIG", help="Learn the shape of this config.json (or folder with one), to plan with."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name that --add gives it; else its folder's.")] = None,
    as_json: AsJson = False,
) -> int:
    """List the models that can be named, and say what else `model:` can be; with `--add`, name one more."""
    from dsfreeze.shapes import list_models

    if add is not None:
        return _add_model(add, name, as_json)
    if name is not None:
        raise UserError("--name names what --add adds. Give both: dsfreeze models --add CONFIG --name NAME.")
    rows = list_models()
    if as_json:
        print_json({"models": [vars(row) for row in rows]})
    else:
        from dsfreeze.tables import models_table

        show(models_table(rows))
    return 0


def _add_model(path: Path, name: str | None, as_json: bool) -> int:
    """Read a config's task models and keep their anatomies under a name, which is its folder's where none is given."""
    from dsfreeze.shapes import add, require_free_name

    whole = path.expanduser().resolve()
    name = name or (whole.parent.name if whole.name == "config.json" else whole.stem if whole.is_file() else whole.name)
    require_free_name(name)
    if not is_leader():
        return 0  # one process's work
    from dsfreeze.model_config import config_file, read_config_activations, read_config_anatomies

    source = config_file(path.expanduser())
    tasks = read_config_anatomies(source, name)
    say(f"reading what the passes of {name} store, up to a minute ...")
    activations = read_config_activations(source)
    file = add(name, str(source.resolve()), tasks, activations)
    anatomy = next(iter(tasks.values()))
    if as_json:
        print_json({"name": name, "parameters": anatomy.numel, "tasks": list(tasks), "file": str(file)})
    else:
        for note in anatomy.notes:
            say(f"note: {escape(note)}")
        if activations is None:
            say("note: its passes cannot be run without data, so peaks and seconds are not planned for it")
        say(f"added {name}: {anatomy.numel:,} parameters, {len(anatomy.blocks)} layers; tasks {', '.join(tasks)}")
        say(f"try: dsfreeze plan model={name} task={next(iter(tasks))}")
    return 0
