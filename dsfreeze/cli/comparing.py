"""`compare`: methods x tasks x models x seeds x sizes, each a run of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dsfreeze.cli.known import anatomy_of
from dsfreeze.cli.output import escape, print_json, say, show
from dsfreeze.cli.words import AsJson
from dsfreeze.errors import UserError
from dsfreeze.screen import screen


def compare(
    file: Annotated[
        Path, typer.Argument(metavar="GRID.yaml", help="Models, tasks, methods, seeds and sizes to compare.")
    ],
    words: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of its keys.")] = None,
    as_json: AsJson = False,
    launcher: Annotated[
        Literal["local", "slurm"], typer.Option(help="Run here, or write a job array for sbatch and run nothing.")
    ] = "local",
) -> int:
    """Compare methods honestly: the same data, seeds and budget for each, a record of every run; goes on where it was stopped."""
    from dsfreeze.compare.reading import read_grid

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("compare starts its runs itself; call it once, without a launcher: dsfreeze compare GRID.yaml.")
    grid = read_grid(file, words or ())
    from dsfreeze.compare.running import run_grid, write_jobs

    console, script = screen(), None
    if launcher == "slurm":
        state, script = write_jobs(grid, anatomy_of, console)
    else:
        state = run_grid(grid, anatomy_of, console)
    _tell(state, Path(grid.spec.output_dir), as_json=as_json)
    if launcher == "slurm":
        say("nothing is left to run" if script is None else f"submit with: sbatch {escape(str(script))}")
    return 0


def _tell(state: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """What a comparison says at its end."""
    from dsfreeze.compare.pareto import pareto_fronts
    from dsfreeze.compare.results import RESULTS
    from dsfreeze.compare.statistics import baseline, summarise
    from dsfreeze.compare.tables import comparison_tables
    from dsfreeze.compare.verdicts import rate_verdict

    if as_json:
        print_json(state)
        return
    cells = state["cells"]
    show(comparison_tables(summarise(cells, against=baseline(cells)), pareto_fronts(cells)))
    for line in rate_verdict(state["tuning"]):
        say(escape(line))
    say(f"wrote {escape(str(folder / RESULTS))}; a page of it: dsfreeze report {escape(str(folder))}")
