"""The quickstart with its own seed and three others, each as a user runs it: accuracy before and after, whole seconds, and what freezing saved in the same run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from common import machine, write

SEEDS = (42, 1, 2, 3)


def run(seed: int) -> tuple[dict[str, Any], float]:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "dsfreeze", "quickstart", "--json", f"train.seed={seed}"]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
        return json.loads(done.stdout), time.perf_counter() - began


def mean(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": round(statistics.mean(values), 4),
        "deviation": round(statistics.stdev(values), 4),
        "values": [round(value, 4) for value in values],
    }


def main() -> None:
    found = [run(seed) for seed in SEEDS]
    pairs = [(result["frozen"], result["full"]) for result, _ in found]
    result = {
        "seeds": SEEDS,
        "minutes": mean([seconds / 60 for _, seconds in found]),
        "accuracy_before": mean([frozen["metrics"]["before"]["accuracy"] for frozen, _ in pairs]),
        "accuracy_after": mean([frozen["metrics"]["after"]["accuracy"] for frozen, _ in pairs]),
        "ratio_to_full_tuning": {
            "optimizer_state": mean(
                [a["memory"]["optimizer_state"] / b["memory"]["optimizer_state"] for a, b in pairs]
            ),
            "peak_memory": mean([a["memory"]["peak"] / b["memory"]["peak"] for a, b in pairs]),
            "seconds_per_step": mean([a["seconds_per_step"] / b["seconds_per_step"] for a, b in pairs]),
        },
    }
    write(__file__, {"machine": machine(), **result})


if __name__ == "__main__":
    main()
