"""The command line. Oracles: exit codes, `sys.modules` of a subprocess, JSON that parses, the recipe that was asked for."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from tiny_runs import tiny_recipe

from dsfreeze.__main__ import without_local_rank
from dsfreeze.cli import read_words, run
from dsfreeze.zero_keys import BUCKET

ROOT = Path(__file__).parents[1]


def call(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsfreeze", *words],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--local_rank=1", "train", "r.yaml"],
        ["train", "--local_rank", "1", "r.yaml"],
        ["train", "r.yaml", "--local-rank=3"],
    ],
)
def test_the_launchers_local_rank_is_dropped_anywhere(words):
    assert without_local_rank(words) == ["train", "r.yaml"]


def test_plan_on_a_shipped_anatomy_imports_no_torch_and_prints_one_object():
    """Oracle: `sys.modules` after the command."""
    program = (
        "import sys; from dsfreeze.cli import run;"
        "code = run(['plan', 'model=smollm2-135m', 'freeze.strategy=bottom', 'freeze.fraction=0.5', '--json']);"
        "assert code == 0; heavy = {'torch', 'transformers', 'deepspeed', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (
        plan["total"] == 134_515_008 + 3 * 576
    )  # the published total, and a score head for builtin:nli's three classes
    assert plan["trainable"] == 15 * 3_540_096 + 576 + 3 * 576  # 15 layers, final norm, score head


def test_plan_draws_a_picture(capsys):
    assert run(["plan", "model=smollm2-135m", "freeze.fraction=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "layers.0" in shown or "embed" in shown


def planned(capsys, *words: str) -> dict:
    assert run(["plan", "model=smollm2-135m", "freeze.strategy=head", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_says_when_the_number_of_labels_is_a_guess(capsys):
    """Oracle: the head's parameters, and the built-in set's own labels."""
    from dsfreeze.data.nli import LABELS

    assert planned(capsys)["trainable"] == len(LABELS) * 576
    guessed = planned(capsys, "data.train=mine.jsonl")
    assert guessed["trainable"] == 2 * 576
    assert any("2 labels" in note and "data.num_labels" in note for note in guessed["notes"])
    for known in ("data.num_labels=5", "data.labels=[a,b,c,d,e]"):
        plan = planned(capsys, "data.train=mine.jsonl", known)
        assert (plan["trainable"], plan["notes"]) == (5 * 576, planned(capsys)["notes"])
    assert run(["plan", "model=smollm2-135m", "data.train=mine.jsonl"]) == 0
    assert "data.num_labels" in capsys.readouterr().out
    language = planned(capsys, "data.train=mine.jsonl", "task=causal_lm", "freeze.strategy=bottom")
    assert not any("labels" in note for note in language["notes"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan", "model=smollm2-135m", "freeze.strategy=botom"], "bottom"),
        (["plan", "model=smollm2-135m", "freze.strategy=bottom"], "freeze"),
        (["plan", "model=smollm2-135m", "freeze.fraction=1.5"], "fraction"),
        (["plan", "missing.yaml"], "missing.yaml"),
        (["plan", "a.yaml", "b.yaml"], "Two recipes"),
        (
            ["plan", "model=smollm2-135m", "freeze.trainable=[modle.layers.2]", "freeze.strategy=patterns"],
            "model.layers.2",
        ),
        (["plan", "model=smollm2-135m", "zero=zero4"], "zero3"),
        (["plan", "a" * 300], "name too long"),
        (["evaluate", "a" * 300], "name too long"),
        (["export", "delta", "-o", "out", "--delta", "--base", "smollm2-135m"], "give one of them"),
    ],
)
def test_mistakes_exit_2_and_name_the_mend(words, expected, capsys):
    assert run(words) == 2
    shown = capsys.readouterr()
    assert expected in shown.err.replace("\n", "")
    assert shown.out == ""


def test_an_override_longer_than_a_file_name_may_be_is_an_override():
    """Oracle: the recipe; asking whether a name of 300 letters is a file is an OSError."""
    assert read_words(["model=m", f"train.run_name={'a' * 300}"]).train.run_name == "a" * 300


def test_an_unknown_option_and_an_unknown_command_exit_2(capsys):
    assert run(["train", "--no-such-option"]) == 2
    assert run(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_print_config_has_no_auto_left(capsys):
    assert run(["train", "model=smollm2-135m", "zero=zero3", "--print-config", "--json"]) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert '"auto"' not in json.dumps(resolved["deepspeed"])
    assert resolved["deepspeed"]["zero_optimization"]["stage"] == 3
    assert resolved["recipe"]["model"]["name"] == "smollm2-135m"


def test_print_config_is_what_the_engine_is_given(tmp_path, capsys, monkeypatch):
    """Oracle: the engine that training builds, and the plan's parameters counted on the module."""
    from dsfreeze.engine.process import build_engine
    from dsfreeze.job import prepare_job

    monkeypatch.setenv("WORLD_SIZE", "1")
    recipe = tiny_recipe(tmp_path, zero="zero2", freeze={"adapter": {"kind": "lora", "r": 3}})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    capsys.readouterr()  # saving the model, transformers imported deepspeed
    assert run(["train", str(file), "--print-config", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    job = prepare_job(recipe)
    assert printed["deepspeed"] == build_engine(job.module, job.anatomy, recipe, job.plan).config
    trains = sum(p.numel() for n, p in job.module.named_parameters() if n in job.plan.ever_trained)
    assert printed["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == trains + trains % 2
    assert printed["notes"] == []


def test_print_config_without_the_model_says_that_buckets_are_bounds(capsys):
    """Oracle: the largest bucket there is; standard output stays YAML."""
    words = ["train", "model=./not/there", "zero=zero2", "--print-config"]
    assert run(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("# note: bucket sizes are upper bounds")
    assert "'./not/there' does not exist" in text.splitlines()[0]
    assert yaml.safe_load(text)["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == BUCKET
    assert run([*words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["notes"]) == 1


def test_print_config_tells_of_a_guessed_number_of_labels(capsys):
    assert run(["train", "model=smollm2-135m", "zero=zero2", "data.train=mine.jsonl", "--print-config"]) == 0
    assert "2 labels" in capsys.readouterr().out.splitlines()[0]


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "model=smollm2-135m", "data.train=mine.jsonl"],
        ["plan", "model=smollm2-135m", "--json"],
        ["train", "model=smollm2-135m", "--print-config"],
        ["train", "model=smollm2-135m", "--print-config", "--json"],
        ["models"],
        ["models", "--json"],
        ["export", "there-is-none", "-o", "nowhere"],
    ],
)
def test_only_rank_0_prints(words, capsys, monkeypatch):
    """Oracle: both streams of another rank; exporting is rank 0's work alone."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(words) == 0
    assert capsys.readouterr() == ("", "")


def test_models_lists_both_embedded_defaults(capsys):
    assert run(["models", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["models"]} >= {"smollm2-135m", "minilm-l6"}
    assert run(["models"]) == 0
    assert "hub id" in capsys.readouterr().out


def test_version(capsys):
    """Oracle: the installed distribution's own figure."""
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"dsfreeze {version('dsfreeze')}\n"


def test_help_of_every_command(capsys):
    for command in ("train", "plan", "evaluate", "export", "models", "quickstart"):
        assert run([command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out
