"""The whole of training on the local engine. Oracles: a plain PyTorch loop, the uninterrupted run, bit-identity, transformers' own loading."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import llama_folder, tiny_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dsfreeze import checkpoint as checkpoints
from dsfreeze.errors import UserError
from dsfreeze.job import prepare_job
from dsfreeze.loop import Run, train
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record
from dsfreeze.schedule import learning_rate_schedule


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_record(folder).steps]


def plain_losses(recipe, steps: int) -> list[float]:
    """Plain PyTorch: the model from the same folder, bottom half frozen, AdamW, clipping, the batches in the loader's order."""
    job = prepare_job(recipe)
    loader = Run(job, None, type("Ranks", (), {"rank": 0, "world_size": 1})).loader
    trainable = set(job.plan.phases[0].trainable)
    chosen = [p for n, p in job.module.named_parameters() if n in trainable]
    for name, parameter in job.module.named_parameters():
        parameter.requires_grad_(name in trainable)
    job.module.train()
    o = recipe.train
    betas = (o.adam_beta1, o.adam_beta2)
    optimizer = torch.optim.AdamW(chosen, lr=0.0, betas=betas, eps=o.adam_epsilon, weight_decay=o.weight_decay)
    rate = learning_rate_schedule(o, steps)
    found = []
    for number, step in zip(range(steps), loader, strict=False):
        optimizer.param_groups[0]["lr"] = rate(number)
        total = sum(job.module(**batch).loss * items / step.global_items for batch, items in step.micro_batches)
        total.backward()
        torch.nn.utils.clip_grad_norm_(chosen, o.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total.item())
    return found


def test_losses_are_those_of_plain_pytorch(tmp_path):
    recipe = tiny_recipe(tmp_path, train={"gradient_accumulation_steps": 2, "max_grad_norm": 0.5})
    train(recipe)
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(recipe, 8), abs=1e-6)


def test_epochs_and_adams_own_options_are_those_of_plain_pytorch(tmp_path):
    # 45 examples by 4 are 12 steps an epoch, the last one short
    recipe = tiny_recipe(
        tmp_path, train={"max_steps": -1, "num_train_epochs": 1.5, "adam_beta1": 0.5, "adam_beta2": 0.7}
    )
    train(recipe)
    assert losses(tmp_path / "run") == pytest.approx(plain_losses(recipe, 18), abs=1e-6)
    assert [line["epoch"] for line in read_record(tmp_path / "run").steps] == [0] * 12 + [1] * 6


def test_the_record_and_the_exported_model_are_whole(tmp_path):
    recipe = tiny_recipe(tmp_path, train={"eval_strategy": "end", "max_steps": 40})
    before = {n: p.clone() for n, p in prepare_job(recipe).module.named_parameters()}
    summary = train(recipe)
    record = read_record(tmp_path / "run")
    assert [line["step"] for line in record.steps] == list(range(1, 41))
    assert record.summary["metrics"].keys() == {"before", "after"}
    assert summary["metrics"]["after"]["accuracy"] > summary["metrics"]["before"]["accuracy"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    after = dict(loaded.named_parameters())
    trained = set(record.plan.ever_trained)
    assert {n for n in before if not torch.equal(before[n], after[n])} == trained
    assert summary["trainable"] == sum(p.numel() for n, p in before.items() if n in trained)


def test_no_model_is_written_when_none_is_wanted(tmp_path):
    summary = train(tiny_recipe(tmp_path, train={"export": False}))
    assert summary["model"] is None
    assert not (tmp_path / "run" / "model").exists()
    assert Path(summary["record"]) == tmp_path / "run"


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "r": 2}])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, adapter):
    """Oracle: the uninterrupted run's losses and weights, to the last bit; the data are resumed inside an epoch."""
    options = {"save_strategy": "steps", "save_steps": 5, "max_steps": 14}
    whole = tiny_recipe(tmp_path, train={**options, "output_dir": str(tmp_path / "whole")}, freeze={"adapter": adapter})
    train(whole)
    resumed = tiny_recipe(
        tmp_path, freeze={"adapter": adapter},
        train={**options, "output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-5")},
    )  # fmt: skip
    train(resumed)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[5:]
    ends = [checkpoints.open_checkpoint(tmp_path / name / "checkpoint-14").state() for name in ("whole", "resumed")]
    for name, entry in ends[0].items():
        assert all(torch.equal(entry[kind], ends[1][name][kind]) for kind in entry)


def test_resume_refuses_another_plan_and_a_finished_run(tmp_path):
    train(tiny_recipe(tmp_path, train={"save_strategy": "steps", "max_steps": 3}))
    again = {"save_strategy": "steps", "max_steps": 3, "resume_from_checkpoint": True}
    with pytest.raises(UserError, match="nothing is left to do"):
        train(tiny_recipe(tmp_path, train=again))
    with pytest.raises(UserError, match=r"another plan.*'bottom'.*'top'"):
        train(tiny_recipe(tmp_path, train={**again, "max_steps": 6}, freeze={"strategy": "top"}))


