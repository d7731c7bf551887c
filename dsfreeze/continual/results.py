"""The results of a sequence: one file, rewritten after every round, that a stopped sequence goes on from. No torch.

    output_dir/results.json
      spec      the resolved file                      data     of each task and probe: rows, sha256, notes
      start     row 0: the start model                 runs     NAME -> {method, seed, draw, rounds: [row, ...]}
      summary   the numbers of every method, over seeds and draws
A row: round, task, scores (0 to 100, by task and probe), numbers (every metric), and what the round took and changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsfreeze import __version__
from dsfreeze.continual.matrix import Matrix, Score, spreads
from dsfreeze.continual.spec import Spec
from dsfreeze.errors import UserError
from dsfreeze.state_file import State, differences, read_state, write_state

FORMAT_VERSION = 1
RESULTS, FIGURE = "results.json", "learn_forget.png"
#: Keys that may change between one call and the next: they add runs, or say what is kept and shown.
FREE_KEYS = ("methods", "seeds", "draws", "keep_models", "output_dir", "bwt", "folder")


def open_results(spec: Spec, data: Mapping[str, Any]) -> State:
    """What earlier calls left, or a beginning. UserError where the folder holds the results of another sequence: says what differs."""
    resolved = spec.model_dump(mode="json")
    path = spec.output_dir / RESULTS
    fresh: State = {
        "format_version": FORMAT_VERSION, "version": __version__, "spec": resolved, "sequence": [t.name for t in spec.sequence],
        "probes": [probe.name for probe in spec.probes], "data": dict(data), "start": None, "runs": {}, "summary": {},
    }  # fmt: skip
    if not path.exists():
        return fresh
    found = read_results(path)
    changed = list(differences(found["spec"], resolved, FREE_KEYS, ("methods",)))
    changed += [
        f"the rows of '{name}'"
        for name, each in data.items()
        if found["data"].get(name, {}).get("sha256") != each["sha256"]
    ]
    if changed:
        raise UserError(
            f"{path} holds the results of another sequence. What differs: {'; '.join(changed)}. Go on with the one it was begun with, "
            "or name another output_dir."
        )
    return {**fresh, "start": found["start"], "runs": found["runs"]}


def read_results(path: Path) -> State:
    """The results file; UserError when there is none, or it is no such file."""
    return read_state(path, FORMAT_VERSION, "dsfreeze continual")


def write_results(folder: Path, state: Mapping[str, Any]) -> None:
    """Aside, then renamed; UserError when the disk refuses."""
    write_state(folder / RESULTS, state)


# -- reading them --------------------------------------------------------------------------------------------------


def matrix_of(state: Mapping[str, Any], run: Mapping[str, Any]) -> Matrix:
    """The result matrix of one run."""
    names: Sequence[str] = state["sequence"]
    start = state["start"]["scores"] if state["start"] else {}
    rows: list[list[Score]] = []
    for row in run["rounds"]:
        rows += [[None] * len(names)] * (row["round"] - 1 - len(rows))  # rounds that a method has not
        rows.append([row["scores"].get(name) for name in names])
    return Matrix(rows, [start.get(name) for name in names])


def general_ability(state: Mapping[str, Any], scores: Mapping[str, Score]) -> Score:
    """The mean of the probes' scores; None without any."""
    values = [scores.get(name) for name in state["probes"]]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def numbers_of(state: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Score]:
    """Every number of a run: the matrix's, after the last round general ability and the tasks' mean
    loss, and what the run changed."""
    numbers: dict[str, Score] = dict(matrix_of(state, run).numbers())
    last = run["rounds"][-1] if run["rounds"] else {}
    numbers["general_ability"] = general_ability(state, last.get("scores", {}))
    losses = [last.get("numbers", {}).get(name, {}).get("loss") for name in state["sequence"]]
    numbers["task_loss"] = sum(losses) / len(losses) if losses and None not in losses else None
    for key in ("update_norm", "trainable_share"):
        numbers[key] = last.get(key)
    for name in state["probes"]:
        for metric, value in last.get("numbers", {}).get(name, {}).items():
            numbers[f"{name}.{metric}"] = value
    seconds = [row["seconds"] for row in run["rounds"] if row.get("seconds") is not None]
    numbers["seconds"] = sum(seconds) if seconds else None
    return numbers


def summarise(state: Mapping[str, Any]) -> dict[str, Any]:
    """Of each method (WiSE-FT: of each alpha) the mean of every number and its deviation over seeds, and over draws apart."""
    groups: dict[str, dict[tuple[int, int | None], dict[str, Score]]] = {}
    for run in state["runs"].values():
        groups.setdefault(run["label"], {})[run["seed"], run["draw"]] = numbers_of(state, run)
    return {label: spreads(numbers) for label, numbers in groups.items()}
