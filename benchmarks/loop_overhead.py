"""What the loop costs over a bare DeepSpeed loop doing the same: same model, same batches, same optimizer, turn about in one process.

Ours reads batches from the loader, writes the learning rate, the record and the progress line; the bare loop calls the engine
alone on batches that are there already.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path

import deepspeed
import torch
from common import machine, spread, write
from rich.console import Console
from step_time import BATCH, LENGTH, model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dsfreeze.engine.process import build_engine, process_group
from dsfreeze.interrupt import Interrupt
from dsfreeze.job import prepare_job
from dsfreeze.loop import Run
from dsfreeze.progress import StepBar
from dsfreeze.recipe import Recipe
from dsfreeze.zero_config import deepspeed_config

ROUNDS, STEPS, WARMUP = 25, 4, 1


def prepare_folder(folder: Path) -> None:
    """A model folder with a word tokenizer, and a corpus of random words."""
    words = [f"w{i}" for i in range(1000)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<eos>", *words])}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    model().save_pretrained(folder)
    draw = random.Random(0)
    rows = [json.dumps({"text": " ".join(draw.choices(words, k=LENGTH * 4))}) for _ in range(300)]
    (folder / "corpus.jsonl").write_text("\n".join(rows), encoding="utf-8")


def make_recipe(folder: Path) -> Recipe:
    return Recipe.model_validate({
        "model": str(folder), "task": "causal_lm", "zero": "zero2",
        "data": {"train": str(folder / "corpus.jsonl"), "eval": None, "text": "text", "max_length": LENGTH},
        "freeze": {"strategy": "bottom", "fraction": 0.5},
        "train": {"output_dir": str(folder / "run"), "max_steps": 10_000, "save_strategy": "no",
                  "per_device_train_batch_size": BATCH, "learning_rate": 1e-4, "lr_scheduler_type": "constant"},
    })  # fmt: skip


def bare_engine(recipe: Recipe) -> deepspeed.DeepSpeedEngine:
    job = prepare_job(recipe)
    trainable = set(job.plan.phases[0].trainable)
    for name, parameter in job.module.named_parameters():
        parameter.requires_grad_(name in trainable)
    job.module.train()
    optimizer = torch.optim.AdamW(
        [p for p in job.module.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0, fused=True
    )
    engine, *_ = deepspeed.initialize(model=job.module, optimizer=optimizer, config=deepspeed_config(recipe, 1))
    return engine


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, process_group(make_recipe(Path(name))) as ranks:
        prepare_folder(Path(name))
        recipe = make_recipe(Path(name))
        bare = bare_engine(recipe)
        job = prepare_job(recipe)
        run = Run(job, Console(quiet=True), ranks)
        engine = build_engine(job.module, job.anatomy, recipe, job.plan)
        engine.enter(job.plan.phases[0])
        run._open_journal(engine, resuming=False)
        bar, interrupt, steps = StepBar(run.console, run.total, 0, 10, shown=False), Interrupt(), iter(run.loader)
        batches = [next(iter(step.micro_batches))[0] for step, _ in zip(iter(run.loader), range(STEPS), strict=False)]

        def ours() -> float:
            began = time.perf_counter()
            for _ in range(STEPS):
                run._one_step(engine, next(steps), interrupt, bar)
            return time.perf_counter() - began

        def theirs() -> float:
            began = time.perf_counter()
            for batch in batches:
                loss = bare(**batch).loss
                bare.backward(loss)
                bare.step()
                loss.item()
            return time.perf_counter() - began

        for _ in range(WARMUP):
            ours(), theirs()
        ratios = [ours() / theirs() for _ in range(ROUNDS)]
    write(__file__, {"machine": machine(), "loop_over_bare_deepspeed": spread(ratios), "steps_per_round": STEPS})


if __name__ == "__main__":
    main()
