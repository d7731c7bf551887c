"""`evaluate` and `export` on a run that was trained. Oracles: the run's own metrics, plain transformers, bit-identity."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from tiny_runs import llama_folder, tiny_recipe
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from dsfreeze.cli import run
from dsfreeze.commands import export_folder
from dsfreeze.errors import UserError
from dsfreeze.loop import train
from dsfreeze.recipe import Recipe


@pytest.fixture(scope="module", params=[None, {"kind": "lora", "r": 2}], ids=["plain", "lora"])
def trained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    options = {"save_strategy": "steps", "save_steps": 4, "eval_strategy": "end"}
    return folder, train(tiny_recipe(folder, train=options, freeze={"adapter": request.param}))


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_evaluate_gives_the_metrics_the_run_ended_with(trained, capsys):
    folder, summary = trained
    assert run(["evaluate", str(folder / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metrics"]
    assert found == pytest.approx(summary["metrics"]["after"], abs=1e-6)
    assert run(["evaluate", str(folder / "run")]) == 0
    assert "accuracy" in capsys.readouterr().out


def test_export_of_the_last_checkpoint_is_the_exported_model(trained, tmp_path, capsys):
    folder, _ = trained
    assert run(["export", str(folder / "run"), "-o", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": str(tmp_path / "out")}
    mine, theirs = weights(tmp_path / "out"), weights(folder / "run" / "model")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
def test_export_prints_one_object_and_nothing_else(trained, tmp_path):
    """Oracle: a process of its own that must find its accelerator, of which DeepSpeed tells on standard output."""
    folder, _ = trained
    command = [sys.executable, "-m", "dsfreeze", "export", str(folder / "run"), "-o", str(tmp_path / "out"), "--json"]
    surroundings = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == {"folder": str(tmp_path / "out")}


def test_a_delta_filled_in_again_is_the_exported_model(trained, tmp_path):
    folder, _ = trained
    delta = export_folder(folder / "run", tmp_path / "delta", delta=True, base=None)
    whole = export_folder(delta, tmp_path / "whole", delta=False, base=str(folder / "model"))
    mine, theirs = weights(whole), weights(folder / "run" / "model")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_delta_refuses_another_base(trained, tmp_path):
    folder, _ = trained
    delta = export_folder(folder / "run", tmp_path / "delta", delta=True, base=None)
    other = llama_folder(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match="other weights"):
        export_folder(delta, tmp_path / "whole", delta=False, base=str(other))


def test_an_earlier_checkpoint_exports_its_own_weights(trained, tmp_path):
    folder, _ = trained
    early = export_folder(folder / "run" / "checkpoint-4", tmp_path / "early", delta=False, base=None)
    mine, theirs = weights(early), weights(folder / "run" / "model")
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_folders_that_are_no_run_are_named(tmp_path, capsys):
    for words in (["export", str(tmp_path), "-o", str(tmp_path / "out")], ["evaluate", str(tmp_path)]):
        assert run(words) == 2
        assert f"{tmp_path} is no run" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("source", ["", "checkpoint-3"])
def test_export_refuses_another_model_and_another_plan(tmp_path, source):
    """Oracle: the checkpoint's manifest; before, the trained layers were laid over whatever the recipe named by then."""
    recipe = tiny_recipe(tmp_path, train={"save_strategy": "steps", "max_steps": 3})
    train(recipe)
    file = tmp_path / "run" / "recipe.yaml"
    whole = file.read_text()
    file.write_text(whole.replace("strategy: bottom", "strategy: top"))
    with pytest.raises(UserError, match=r"another plan.*'bottom'.*'top'"):
        export_folder(tmp_path / "run" / source, tmp_path / "out", delta=False, base=None)
    file.write_text(whole)
    shutil.rmtree(tmp_path / "model")
    llama_folder(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match="was trained from model"):
        export_folder(tmp_path / "run" / source, tmp_path / "out", delta=False, base=None)
    assert not (tmp_path / "out").exists()


def test_evaluating_a_run_without_a_model_says_what_to_do_and_that_works(tmp_path, capsys):
    """Oracle: the command in the message, run as it stands; without a checkpoint there is none, and the message says so."""
    train(tiny_recipe(tmp_path, train={"save_strategy": "steps", "max_steps": 3, "export": False}))
    assert run(["evaluate", str(tmp_path / "run")]) == 2
    (command,) = re.findall(r"`dsfreeze (.*?)`", capsys.readouterr().err.replace("\n", " "))
    assert run(shlex.split(command)) == 0
    assert run(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "run")]) == 2
    assert "no checkpoint to write one from either" in capsys.readouterr().err.replace("\n", " ")
    assert run(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out")]) == 2
    assert "no checkpoint to export from" in capsys.readouterr().err.replace("\n", " ")


def test_an_exported_causal_model_scores_the_same_loss_in_transformers(tmp_path):
    """Oracle: transformers' own loss of the exported folder on the evaluation text, weighted by tokens."""
    llama_folder(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"sentence {i} of some text"}) for i in range(30))
    )
    recipe = Recipe.model_validate({
        "model": str(tmp_path / "model"), "task": "causal_lm", "zero": "local",
        "data": {"train": str(tmp_path / "text.jsonl"), "eval": str(tmp_path / "text.jsonl"), "text": "text", "max_length": 32},
        "freeze": {"strategy": "bottom", "fraction": 0.5},
        "train": {"max_steps": 4, "learning_rate": 1e-2, "output_dir": str(tmp_path / "run"), "save_strategy": "no"},
    })  # fmt: skip
    summary = train(recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    from dsfreeze.job import load_task

    _, data, _ = load_task(recipe)
    total = items = 0.0
    for example in data.eval:
        batch = data.collate([example])
        count = data.num_items(batch)
        with torch.no_grad():
            total += model(**batch).loss.item() * count
        items += count
    assert summary["metrics"]["after"]["loss"] == pytest.approx(total / items, abs=1e-5)