def test_resume_refuses_another_model(tmp_path):
    train(tiny_recipe(tmp_path, train={"save_strategy": "steps", "max_steps": 3}))
    shutil.rmtree(tmp_path / "model")
    llama_folder(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="was trained from model"):
        train(tiny_recipe(tmp_path, train={"max_steps": 6, "resume_from_checkpoint": True}))


def test_a_full_disk_while_saving_is_an_error_and_the_old_checkpoint_stays(tmp_path, monkeypatch):
    real, calls = checkpoints.save_file, []

    def full_after_the_first(tensors, path, *args):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        return real(tensors, path, *args)

    monkeypatch.setattr(checkpoints, "save_file", full_after_the_first)
    with pytest.raises(UserError, match="No space left"):
        train(tiny_recipe(tmp_path, train={"save_strategy": "steps", "save_steps": 3}))
    assert checkpoints.find_checkpoint(tmp_path / "run", True).step == 3


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step(tmp_path):
    with pytest.raises(UserError, match="loss of step"):
        train(tiny_recipe(tmp_path, train={"learning_rate": 1e30, "max_grad_norm": 0.0, "warmup_steps": 0}))


def test_a_run_does_not_overwrite_anothers_record(tmp_path):
    train(tiny_recipe(tmp_path))
    with pytest.raises(UserError, match="run"):
        train(tiny_recipe(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_the_exit_code_says_so(tmp_path, number, code):
    """Oracle: the exit code, and a checkpoint that verifies and continues."""
    recipe = tiny_recipe(tmp_path, train={"max_steps": 100_000, "save_strategy": "no"})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-m", "dsfreeze", "train", str(file)], stderr=subprocess.PIPE, text=True
    )
    steps = tmp_path / "run" / "steps.jsonl"
    deadline = time.monotonic() + 120
    while not (steps.exists() and len(steps.read_text().splitlines()) > 3) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, number)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == code, shown
    found = checkpoints.find_checkpoint(tmp_path / "run", True)
    assert f"checkpoint-{found.step}" in shown.replace("\n", "")
    lines = [json.loads(line) for line in steps.read_text().splitlines()]
    assert lines[-1]["step"] == found.step


def test_summary_prices_the_plan(tmp_path):
    summary = train(tiny_recipe(tmp_path))
    assert summary["memory"]["optimizer_state"] == 2 * 4 * summary["trainable"]
    assert 0 < summary["flops_vs_full"] < 1
    assert summary["never_moved"] == []


def test_packed_training_runs_and_a_model_that_leaks_between_examples_is_refused(tmp_path, monkeypatch):
    """Oracle: `check_packing` on the live engine; a model whose cache would leak (transformers ignores the resets) is refused."""
    tiny_recipe(tmp_path)
    rows = [json.dumps({"prompt": f"say {i}", "completion": f"{i} it is"}) for i in range(24)]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows))
    raw = {
        "model": str(tmp_path / "model"), "task": "sft", "zero": "local",
        "data": {"train": str(tmp_path / "chat.jsonl"), "eval": None, "packing": True, "max_length": 128},
        "freeze": {"strategy": "bottom", "fraction": 0.5},
        "train": {"max_steps": 3, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "run"), "export": False},
    }  # fmt: skip
    train(Recipe.model_validate(raw))
    assert len(losses(tmp_path / "run")) == 3
    from dsfreeze.engine.local import LocalEngine

    real = LocalEngine.no_grad_forward

    def without_resets(engine, batch):
        return real(engine, {key: value for key, value in batch.items() if key != "position_ids"})

    monkeypatch.setattr(LocalEngine, "no_grad_forward", without_resets)
    raw["train"]["output_dir"] = str(tmp_path / "leaks")
    with pytest.raises(UserError, match="see each other"):
        train(Recipe.model_validate(raw))


def test_a_job_that_is_started_again_goes_on_or_begins_anew(tmp_path, monkeypatch):
    """`auto`. Oracle: the uninterrupted run's losses; a kill before the first checkpoint and one after it, as a scheduler would start it again."""
    options = {"save_strategy": "steps", "save_steps": 3, "resume_from_checkpoint": "auto"}
    train(tiny_recipe(tmp_path, train={**options, "output_dir": str(tmp_path / "whole")}))
    step, killed = Run._one_step, []

    def dies(run, *args):
        if run.step in (2, 5) and run.step not in killed:
            killed.append(run.step)
            run.writer.wait()
            raise KeyboardInterrupt
        return step(run, *args)

    monkeypatch.setattr(Run, "_one_step", dies)
    recipe = tiny_recipe(tmp_path, train=options)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    train(recipe)
    whole, again = (read_record(tmp_path / name) for name in ("whole", "run"))
    assert [line["loss"] for line in again.steps] == [line["loss"] for line in whole.steps]
    assert [event["event"] for event in again.events].count("resumed") == 2
    with pytest.raises(UserError, match="nothing is left to do"):
        train(recipe)
