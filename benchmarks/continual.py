"""Five tasks in sequence, method by method: what is learnt and what is forgotten (the data must lie beside the repository, as recipes/continual.yaml expects them).

    python benchmarks/continual.py stories15m          # or smollm2-135m; goes on where it was stopped
    python benchmarks/continual.py stories15m --tune   # the first half alone

First every method's learning rate is chosen alike: each of four on one seed, by the mean score after the first three tasks on rows held
out from the training files. Then three seeds, and three draws of what trains for each, on the first rows of the official evaluation splits. Runs lie in OUT; the result, continual-MODEL.json, and the figure of what was learnt
against what was forgotten lie beside this file and in docs/.
"""

from __future__ import annotations

import gzip
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine, write
from rich.console import Console

from dsfreeze.continual.figure import draw_figure
from dsfreeze.continual.reading import read_course
from dsfreeze.continual.rounds import run_course
from dsfreeze.data.rendering import PLAIN_TEMPLATE
from dsfreeze.model import load_model, load_tokenizer
from dsfreeze.recipe import ModelOptions

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"
OUT = HERE.parent / "runs" / "benchmark-continual"
SEEDS, DRAWS = [1, 2, 3], [0, 1, 2]
#: Rows held out of each training file; how many of them are measured; on the first how many tasks.
HELD_OUT, TUNED_BY, TUNED_ON = 64, 32, 3


@dataclass(frozen=True)
class Setting:
    """A model, how long a task is trained and measured, and the methods; `rates` are tried for each that trains by itself."""

    model: str
    rates: tuple[float, ...]
    steps: int
    num_eval: int
    num_probe: int
    metric: str
    trained: dict[str, dict[str, Any]]
    #: Full tuning with one thing changed, and bounds: they take its rate.
    beside: dict[str, dict[str, Any]]


_BOTH: dict[str, dict[str, Any]] = {"full": {}, "half": {}, "bottom": {}, "lora": {}, "replay": {}}
_BESIDE: dict[str, dict[str, Any]] = {"lower_lr": {}, "early_stop": {}, "multitask": {}, "soup": {}}
SETTINGS = {
    # too small to write an answer after so few steps: scored by the probability of the right one
    "stories15m": Setting(
        str(HERE.parents[1] / "shared" / "weights" / "stories15M"), (3e-4, 1e-3, 3e-3, 1e-2), 16, 48, 24, "perplexity",
        {**_BOTH, "norms": {}, "l2_sp": {"retain": {"weight": 0.1}}}, {"single_task": {}, **_BESIDE, "wise_ft": {"alphas": [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]}, "half_reset": {}},
    ),
    # nine times the computation a token: fewer points
    "smollm2-135m": Setting(
        "smollm2-135m", (1e-4, 3e-4, 1e-3, 3e-3), 6, 24, 12, "greedy_match", _BOTH, {**_BESIDE, "wise_ft": {"alphas": [0.25, 0.5, 0.75]}}
    ),
}  # fmt: skip
#: name -> prompt; the answer is the label's name.
TASKS = {
    "sst2": "Review: {text}\nIs it positive or negative?",
    "cola": "Sentence: {text}\nIs it acceptable or unacceptable?",
    "cl_agnews": "{text}\nIs it World, Sports, Business, or Science or Technology?",
    "qqp_sub": "First: {sentence1}\nSecond: {sentence2}\nDo they ask the same? True or False?",
    "sick": "{premise}\n{hypothesis}\nIs it entailment, neutral or contradiction?",
}
PROBES = {"tinystories": "validation", "wikitext2": "test"}


def base(name: str) -> str:
    """The start model's folder: its weights, and the plain way to write a chat, for both models alike (SmolLM2's own takes twice the
    tokens of a short task)."""
    folder = OUT / name / "base"
    if not folder.is_dir():
        options = ModelOptions(name=SETTINGS[name].model)
        tokenizer = load_tokenizer(options)
        tokenizer.chat_template = PLAIN_TEMPLATE
        module = load_model(options, "causal_lm", None, dtype=torch.float32, seed=0)
        module.save_pretrained(folder.with_name("base.part"))
        tokenizer.save_pretrained(folder.with_name("base.part"))
        folder.with_name("base.part").rename(folder)
    return str(folder)


