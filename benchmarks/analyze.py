"""What an analysis of the embedded decoder takes: SmolLM2-135M, 64 RTE examples, every score, one process.

Seconds by pass (each round a process of its own), and the gradient family's peak memory over that of inference on the same examples, both
the resident set's peak of a process that does nothing else. Seconds are of this machine; the ratio is what counts.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine, spread, write

ROUNDS = 3
DATA = Path(__file__).parents[2] / "shared" / "data" / "rte" / "train.jsonl.gz"
WORDS = [
    "model=smollm2-135m", f"data.train={DATA}", "data.eval=null", "data.text=[premise,hypothesis]", "data.label=label",
    "data.max_length=256", "zero=local",
]  # fmt: skip
#: Prints the peak of a process that loads the model and makes one kind of pass over the examples.
PEAK = """
import sys
from dsfreeze.analyze.bench import Bench
from dsfreeze.analyze.calibration import calibration_sample
from dsfreeze.analyze.gradients import batch_gradients, example_gradients
from dsfreeze.engine.local import LocalEngine
from dsfreeze.evaluation import losses_of
from dsfreeze.job import load_task
from dsfreeze.model import read_anatomy
from dsfreeze.recipe_reader import load_recipe
import resource
recipe = load_recipe(None, sys.argv[2:])
_, data, module = load_task(recipe)
anatomy = read_anatomy(module, "model")
bench = Bench(recipe, anatomy, data, calibration_sample(data, 64, 42), LocalEngine(module, anatomy, recipe))
if sys.argv[1] == "inference":
    bench.over_examples(8, lambda chosen: losses_of(bench.engine, data, bench.collate(chosen)))
else:
    batch_gradients(bench)
    example_gradients(bench)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(kind: str) -> int:
    done = subprocess.run([sys.executable, "-c", PEAK, kind, *WORDS], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def analysis() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        words = ["analyze", *WORDS, "--json", f"analyze.output_dir={folder}"]
        done = subprocess.run([sys.executable, "-m", "dsfreeze", *words], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def deviation(content: dict[str, Any]) -> dict[str, Any]:
    """Of the transition traces: the least and the largest mean of a latent space, and where freezing would end by each gain."""
    means = [statistics.fmean(column) for column in zip(*content["traces"]["deviation"], strict=True)]
    ends = {
        gain: {"median": cuts["dataset"]["median"], "agreement": cuts["agreement"], "by_label": cuts["by_label"]}
        for gain, cuts in content["cuts"].items()
    }
    return {"means": [round(min(means), 4), round(max(means), 4)], "ends": ends}


def main() -> None:
    rounds = [analysis() for _ in range(ROUNDS)]
    ratios = [(peak("gradients"), peak("inference")) for _ in range(ROUNDS)]
    first = rounds[0]
    write(
        __file__,
        {
            "machine": machine(), "model": "smollm2-135m", "task": "rte", "examples": 64, "scores": len(first["all"]),
            "seconds": spread([r["seconds"] for r in rounds]),
            "seconds_by_pass": {p: spread([r["passes"][p]["seconds"] for r in rounds]) for p in first["passes"]},
            "gradient_peak_over_inference": spread([g / i for g, i in ratios]),
            "peaks": {"gradients": ratios[0][0], "inference": ratios[0][1]},
            "deviation": deviation(first),
            "spearman": {name: found["spearman"] for name, found in first["all"].items()},
            "recommendation": first["recommendation"]["sentence"],
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
