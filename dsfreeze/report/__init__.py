"""Reports: records in, one page out. No torch.

`reading` gathers what folders hold, runs as plain rows (`row`); `setups` puts runs together, `runs` and `comparisons` make sections of them (`sections`),
with `figures` as inline SVG; `html` and `text` write the page. All that comes from records is data: it is escaped where it is written;
`redact` takes out what looks like a credential where it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsfreeze import __version__
from dsfreeze.errors import UserError
from dsfreeze.files import write_whole
from dsfreeze.report.comparisons import cell_records, comparison_section, sequence_records, sequence_section
from dsfreeze.report.figures import missing
from dsfreeze.report.html import to_html
from dsfreeze.report.reading import Gathered, gather
from dsfreeze.report.redact import redact
from dsfreeze.report.runs import counts_of, run_records, run_sections
from dsfreeze.report.sections import Page, Section, Table, counted
from dsfreeze.report.text import to_csv, to_markdown

#: How a page is written, by the file's suffix.
WRITERS: dict[str, Callable[[Page], str]] = {".html": to_html, ".md": to_markdown, ".csv": to_csv}


def write_report(paths: Sequence[Path], output: Path, title: str = "Report") -> dict[str, Any]:
    """Write the report of what `paths` hold; what it holds, as counts, and what was not read. UserError when nothing can be read, the
    suffix is of no known kind, or the disk refuses."""
    writer = WRITERS.get(output.suffix.lower())
    if writer is None:
        raise UserError(
            f"-o {output}: a report is written as {', '.join(WRITERS)}, by the file's suffix; name such a file."
        )
    gathered = gather(paths)
    why = missing() if writer is to_html else ""
    page = make_page(gathered, redact(title), with_figures=writer is to_html and not why)
    if why:
        page = replace(page, paragraphs=[*page.paragraphs, f"No figures: {why}."])
    try:
        write_whole(output, writer(page))
    except (OSError, ValueError) as error:
        raise UserError(f"Cannot write the report {output}: {error}.") from None
    return {
        "output": str(output), "runs": len(gathered.runs), "interrupted": [run.name for run in gathered.runs if run.reason],
        "comparisons": len(gathered.comparisons), "sequences": len(gathered.sequences), "no_figures": why,
        "not_read": [{"name": name, "reason": reason} for name, reason in gathered.refused],
    }  # fmt: skip


def make_page(gathered: Gathered, title: str, *, with_figures: bool) -> Page:
    """The page, whatever it will be written as."""
    sections: list[Section] = []
    told = [counts_of(gathered.runs)] if gathered.runs else []
    if gathered.refused:
        told.append(f"Not read: {counted(len(gathered.refused), 'record')}, named in the first section.")
        sections.append(Section("Not read", tables=[Table("What was not read", ("record", "why"), gathered.refused)]))
    sections += [comparison_section(each, with_figures=with_figures) for each in gathered.comparisons]
    sections += [sequence_section(each, with_figures=with_figures) for each in gathered.sequences]
    sections += run_sections(gathered, with_figures=with_figures)
    rows = [row for each in gathered.comparisons for row in cell_records(each)]
    rows += [row for each in gathered.sequences for row in sequence_records(each)]
    rows += run_records(gathered.runs)
    rows += [{"kind": "not read", "name": name, "reason": why} for name, why in gathered.refused]
    return Page(title, [*told, f"Written by dsfreeze {__version__}."], sections, rows)
