"""What moving plans break elsewhere, held off in whole runs: peers' users hit each of these (the issue is named)."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from forks import outcomes_of, run_ranks
from safetensors.torch import load_file
from test_train import losses, train, values
from tiny_runs import llama_folder, tiny_recipe
from transformers import AutoModelForSequenceClassification

from dsfreeze.commands import export_folder
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record

pytestmark = pytest.mark.slow

STAGES = ("zero0", "zero1", "zero2", "zero3")
#: three phases, of steps 0-3, 4-7 and 8-11
STEPS, EVERY = 12, 4
LISA = {"strategy": "lisa", "fraction": None, "active_layers": 1, "switch_every": EVERY}


def recipe_of(folder: Path, freeze: dict, **train_options) -> Recipe:
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-3, "export": False}
    return tiny_recipe(folder, freeze=freeze, train={**options, "adam_epsilon": 1e-2, **train_options})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# -- LISA trains only the layers drawn first (LMFlow #726) ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "steps"), [("local", 60), ("zero2", 10), ("zero3", 60)])
def test_the_layers_that_moved_are_those_of_the_phases(tmp_path, zero, steps):
    """Eight layers, two at a time, five steps each. Oracle: the plan, and the start model's weights."""
    ranks = 1 if zero == "local" else 2
    llama_folder(tmp_path / "model", layers=8)
    freeze = {**LISA, "active_layers": 2, "switch_every": 5}
    recipe = recipe_of(tmp_path, freeze, max_steps=steps, save_strategy="no", export=True)
    run_ranks(train, values(recipe, zero, tmp_path / "run", ranks=ranks), world_size=ranks, timeout=150)
    start, end = weights_of(tmp_path / "model"), weights_of(tmp_path / "run" / "model")
    moved = {name for name, value in end.items() if name in start and not torch.equal(value, start[name])}
    plan = read_record(tmp_path / "run").plan
    assert moved == plan.ever_trained & set(start)
    layers = {name.split(".")[2] for name in moved if ".layers." in name}
    assert len(layers) == 8 if steps == 60 else 2 < len(layers) < 8
    assert all(one.trainable != other.trainable for one, other in pairwise(plan.phases[:2]))


# -- flags and groups after a resume (transformers #11294, pytorch-lightning #21901) ---------------------------------


def train_all_watched(runs: list[dict]) -> list[list[tuple]]:
    """What the optimizer held in every step of each run, on this rank."""
    from dsfreeze.engine.base import BaseEngine
    from dsfreeze.engine.process import process_group

    seen: list[list[tuple]] = []
    step = BaseEngine.step

    def watched(engine, learning_rate, own_rates=None):
        norm = step(engine, learning_rate, own_rates)
        flags = tuple(name for name, p in engine.module.named_parameters() if p.requires_grad)
        entries = [(e["layer"], e["lr"], e["weight_decay"]) for e in engine.optimizer.param_groups]
        stepped = sorted({name for flat in engine.flats for name, _ in flat.local()})
        seen[-1].append((flags, entries, stepped, engine.groups))
        return norm

    BaseEngine.step = watched
    try:
        with process_group(Recipe.model_validate(runs[0])):
            for raw in runs:
                seen.append([])
                train(raw)
    finally:
        BaseEngine.step = step
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["local", *STAGES])
def test_a_resumed_run_trains_what_the_uninterrupted_one_did(tmp_path, zero):
    """Stopped in the middle of phase 2 of 3 and at each boundary. Oracle: the uninterrupted run's flags, groups, losses."""
    recipe = recipe_of(tmp_path, LISA, weight_decay=0.1)
    ranks, stops = 1 if zero == "local" else 2, (EVERY, 6, 2 * EVERY)
    runs = [values(recipe, zero, tmp_path / "run", ranks=ranks)]
    for step in stops:
        start = tmp_path / "run" / f"checkpoint-{step}"
        runs.append(values(recipe, zero, tmp_path / f"from-{step}", ranks=ranks, resume_from_checkpoint=str(start)))
    for whole, *resumed in run_ranks(train_all_watched, runs, world_size=ranks, timeout=150):
        plan = read_record(tmp_path / "run").plan
        assert [flags for flags, *_ in whole] == [plan.phase_at(step).trainable for step in range(STEPS)]
        for step, again in zip(stops, resumed, strict=True):
            assert again == whole[step:], step
            assert losses(tmp_path / f"from-{step}") == pytest.approx(losses(tmp_path / "run")[step:], abs=1e-6), step


