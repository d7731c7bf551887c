"""The command line: parses, calls, prints. Every command takes `--json`: one object on standard output, nothing else there;
progress and warnings go to standard error. Of several ranks rank 0 alone prints; an error is said by each that meets it.

Exit codes: 0 done, 1 a bug of ours, 2 a mistake that the message says how to mend, 128 + n ended by signal n.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from dsfreeze import __version__
from dsfreeze.cli.checking import check
from dsfreeze.cli.comparing import compare
from dsfreeze.cli.output import escape, is_leader, say, write
from dsfreeze.cli.planning import plan
from dsfreeze.cli.reporting import report
from dsfreeze.cli.runs import analyze, cache, evaluate, export, merge
from dsfreeze.cli.sequences import continual
from dsfreeze.cli.shapes import models
from dsfreeze.cli.training import quickstart, train
from dsfreeze.cli.words import read_words
from dsfreeze.errors import UserError
from dsfreeze.interrupt import Interrupted

__all__ = ["app", "read_words", "run"]

app = typer.Typer(
    no_args_is_help=True, add_completion=False, rich_markup_mode="rich",
    help="Choose which layers to fine-tune, know what it costs, and train exactly that under DeepSpeed ZeRO.",
)  # fmt: skip
#: In the order of the help.
for _command in (
    train,
    plan,
    analyze,
    cache,
    evaluate,
    continual,
    compare,
    report,
    check,
    export,
    merge,
    models,
    quickstart,
):
    app.command()(_command)


def _tell_version(wanted: bool) -> None:
    if wanted:
        write(f"dsfreeze {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of the whole command."""


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; a UserError is printed without a traceback."""
    if not is_leader():
        warnings.simplefilter("ignore", UserWarning)  # every rank meets the same ones
    try:
        return int(app(list(arguments), standalone_mode=False) or 0)
    except UserError as error:
        say(f"[bold red]error:[/] {escape(str(error))}")
        return 2
    except Interrupted as interrupted:
        say(f"[bold yellow]stopped:[/] {escape(str(interrupted))}")
        return interrupted.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if not hasattr(
            error, "show"
        ):  # only click's own errors (a missing argument, an unknown option) can show themselves
            raise
        error.show(file=sys.stderr)
        return 2
