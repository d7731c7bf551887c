"""Make the small records that the notebooks show where no others are named; some fifteen minutes on two cores.

    python notebooks/records/make.py [nli] [scores] [continual]        (continual reads the data that lies beside the repository)

`nli`: the embedded encoder on the built-in data, once for each of a few plans, and one run that is killed on its way. `scores`: an
analysis of SmolLM2-135M on the built-in data, without what is said tensor by tensor and example by example. `continual`: the shipped
sequence of tasks, on a model of a quarter of a million parameters. One seed each: enough to draw a figure, too little to conclude anything from.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMMON = (
    "model=minilm-l6", "task=classification", "data.train=builtin:nli", "data.eval=builtin:nli", "data.max_length=48",
    "data.max_train_examples=640", "data.max_eval_examples=150", "zero=local", "train.max_steps=80", "train.seed=42",
    "train.per_device_train_batch_size=16", "train.per_device_eval_batch_size=64", "train.learning_rate=5.0e-4",
    "train.warmup_ratio=0.1", "train.eval_strategy=steps", "train.eval_steps=20", "train.save_strategy=no", "train.export=false",
)  # fmt: skip
RUNS = {
    "full": ("freeze.strategy=full",),
    "bottom-50": ("freeze.strategy=bottom", "freeze.fraction=0.5"),
    "bottom-50-cached": ("freeze.strategy=bottom", "freeze.fraction=0.5", "freeze.prefix_cache=memory"),
    "top-50": ("freeze.strategy=top", "freeze.fraction=0.5"),
    "gradual-unfreezing": ("freeze.strategy=gradual_unfreezing",),
    "lora": ("freeze.strategy=lora",),
}
KILLED, KILLED_AFTER = "killed", 30
ANALYSIS = (
    "model=smollm2-135m", "task=classification", "data.train=builtin:nli", "data.max_length=48", "zero=local",
    "analyze.num_examples=32", "analyze.ablation_examples=4", "analyze.gate_steps=2", "analyze.probe_steps=3", "analyze.output_dir=analysis",
)  # fmt: skip
SEQUENCE = (
    "model=../shared/weights/stories260K", "zero=local", "seeds=[1]", "train.max_steps=32", "train.learning_rate=6.0e-4",
    "data.max_length=256", "data.max_eval_examples=16",
    "methods=[full,half,bottom,replay,{name: wise_ft, alphas: [0.0,0.25,0.5,0.75,1.0]}]",
)  # fmt: skip


def dsfreeze(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """The command line at work in `folder`, so that records name what they made relative to it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen([sys.executable, "-m", "dsfreeze", *words], cwd=folder, env=environment)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"{process.args} ended with {process.returncode}")


def make_runs(folder: Path) -> None:
    for name, freezing in RUNS.items():
        finish(dsfreeze(folder, "train", *COMMON, *freezing, f"train.output_dir=runs/{name}"))
    killed = dsfreeze(folder, "train", *COMMON, *RUNS["full"], f"train.output_dir=runs/{KILLED}")
    steps = folder / "runs" / KILLED / "steps.jsonl"
    while killed.poll() is None and (not steps.exists() or len(steps.read_bytes().splitlines()) < KILLED_AFTER):
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    shutil.rmtree(HERE / "nli", ignore_errors=True)
    unneeded = shutil.ignore_patterns("model", "checkpoint-*", "deepspeed.json")
    shutil.copytree(folder / "runs", HERE / "nli", ignore=unneeded)
    for path in HERE.glob("nli/*/environment.json"):
        environment = json.loads(path.read_text(encoding="utf-8"))
        del environment["platform"]  # the kernel's build is nobody's business
        path.write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")


def make_scores(folder: Path) -> None:
    finish(dsfreeze(folder, "analyze", *ANALYSIS))
    content = json.loads((folder / "analysis" / "scores.json").read_text(encoding="utf-8"))
    for found in (content, *content["all"].values()):
        found["scores"] = {name: value for name, value in found["scores"].items() if name.startswith("layers.")}
    content["traces"] = {}
    write(HERE / "scores.json", content)


def make_continual(folder: Path) -> None:
    out = folder / "continual"
    finish(dsfreeze(ROOT, "continual", "recipes/continual.yaml", *SEQUENCE, f"output_dir={out}"))
    text = (out / "results.json").read_text(encoding="utf-8").replace(str(folder), "runs")
    write(HERE / "continual" / "results.json", json.loads(text))


def write(path: Path, value: Any) -> None:
    """Compact, six digits: the figures need no more."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        json.dumps(short(value), indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8"
    )


def short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: short(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [short(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


MADE = {"nli": make_runs, "scores": make_scores, "continual": make_continual}

if __name__ == "__main__":
    for name in sys.argv[1:] or MADE:
        with tempfile.TemporaryDirectory() as made:
            MADE[name](Path(made))
