"""`report`: what records say, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsfreeze.cli.output import escape, is_leader, print_json, say
from dsfreeze.cli.words import AsJson


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs' folders, folders of them, or a comparison's or sequence's results.json."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write: .html, .md or .csv.")] = Path(
        "report.html"
    ),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Report",
    as_json: AsJson = False,
) -> int:
    """Put records into one page that reads offline: tables, figures, environments, recipes; or into Markdown or CSV."""
    if not is_leader():
        return 0  # one process's work
    from dsfreeze.report import write_report
    from dsfreeze.report.sections import counted

    told = write_report(paths, output, title)
    if as_json:
        print_json(told)
        return 0
    for each in told["not_read"]:
        say(f"[yellow]not read:[/] {escape(each['name'])}: {escape(each['reason'])}")
    if told["no_figures"]:
        say(f"[yellow]no figures:[/] {escape(told['no_figures'])}")
    counts = [counted(told[f"{what}s"], what) for what in ("run", "comparison", "sequence") if told[f"{what}s"]]
    if told["interrupted"]:
        counts.append(f"{len(told['interrupted'])} of the runs interrupted")
    say(f"wrote {escape(str(output))}: {', '.join(counts)}")
    return 0
