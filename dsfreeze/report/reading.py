"""Records gathered into plain rows: runs, comparisons, sequences, and what could not be read, each with its reason. No torch.

A folder is searched for records and results files to any depth. What one file gets wrong does not cost the others: it is named in
`refused`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsfreeze.compare.results import FORMAT_VERSION as COMPARISON_VERSION
from dsfreeze.compare.verdicts import rate_verdict
from dsfreeze.continual.results import FORMAT_VERSION as SEQUENCE_VERSION
from dsfreeze.continual.results import RESULTS, summarise
from dsfreeze.errors import UserError
from dsfreeze.record import PLAN, RECIPE, find_records, read_object
from dsfreeze.report.redact import redact, redacted
from dsfreeze.report.row import Run, read_run


@dataclass(frozen=True)
class Results:
    """A results file: a comparison's (`cells`) or a sequence's (`runs` and `summary`)."""

    name: str
    state: Mapping[str, Any]


@dataclass
class Gathered:
    """All that was found; `refused`: (file or folder, why it was not read)."""

    runs: list[Run] = field(default_factory=list)
    comparisons: list[Results] = field(default_factory=list)
    sequences: list[Results] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def gather(paths: Sequence[Path]) -> Gathered:
    """Read what `paths` (runs, folders of them, results files) hold. UserError where a path is not there, or nothing can be read."""
    gathered = Gathered()
    found = list(dict.fromkeys(place for path in paths for place in _places(path, gathered.refused)))
    above = _common([place if place.name != RESULTS else place.parent for place in found])
    for place in found:
        name = redact(os.path.relpath(place, above))
        try:
            if place.name == RESULTS:
                _take_results(place, name, gathered)
            else:
                gathered.runs.append(read_run(place, name))
        except UserError as error:
            gathered.refused.append((name, str(error)))
    gathered.refused = [(redact(name), redact(why)) for name, why in gathered.refused]
    if not (gathered.runs or gathered.comparisons or gathered.sequences):
        raise UserError(_nothing(paths, gathered.refused))
    return gathered


def _nothing(paths: Sequence[Path], refused: Sequence[tuple[str, str]]) -> str:
    if refused:
        return "Nothing could be read. " + " ".join(why for _, why in refused[:12])
    return (
        f"{', '.join(map(str, paths))}: no record of a run in there ({RECIPE} and {PLAN}), and no {RESULTS} of a comparison or a "
        "sequence. Name what train.output_dir named, a folder of such folders, or a results file; `dsfreeze train` writes a record."
    )


def _common(folders: Sequence[Path]) -> Path:
    """What all lie in; of one folder, what it lies in."""
    parents = [folder.parent for folder in folders]
    return Path(os.path.commonpath(parents)) if parents else Path()


# -- where records are ---------------------------------------------------------------------------------------------


def _places(path: Path, refused: list[tuple[str, str]]) -> Iterator[Path]:
    """The records' folders and results files at and below a path."""
    try:
        whole = path.resolve()
        if whole.is_dir():
            yield from _walk(whole, refused)
        elif not whole.exists():
            raise UserError(f"There is no {path}. Name a run's folder, a folder of runs, or a {RESULTS}.")
        elif whole.name == RESULTS:
            yield whole
        else:
            raise UserError(f"{path} is a file that no report is made of. Name a run's folder, or a {RESULTS}.")
    except (OSError, ValueError) as error:  # a name too long, one with a NUL, a loop of links
        if isinstance(error, UserError):
            raise
        raise UserError(f"Cannot look at {str(path)!r:.200}: {error}.") from None


def _walk(folder: Path, refused: list[tuple[str, str]]) -> Iterator[Path]:
    def no_entry(error: OSError) -> None:
        refused.append((str(error.filename), f"The folder cannot be read: {error.strerror}."))

    return find_records(folder, RESULTS, no_entry)


# -- results -------------------------------------------------------------------------------------------------------


def _take_results(path: Path, name: str, gathered: Gathered) -> None:
    value: dict[str, Any] = redacted(read_object(path))
    if "cells" in value:
        _require_version(path, value, COMPARISON_VERSION)
        _check(path, lambda: _check_cells(value["cells"]))
        _check(path, lambda: rate_verdict(value["tuning"]))
        gathered.comparisons.append(Results(os.path.dirname(name) or name, value))
    elif "sequence" in value:
        _require_version(path, value, SEQUENCE_VERSION)
        _check(path, lambda: _check_sequence(value))
        gathered.sequences.append(Results(os.path.dirname(name) or name, {**value, "summary": summarise(value)}))
    else:
        raise UserError(f"{path} holds results of neither a comparison nor a sequence.")


def _require_version(path: Path, value: Mapping[str, Any], version: int) -> None:
    if value.get("format_version") != version:
        raise UserError(
            f"{path} has results of format {value.get('format_version')!r}, and this dsfreeze reads format {version}: use the version "
            "that wrote it, or upgrade."
        )


def _check(path: Path, attempt: Callable[[], object]) -> None:
    """UserError where reading the values in the shape they should have fails."""
    try:
        attempt()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}.") from None


def _check_cells(cells: Any) -> None:
    for key, cell in cells.items():
        if not isinstance(cell, Mapping):
            raise TypeError(f"cell {key} is no object")
        for name in ("model", "task", "method", "status"):
            if not isinstance(cell[name], str):
                raise TypeError(f"cell {key} has no {name}")


def _check_sequence(state: Mapping[str, Any]) -> None:
    """Everything that the page reads of it is where it should be."""
    if not all(isinstance(name, str) for name in (*state["sequence"], *state["probes"], state["spec"]["bwt"])):
        raise TypeError("a name is no text")
    for run in state["runs"].values():
        _ = run["label"] + run["method"], run["alpha"], [row["task"] + "" for row in run["rounds"]]
    summarise(state)
