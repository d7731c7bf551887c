"""`compare`: methods x tasks x models x seeds x sizes, each a run of its own."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from dsfreeze.cli.known import anatomy_of
from dsfreeze.cli.output import escape, print_json, say, show
from dsfreeze.cli.words import AsJson
from dsfreeze.errors import UserError


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

    console, script = Console(stderr=True), None
    if launcher == "slurm":
        state, script = write_jobs(grid, anatomy_of, console)
    else:
        state = run_grid(grid, anatomy_of, console)
    _tell(state, Path(grid.spec.output_dir), as_json=as_json)
    if launcher == "slurm":
        say("nothing is left to run" if script is None else f"submit with: sbatch {escape(str(script))}")
    return 0


def _tell(state: dict[str, Any], folder: Path, *, as_json: bool) -> None:
    """What a comparison says at its end: the one place where its tables are shown."""
    from dsfreeze.compare.results import RESULTS

    if as_json:
        print_json(state)
        return
    show(means_table(state))
    for key, cell in state["cells"].items():
        if cell["status"] in ("failed", "impossible"):
            say(f"{escape(key)} {cell['status']}: {escape(str(cell['reason']))}")
    say(f"wrote {escape(str(folder / RESULTS))}")


def means_table(state: dict[str, Any]) -> Any:
    """Of every method the mean score over seeds, and what a run took; a table until statistics have one."""
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table(title="mean over seeds; scores 0 to 100", title_justify="left", box=SIMPLE, pad_edge=False)
    for name in ("model", "task", "size", "method"):
        table.add_column(name, no_wrap=True)
    for name in ("runs", "score", "seconds", "peak GiB", "trains"):
        table.add_column(name, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for cell in state["cells"].values():
        names = (cell["model"], cell["task"], str(cell["size"] or "all"), cell["method"])
        groups.setdefault(names, []).append(cell)
    for group, cells in groups.items():
        done = [cell for cell in cells if cell["status"] == "done"]
        table.add_row(*map(escape, group), f"{len(done)}/{len(cells)}", *_figures(done))
    return table


def _figures(done: list[dict[str, Any]]) -> list[str]:
    if not done:
        return ["-"] * 4
    scores = [cell["score"] for cell in done if cell["score"] is not None]
    score = f"{statistics.mean(scores):.1f}" if scores else "-"
    seconds, peak = (statistics.mean(cell[key] for cell in done) for key in ("seconds", "peak_bytes"))
    share = statistics.mean(cell["trainable"] / cell["total"] for cell in done)
    return [score, f"{seconds:.1f}", f"{peak / 2**30:.2f}", f"{share:.1%}"]
