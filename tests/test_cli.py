"""The command line. Oracles: exit codes, `sys.modules` of a subprocess, JSON that parses, the recipe that was asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsfreeze.__main__ import without_local_rank
from dsfreeze.cli import run

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
    assert plan["total"] == 134_515_008 + 2 * 576  # the published total, and a score head for two classes
    assert plan["trainable"] == 15 * 3_540_096 + 576 + 2 * 576  # 15 layers, final norm, score head


def test_plan_draws_a_picture(capsys):
    assert run(["plan", "model=smollm2-135m", "freeze.fraction=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "layers.0" in shown or "embed" in shown


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
    ],
)
def test_mistakes_exit_2_and_name_the_mend(words, expected, capsys):
    assert run(words) == 2
    shown = capsys.readouterr()
    assert expected in shown.err.replace("\n", "")
    assert shown.out == ""


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


def test_models_lists_both_embedded_defaults(capsys):
    assert run(["models", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["models"]} >= {"smollm2-135m", "minilm-l6"}
    assert run(["models"]) == 0
    assert "hub id" in capsys.readouterr().out


def test_help_of_every_command(capsys):
    for command in ("train", "plan", "evaluate", "export", "models", "quickstart"):
        assert run([command, "--help"]) == 0
        assert "--json" in capsys.readouterr().out