def spec_of(
    name: str,
    data: dict[str, dict[str, str]],
    methods: list[dict[str, Any]],
    out: Path,
    *,
    num_eval: int,
    probes: bool,
    **more: Any,
) -> Path:
    """The file of a sequence over the tasks that `data` names, written into its folder."""
    setting = SETTINGS[name]
    tasks = [
        {"name": task, "prompt": TASKS[task], "answer": "{label_text}", "data": files, "metric": setting.metric}
        for task, files in data.items()
    ]
    probed = [
        {"name": probe, "data": {"eval": str(DATA / probe / f"{split}.jsonl.gz"), "text": "text", "max_eval_examples": setting.num_probe}}
        for probe, split in PROBES.items()
    ]  # fmt: skip
    train = {
        "max_steps": setting.steps, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "warmup_ratio": 0.1,
        "bf16": True, "save_strategy": "no",
    }  # fmt: skip
    spec = {
        "model": base(name), "zero": "local", "tasks": tasks, "probes": probed if probes else [], "methods": methods, "output_dir": str(out),
        "data": {"max_length": 96, "max_train_examples": 8 * setting.steps, "max_eval_examples": num_eval}, "train": train, **more,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    path = out / "tasks.yaml"
    path.write_text(json.dumps(spec, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def held_out(folder: Path) -> dict[str, dict[str, str]]:
    """Training files of the first tasks cut in two: rates are never chosen on a split that is reported."""
    found = {}
    for name in list(TASKS)[:TUNED_ON]:
        with gzip.open(DATA / name / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = file.readlines()
        (folder / name).mkdir(parents=True, exist_ok=True)
        found[name] = {"train": str(folder / name / "train.jsonl"), "eval": str(folder / name / "eval.jsonl")}
        Path(found[name]["train"]).write_text("".join(rows[:-HELD_OUT]), encoding="utf-8")
        Path(found[name]["eval"]).write_text("".join(rows[-HELD_OUT:]), encoding="utf-8")
    return found


def tuned(model: str, console: Console) -> dict[str, float]:
    """The rate of each method with the best mean score after the last round; of equal ones the one with the lower loss."""
    folder, setting = OUT / model / "tune", SETTINGS[model]
    methods = [
        {**options, "name": f"{name}-{rate:g}", "method": name, "train": {"learning_rate": rate}}
        for name, options in setting.trained.items()
        for rate in setting.rates
    ]
    path = spec_of(
        model, held_out(folder / "data"), methods, folder, num_eval=TUNED_BY, probes=False, seeds=[0], draws=[0]
    )
    summary = run_course(read_course(path, []), console)["summary"]

    def rank(name: str, rate: float) -> tuple[float, float]:
        numbers = summary[f"{name}-{rate:g}"]
        return numbers["op"]["mean"], -numbers["task_loss"]["mean"]

    return {name: max(setting.rates, key=lambda rate: rank(name, rate)) for name in setting.trained}


def main() -> None:
    model, console = sys.argv[1], Console(stderr=True)
    setting = SETTINGS[model]
    rates = tuned(model, console)
    console.print(rates)
    if "--tune" in sys.argv:
        return
    official = {
        name: {"train": str(DATA / name / "train.jsonl.gz"), "eval": str(DATA / name / "validation.jsonl.gz")}
        for name in TASKS
    }
    methods = [
        *(
            {**options, "name": name, "train": {"learning_rate": rates[name]}}
            for name, options in setting.trained.items()
        ),
        *({**options, "name": name} for name, options in setting.beside.items()),
    ]
    path = spec_of(
        model, official, methods, OUT / model / "run", num_eval=setting.num_eval, probes=True, seeds=SEEDS, draws=DRAWS
    )
    course = read_course(path, [f"train.learning_rate={rates['full']}"])
    state = run_course(course, console)
    draw_figure(state, HERE.parent / "docs" / f"continual-{model}.svg")
    scores = {key: [row["scores"] for row in run["rounds"]] for key, run in state["runs"].items()}
    told = {
        "machine": machine(), "setting": asdict(setting) | {"model": model}, "seeds": SEEDS, "draws": DRAWS, "learning_rates": rates,
        "start": state["start"], "summary": state["summary"], "scores": scores,
    }  # fmt: skip
    write(str(HERE / f"continual-{model}.py"), told)


if __name__ == "__main__":
    main()