def test_a_run_resumed_at_a_boundary_does_not_say_that_layers_stand_still(tmp_path):
    """Oracle: the uninterrupted run, in which every tensor moved."""
    recipe = recipe_of(tmp_path, LISA)
    whole = train(values(recipe, "local", tmp_path / "run", ranks=1))
    start = tmp_path / "run" / f"checkpoint-{EVERY}"
    resumed = train(values(recipe, "local", tmp_path / "again", ranks=1, resume_from_checkpoint=str(start)))
    assert resumed["never_moved"] == whole["never_moved"] == []


# -- weights lost in saves (DeepSpeed #3090, #5439, #8378) -----------------------------------------------------------


def train_and_ask(raw: dict) -> torch.Tensor:
    """The logits of the live engine's module after the last step, on this rank."""
    from dsfreeze import loop

    answers, save = [], loop.save_model

    def asked(engine, job, metrics):
        answers.append(engine.no_grad_forward({"input_ids": TOKENS}).logits.clone())
        return save(engine, job, metrics)

    loop.save_model = asked
    try:
        train(raw)
    finally:
        loop.save_model = save
    return answers[0]


TOKENS = torch.arange(2, 34).reshape(2, 16)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero", STAGES)
def test_the_export_is_the_live_model(tmp_path, zero, bf16):
    """At the end, and from a checkpoint. Oracles: transformers' `state_dict` and loading, the live module's logits."""
    recipe = recipe_of(tmp_path, LISA, export=True, bf16=bf16, save_strategy="epoch")
    live, other = run_ranks(train_and_ask, values(recipe, zero, tmp_path / "run", ranks=2), timeout=120)
    torch.testing.assert_close(live, other, rtol=0, atol=0)
    exported = export_folder(tmp_path / "run", tmp_path / "again", delta=False, base=None)
    for folder in (tmp_path / "run" / "model", exported):
        loaded, told = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert set(weights_of(folder)) == set(loaded.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(TOKENS).logits, live, rtol=0, atol=0)


# -- frozen weights forgotten on resume (DeepSpeed #5430) ------------------------------------------------------------

#: layers.3 trains in steps 0-3, layers.1 from step 4 on
TURNS = {"strategy": "step_ranges", "fraction": None, "step_ranges": {
    "embed": -1, "layers.0": -1, "layers.1": 4, "layers.2": -1, "layers.3": [4, -1],
}}  # fmt: skip
STOP = 6


def train_from_any_model(raw: dict) -> dict:
    """With the comparison of the base models off: what a checkpoint holds must not depend on it."""
    from dsfreeze import saving

    require_same = saving.checkpoints.require_same
    saving.checkpoints.require_same = lambda *_: None
    try:
        return train(raw)
    finally:
        saving.checkpoints.require_same = require_same


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_a_layer_that_trained_earlier_comes_back_from_the_checkpoint(tmp_path, zero):
    """A fresh process and other start weights: refused by name; if it were not, layers.3 would be as it was trained."""
    recipe = recipe_of(tmp_path, TURNS, export=True)
    run_ranks(train, values(recipe, zero, tmp_path / "run", ranks=2), timeout=120)
    start = tmp_path / "run" / f"checkpoint-{STOP}"
    raw = values(recipe, zero, tmp_path / "again", ranks=2, resume_from_checkpoint=str(start))
    raw["model"]["name"] = str(llama_folder(tmp_path / "other", seed=1))
    refused = outcomes_of(train, raw, timeout=120)
    assert [(o.kind, o.error) for o in refused] == [("error", "UserError")] * 2
    assert all("was trained from model" in o.text for o in refused)
    run_ranks(train_from_any_model, raw, timeout=120)
    trained, found = weights_of(tmp_path / "run" / "model"), weights_of(tmp_path / "again" / "model")
    base, other = weights_of(tmp_path / "model"), weights_of(tmp_path / "other")
    for name in (n for n in trained if ".layers.3." in n):
        assert torch.equal(found[name], trained[name]), name
        assert not torch.equal(found[name], base[name]), name
    for name in (n for n in trained if ".layers.0." in n):
        assert torch.equal(found[name], other[name]), "the other model was really loaded"
