"""What freezing does to the cluster a model needs, from 0.1B to 405B parameters: `scaling.yaml` priced by formula, nothing is measured.

The whole record lies in runs/scaling; beside this script stand, of each plan, the smallest cluster and the fastest stage that fits on
every number of devices.
"""

from __future__ import annotations

import json
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from dsfreeze.planner.study import fitting, read_study, run_study

FIGURES = ("gpus", "stage", "bytes", "seconds_per_step", "gpu_hours")


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """The record without the cells that do not fit or are slower; four significant digits, bytes apart."""
    key = lambda row: (row["model"], row["strategy"])  # noqa: E731
    best = {name: list(rows) for name, rows in groupby(fitting(record), key)}
    plans = [
        {
            **{name: _short(value) for name, value in plan.items() if name != "smallest"},
            "fastest_that_fits": [[_short(row[name]) for name in FIGURES] for row in best.get(key(plan), [])],
        }
        for plan in record["plans"]
    ]
    cache = [{name: _short(value) for name, value in row.items()} for row in record["prefix_cache"]]
    rest = {name: value for name, value in record.items() if name not in ("rows", "plans", "prefix_cache")}
    return {**rest, "columns": FIGURES, "plans": plans, "prefix_cache": cache}


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    script = Path(__file__)
    study = read_study(script.with_suffix(".yaml"))
    with tempfile.TemporaryDirectory() as folder:
        record = run_study(study.model_copy(update={"output_dir": Path(folder)}))
    record["study"]["output_dir"] = str(study.output_dir)
    table = compact(record)
    lines = ",\n".join(f" {json.dumps(name)}: {_rows(value)}" for name, value in table.items())
    script.with_suffix(".json").write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def _rows(value: Any) -> str:
    """JSON with one line a row."""
    if not (isinstance(value, list) and value and isinstance(value[0], dict)):
        return json.dumps(value)
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in value) + "\n ]"


if __name__ == "__main__":
    main()
