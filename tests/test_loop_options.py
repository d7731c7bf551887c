"""What a run does between its steps and after the last: evaluations, checkpoints, trackers, warnings, finishing late.

Oracles: the steps that the options name, the undisturbed run, TensorBoard's own reader.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_runs import tiny_recipe

from dsfreeze import loop, saving
from dsfreeze.errors import UserError
from dsfreeze.export import load_file
from dsfreeze.loop import train
from dsfreeze.phases import FIRST_LOOK
from dsfreeze.record import read_record


def happened(folder: Path, kind: str, field: str) -> list:
    return [event[field] for event in read_record(folder).events if event["event"] == kind]


@pytest.mark.parametrize(
    ("options", "evaluated", "saved"),
    [
        ({"eval_strategy": "steps", "eval_steps": 5}, [0, 5, 10, 15, 18], []),
        ({"eval_strategy": "epoch"}, [0, 12, 18], []),
        ({"eval_strategy": "end", "save_strategy": "epoch"}, [0, 18], [12, 18]),
        ({"save_strategy": "steps", "save_steps": 7}, [], [7, 14, 18]),
    ],
)
def test_evaluations_and_checkpoints_come_when_asked(tmp_path, options, evaluated, saved):
    train(tiny_recipe(tmp_path, train={"max_steps": 18, "export": False, **options}))  # an epoch is 12 steps
    assert happened(tmp_path / "run", "evaluation", "step") == evaluated
    assert happened(tmp_path / "run", "checkpoint", "step") == saved


def test_only_so_many_checkpoints_are_kept(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "export": False}
    train(tiny_recipe(tmp_path, train=options))
    assert {folder.name for folder in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}


def test_trackers_hear_of_steps_and_evaluations_though_the_run_fails(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def full(*_args, **_options):
        raise UserError("the disk is full")

    monkeypatch.setattr(saving, "export_model", full)
    options = {"report_to": ["tensorboard"], "logging_steps": 4, "eval_strategy": "end"}
    with pytest.raises(UserError, match="the disk is full"):
        train(tiny_recipe(tmp_path, train=options))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    recorded = {line["step"]: line["loss"] for line in read_record(tmp_path / "run").steps}
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx({step: recorded[step] for step in (4, 8)})
    assert [event.step for event in events.Scalars("eval/accuracy")] == [0, 8]


def test_a_run_stopped_after_its_last_step_can_be_finished(tmp_path, monkeypatch):
    """Oracle: the same run, undisturbed."""
    options = {"save_strategy": "steps", "eval_strategy": "end"}
    undisturbed = train(tiny_recipe(tmp_path, train={**options, "output_dir": str(tmp_path / "whole")}))

    def killed(*_args, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving, "export_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_recipe(tmp_path, train=options))
    assert read_record(tmp_path / "run").summary is None
    finished = train(tiny_recipe(tmp_path, train={**options, "resume_from_checkpoint": True}))
    assert finished["metrics"] == undisturbed["metrics"]
    assert (finished["loss"], finished["steps"]) == (undisturbed["loss"], 8)
    assert finished["never_moved"] == []
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(UserError, match="nothing is left to do"):
        train(tiny_recipe(tmp_path, train={**options, "resume_from_checkpoint": True}))


def test_epochs_cannot_be_resumed_with_another_batch(tmp_path):
    half = {"save_strategy": "steps", "save_steps": 6, "export": False}
    train(tiny_recipe(tmp_path, train={**half, "max_steps": -1, "num_train_epochs": 1}))
    again = {**half, "per_device_train_batch_size": 2, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-6")}
    with pytest.raises(UserError, match=r"4 examples a step, and this run has 2.*train\.max_steps"):
        train(tiny_recipe(tmp_path, train={**again, "max_steps": -1, "num_train_epochs": 2}))
    train(tiny_recipe(tmp_path, train={**again, "max_steps": 8, "output_dir": str(tmp_path / "counted")}))
    assert [line["step"] for line in read_record(tmp_path / "counted").steps] == [7, 8]


def test_a_trainable_layer_that_the_forward_pass_skips_is_named(tmp_path, monkeypatch):
    """Gradients silently dropped (OpenRLHF #1258)."""
    prepare = loop.prepare_job

    def skipping(recipe):
        job = prepare(recipe)
        job.module.model.layers[3].forward = lambda hidden_states, **_options: hidden_states
        return job

    monkeypatch.setattr(loop, "prepare_job", skipping)
    shown = Console(file=io.StringIO(), width=200)
    summary = train(tiny_recipe(tmp_path, train={"max_steps": 12, "export": False}), shown)
    assert summary["never_moved"]
    assert all(name.startswith("model.layers.3.") for name in summary["never_moved"])
    assert happened(tmp_path / "run", "never_moved", "step") == [FIRST_LOOK, 12]
    assert "have not moved by step 10: model.layers.3." in shown.file.getvalue()


def test_what_an_earlier_checkpoint_leaves_behind_is_set_aside(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "export": False, "max_steps": 6}
    train(tiny_recipe(tmp_path, train={**options, "save_total_limit": None}))
    again = {**options, "max_steps": 4, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}
    train(tiny_recipe(tmp_path, train=again))
    kept = {folder.name for folder in (tmp_path / "run").glob("*checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-4", "abandoned-checkpoint-4", "abandoned-checkpoint-6"}


def test_a_model_folder_that_is_not_ours_is_found_before_training(tmp_path):
    recipe = tiny_recipe(tmp_path, train={"output_dir": str(tmp_path)})  # the recipe's own model is in output_dir/model
    with pytest.raises(UserError, match="was not written by an export"):
        train(recipe)
    assert not (tmp_path / "steps.jsonl").exists()
