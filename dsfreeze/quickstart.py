"""The quickstart: one real fine-tuning with the bottom 75 % frozen, then a few steps of full tuning beside it.

Each half is an ordinary `dsfreeze train` in a process of its own, so that peak memory is its own; this module only starts them
and reads their records. Overrides hold for both halves, but the second trains everything whatever they say. No torch here.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

from dsfreeze.errors import UserError
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record
from dsfreeze.screen import screen, show_result, write_result
from dsfreeze.supervise import supervise
from dsfreeze.tables import comparison_table

#: The recipe, as anyone could write it behind `dsfreeze train`.
RECIPE = (
    "model=smollm2-135m", "task=classification", "data.train=builtin:nli", "data.eval=builtin:nli",
    "freeze.strategy=bottom", "freeze.fraction=0.75", "zero=zero2",
    "train.max_steps=130", "train.per_device_train_batch_size=16", "train.learning_rate=5.0e-4", "train.warmup_ratio=0.1",
    "train.save_strategy=no", "train.per_device_eval_batch_size=32", "data.max_eval_examples=400",
)  # fmt: skip
FULL_STEPS = 4
#: What the second half says after the overrides. The null drops every key of freeze that they may have set.
FULL = (
    "freeze=null", "freeze.strategy=full", "data.eval=null", f"train.max_steps={FULL_STEPS}",
    "train.export=false", "train.save_strategy=no", "train.resume_from_checkpoint=null",
)  # fmt: skip


def quickstart(overrides: Sequence[str], *, as_json: bool = False) -> int:
    """Run both halves, print the comparison; returns the exit code of the first half that failed, else 0."""
    console = screen()
    words = [*RECIPE, f"train.output_dir={_free_folder(Path('runs'), 'quickstart')}", *overrides]
    folder = load_recipe(None, words).train.output_dir
    console.rule("1 of 2: fine-tune SmolLM2-135M with its bottom 75 % frozen, ZeRO-2")
    code = _train(words)
    if code:
        return code
    console.rule(f"2 of 2: {FULL_STEPS} steps of full tuning, to compare with")
    code = _train([*words, *FULL, f"train.output_dir={json.dumps(str(folder / 'full-tuning'))}"])
    if code:
        return code
    return _report(folder, as_json)


def _train(words: Sequence[str]) -> int:
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "dsfreeze", "train", "--json", *words]
    # the summary that goes to standard output is read from the record instead
    code, number = supervise(command, env=environment, stdout=DEVNULL)
    return code or (128 + number if number else 0)  # a signal in its last moment ends us too


def _report(folder: Path, as_json: bool) -> int:
    frozen, full = _summary(folder), _summary(folder / "full-tuning")
    if as_json:
        write_result(json.dumps({"frozen": frozen, "full": full}, indent=2) + "\n")
        return 0
    show_result(comparison_table(frozen, full))
    exported = f"    exported model: {frozen['model']}" if frozen["model"] else ""
    show_result(f"record: {folder}{exported}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _summary(folder: Path) -> dict[str, Any]:
    summary = read_record(folder).summary
    if summary is None:
        raise UserError(f"The run in {folder} left no summary: it was stopped before its end.")
    return summary


def _free_folder(parent: Path, stem: str) -> Path:
    names = itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2)))
    return next(parent / name for name in names if not (parent / name).exists())
