"""The analyzer on two real ranks. Oracle: the local engine in one process, on the same examples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import _free_port, outcomes_of, run_ranks
from test_analyze import SMALL, calibrated, language_data
from test_launch import PYTHON, launch
from test_train import train
from tiny_runs import llama_folder

from dsfreeze.recipe import Recipe
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import read_record
from dsfreeze.scores import SCORES


@pytest.fixture(autouse=True)
def one_thread():
    """The ranks have one each; with more, sums are taken in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def analyze(values: dict[str, Any]) -> dict[str, Any]:
    """What scores.json holds (module level: it is pickled by name for the ranks)."""
    from rich.console import Console

    from dsfreeze.analyze import analyze as analyze_recipe

    return analyze_recipe(Recipe.model_validate(values), Console(quiet=True))


def values(recipe: Recipe, zero: str) -> dict[str, Any]:
    raw = recipe.model_dump(mode="json")
    raw["zero"] = zero
    raw["analyze"]["output_dir"] = str(Path(raw["analyze"]["output_dir"]).parent / zero)
    return raw


def close(score: str, zero: str) -> float:
    """Of the layers' largest. Probes train, gates are fitted on what came of that; at stage 3 forward passes are the module's own on
    gathered weights, and CKA and angles of like states lose digits."""
    source = SCORES[score].source
    if source in ("probe", "gates"):
        return 1e-4
    return 1e-3 if SCORES[score].family == "deviation" and zero == "zero3" else 1e-6


def agrees(found: dict[str, Any], expected: dict[str, Any], zero: str) -> None:
    assert found["left_out"] == expected["left_out"]
    assert list(found["all"]) == list(expected["all"])
    for score, taken in expected["all"].items():
        layers = [name for name in taken["scores"] if name.startswith("layers.")]
        one, other = ([side["all"][score]["scores"][name] for name in layers] for side in (expected, found))
        scale = max(abs(value) for value in one)
        assert other == pytest.approx(one, rel=0, abs=close(score, zero) * scale), (zero, score)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_every_score_is_the_local_engines(tmp_path, zero):
    """All scores, a reference among them, on 11 examples in batches of 4: the last batch is short, and a rank's share of it smaller."""
    reference = llama_folder(tmp_path / "reference", seed=1)
    recipe = calibrated(tmp_path, analyze={"num_examples": 11, "reference": str(reference)})
    expected = analyze(values(recipe, "local"))
    found = run_ranks(analyze, values(recipe, zero), timeout=120)
    assert list(expected["all"]) == list(SCORES)
    assert found[0] == found[1]
    agrees(found[0], expected, zero)
    assert json.loads((tmp_path / zero / "scores.json").read_text()) == json.loads(json.dumps(found[0]))


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_rank_without_a_batch_takes_part_all_the_same(tmp_path, zero):
    """Three ranks, three examples, two of them in a batch: rounds in which a rank has a filler, or no share of a step. Text,
    whose blocks differ in length, weighs the shares."""
    options = {"num_examples": 3, "batch_size": 2, "ablation_examples": 2, "probe_steps": 1, "gate_steps": 2}
    recipe = calibrated(tmp_path, task="causal_lm", data=language_data(tmp_path / "text"), analyze=options)
    expected = analyze(values(recipe, "local"))
    found = run_ranks(analyze, values(recipe, zero), world_size=3, timeout=120)
    for own in found:
        agrees(own, expected, zero)


def ask_for_too_many(raw: dict[str, Any]) -> dict[str, Any]:
    raw["analyze"]["num_examples"] = 46
    return analyze(raw)


def lose_a_matrix(raw: dict[str, Any]) -> dict[str, Any]:
    """The one matrix that is not finite has its spectrum taken by rank 1."""
    import torch

    import dsfreeze.analyze as analyzer

    load = analyzer.load_task

    def spoilt(recipe: Recipe) -> Any:
        found = load(recipe)
        with torch.no_grad():
            found[2].model.layers[0].self_attn.k_proj.weight[0, 0] = float("nan")
        return found

    analyzer.load_task = spoilt
    return analyze(raw)


def lose_the_disk(raw: dict[str, Any]) -> dict[str, Any]:
    """Rank 0, which alone writes, cannot."""
    import dsfreeze.analyze as analyzer

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if os.environ["RANK"] == "0":
        analyzer.os.replace = full
    return analyze(raw)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mishap", "told"),
    [(ask_for_too_many, "only 45 examples"), (lose_the_disk, "No space left"), (lose_a_matrix, "k_proj.weight is nan")],
)
def test_a_mistake_is_an_error_on_every_rank(tmp_path, mishap, told):
    recipe = calibrated(tmp_path, analyze={"scores": ["snr"]})
    found = outcomes_of(mishap, values(recipe, "zero2"), timeout=60)
    assert [(o.kind, o.error) for o in found] == [("error", "UserError")] * 2
    assert all(told in o.text for o in found)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_analyze_and_then_train_by_its_scores_under_the_launcher(tmp_path):
    """As a user does it, ZeRO-2 on two ranks (the training without its launcher, which costs seconds and has tests of its own). Oracles:
    the exit code, the recommendation in the file, the plan of the run's record."""
    options = {**SMALL, "budget": {"flops": "80%"}}
    steps = {"max_steps": 3, "export": False, "per_device_train_batch_size": 2}
    recipe = calibrated(tmp_path, zero="zero2", freeze={"fraction": 0.5}, train=steps, analyze=options)
    file, scores = tmp_path / "recipe.yaml", tmp_path / "analysis" / "scores.json"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    words = [PYTHON, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", str(_free_port()),
             "--module", "dsfreeze", "analyze", str(file)]  # fmt: skip
    done = launch(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("where to fine-tune") == 1, "one rank prints"
    said = json.loads(scores.read_text())["recommendation"]
    budget = ["freeze.strategy=budget", "freeze.fraction=null", "freeze.budget={flops: 80%}", f"freeze.scores={scores}"]
    summaries = run_ranks(train, load_recipe(file, budget).model_dump(mode="json"), timeout=60)
    assert summaries[0]["flops_vs_full"] <= 0.8
    record = read_record(tmp_path / "run")
    assert len(record.steps) == 3
    trained = {f"layers.{n.split('.')[2]}" for n in record.plan.phases[0].trainable if ".layers." in n}
    assert trained == set(said["layers"])
