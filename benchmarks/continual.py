"""Five tasks in sequence, method by method: what is learnt and what is forgotten (the data must lie beside the repository, as recipes/continual.yaml expects them).

    python benchmarks/continual.py stories15m          # or smollm2-135m; goes on where it was stopped
    python benchmarks/continual.py stories15m --tune   # the first half alone

First every method's learning rate is chosen alike: each of RATES on one seed, by the mean score after the last round on rows held out from the training files. Then
three seeds, and three draws of what trains for each, on the official evaluation splits. Runs lie in OUT; the result, continual-MODEL.json, and the figure of what was learnt
against what was forgotten lie beside this file and in docs/.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

from common import machine, write
from rich.console import Console

from dsfreeze.continual.figure import draw_figure
from dsfreeze.continual.reading import read_course
from dsfreeze.continual.rounds import run_course

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
OUT = HERE.parent / "runs" / "benchmark-continual"
SEEDS, DRAWS, HELD_OUT = [1, 2, 3], [0, 1, 2], 64
RATES = {"stories15m": (2e-4, 5e-4, 1e-3), "smollm2-135m": (2e-5, 5e-5, 1e-4)}
MODELS = {"stories15m": str(HERE.parents[1] / "shared" / "weights" / "stories15M"), "smollm2-135m": "smollm2-135m"}
STEPS = {"stories15m": 32, "smollm2-135m": 12}
#: name -> prompt; the answer is the label's name.
TASKS = {
    "sst2": "Review: {text}\nIs it positive or negative?",
    "cola": "Sentence: {text}\nIs it acceptable or unacceptable?",
    "cl_agnews": "{text}\nIs it World, Sports, Business, or Science or Technology?",
    "qqp_sub": "First: {sentence1}\nSecond: {sentence2}\nDo they ask the same? True or False?",
    "sick": "{premise}\n{hypothesis}\nIs it entailment, neutral or contradiction?",
}
PROBES = {"tinystories": "validation", "wikitext2": "test"}
#: What trains by itself; its rate is tuned. Steps are the same for all but `early_stop`.
TRAINED: dict[str, dict[str, Any]] = {
    "full": {},
    "half": {},
    "half_layer": {},
    "half_model": {},
    "bottom": {},
    "lisa": {"freeze": {"switch_every": 8}},
    "badam": {"freeze": {"switch_every": 8}},
    "lora": {},
    "norms": {},
    "l2_sp": {"retain": {"weight": 0.1}},
    "ewc": {},
    "a_gem": {},
    "der": {},
    "replay": {},
}
#: What is full tuning's with one thing changed, and bounds: they take its rate.
BESIDE = ("lower_lr", "early_stop", "single_task", "multitask", "wise_ft", "soup", "half_reset")


def spec_of(model: str, data: dict[str, dict[str, str]], methods: list[dict[str, Any]], out: Path, **more: Any) -> Path:
    """The file of a sequence, written into its folder."""
    steps = STEPS[model]
    tasks = [
        {"name": name, "prompt": prompt, "answer": "{label_text}", "data": data[name]} for name, prompt in TASKS.items()
    ]
    probes = [
        {"name": name, "data": {"eval": str(DATA / name / f"{split}.jsonl.gz"), "text": "text"}}
        for name, split in PROBES.items()
    ]
    train = {
        "max_steps": steps, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 32, "warmup_ratio": 0.1,
        "save_strategy": "no",
    }  # fmt: skip
    spec = {
        "model": MODELS[model], "zero": "local", "tasks": tasks, "probes": probes, "methods": methods, "output_dir": str(out),
        "data": {"max_length": 128, "max_train_examples": 8 * steps, "max_eval_examples": 64}, "train": train, **more,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tasks.yaml"
    path.write_text(json.dumps(spec, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def held_out(folder: Path) -> dict[str, dict[str, str]]:
    """Training files cut in two: rates are never chosen on a split that is reported."""
    found = {}
    for name in TASKS:
        with gzip.open(DATA / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = file.readlines()
        (folder / name).mkdir(parents=True, exist_ok=True)
        found[name] = {"train": str(folder / name / "train.jsonl"), "eval": str(folder / name / "eval.jsonl")}
        Path(found[name]["train"]).write_text("".join(rows[:-HELD_OUT]), encoding="utf-8")
        Path(found[name]["eval"]).write_text("".join(rows[-HELD_OUT:]), encoding="utf-8")
    return found


def tuned(model: str, console: Console) -> dict[str, float]:
    """The rate of each method with the best mean score after the last round."""
    folder = OUT / model / "tune"
    methods = [
        {**options, "name": f"{name}-{rate:g}", "method": name, "train": {"learning_rate": rate}}
        for name, options in TRAINED.items()
        for rate in RATES[model]
    ]
    path = spec_of(model, held_out(folder / "data"), methods, folder, seeds=[0], draws=[0])
    summary = run_course(read_course(path, []), console)["summary"]
    return {name: max(RATES[model], key=lambda rate: summary[f"{name}-{rate:g}"]["op"]["mean"]) for name in TRAINED}


def main() -> None:
    model, console = sys.argv[1], Console(stderr=True)
    rates = tuned(model, console)
    console.print(rates)
    if "--tune" in sys.argv:
        return
    official = {
        name: {"train": str(DATA / name / "train.jsonl.gz"), "eval": str(DATA / name / "validation.jsonl.gz")}
        for name in TASKS
    }
    methods = [
        *({**options, "name": name, "train": {"learning_rate": rates[name]}} for name, options in TRAINED.items()),
        *({"name": name} for name in BESIDE),
    ]
    path = spec_of(model, official, methods, OUT / model / "run", seeds=SEEDS, draws=DRAWS)
    course = read_course(path, [f"train.learning_rate={rates['full']}"])
    state = run_course(course, console)
    draw_figure(state, HERE.parent / "docs" / f"continual-{model}.svg")
    target = HERE / f"continual-{model}.py"
    write(
        str(target),
        {"machine": machine(), "learning_rates": rates, "start": state["start"], "summary": state["summary"]},
    )


if __name__ == "__main__":
    main()
