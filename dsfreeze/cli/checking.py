"""`check`: is what a run left whole?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dsfreeze.cli.output import escape, is_leader, print_json, say, show
from dsfreeze.cli.words import AsJson

_COLOURS = {"whole": "green", "damaged": "red", "left over": "yellow", "unfinished": "yellow"}


def check(
    folder: Annotated[Path, typer.Argument(help="A run's folder, one above, a checkpoint, or an exported model.")],
    as_json: AsJson = False,
) -> int:
    """Verify what runs left on disk: records, checkpoints, models, against the checksums they were written with. Exits with 1 if any is damaged."""
    if not is_leader():
        return 0  # one process's work
    from dsfreeze.verify import resumed_from, verify

    findings = verify(folder)
    damaged = sum(finding.verdict == "damaged" for finding in findings)
    resumed = resumed_from(folder)
    if as_json:
        print_json({"folder": str(folder), "findings": [vars(each) for each in findings], "resumes_from": resumed})
        return int(damaged > 0)
    from rich.box import SIMPLE
    from rich.table import Table

    table = Table("what", "verdict", "", box=SIMPLE, pad_edge=False)
    for each in findings:
        colour = _COLOURS[each.verdict]
        table.add_row(escape(each.path), f"[{colour}]{each.verdict}[/]", escape(each.told))
    show(table)
    if resumed:
        say(f"train.resume_from_checkpoint=true would go on from {escape(resumed)}")
    say(f"{damaged} of {len(findings)} damaged" if damaged else "nothing is damaged")
    return int(damaged > 0)
