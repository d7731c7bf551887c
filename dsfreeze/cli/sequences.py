"""`continual`: a sequence of tasks, method by method."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsfreeze.cli.output import escape, is_leader, print_json, say, show
from dsfreeze.cli.words import AsJson
from dsfreeze.screen import screen


def continual(
    file: Annotated[
        Path, typer.Argument(metavar="TASKS.yaml", help="A sequence of tasks, and methods to compare on it.")
    ],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of its keys.")] = None,
    as_json: AsJson = False,
) -> int:
    """Train on a sequence of tasks, and say what is learnt and what is forgotten; goes on where it was stopped."""
    from dsfreeze.continual.reading import read_course

    course = read_course(file, words or ())
    from dsfreeze.continual.rounds import run_course

    state = run_course(course, screen())
    if not is_leader():
        return 0
    from dsfreeze.continual.figure import draw_figure
    from dsfreeze.continual.results import FIGURE, RESULTS
    from dsfreeze.continual.tables import continual_table

    folder = Path(course.spec.output_dir)
    missing = draw_figure(state, folder / FIGURE)
    if as_json:
        print_json(state)
        return 0
    show(continual_table(state))
    say(f"wrote {escape(str(folder / RESULTS))}" + (f"; no figure: {escape(missing)}" if missing else f" and {FIGURE}"))
    return 0
