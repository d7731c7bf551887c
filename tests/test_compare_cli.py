"""`dsfreeze compare`, its table and its job arrays. Oracles: the results file, what a person is meant to read, bash itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from compare_kit import grid_file, priced_at_once, run_here

from dsfreeze import cli
from dsfreeze.compare.results import RESULTS, read_results
from dsfreeze.errors import UserError

ROOT = Path(__file__).parents[1]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)
    path = str(grid_file(tmp_path, methods=["full", "bitfit"]))
    assert cli.run(["compare", path, "seeds=[3]"]) == 0
    out = capsys.readouterr()
    told = " ".join(out.err.split())
    assert "tiny/letters/full/size-all/seed-3 done" in told
    assert re.search(r"bitfit/size-all/seed-3 impossible: .* has no biases", told)
    assert "(0 runs to go)" in told
    table = " ".join(out.out.split())
    assert "Score, 0 to 100: mean ±deviation over seeds" in table
    assert "Score against cost" in table
    assert "Cells without a score" in table
    assert f"dsfreeze report {tmp_path / 'out'}" in told
    assert cli.run(["compare", path, "seeds=[3]", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == read_results(tmp_path / "out" / RESULTS)


@pytest.mark.parametrize(("words", "message"), [
    (["compare", "none.yaml"], "There is no comparison none.yaml"),
    (["compare"], "Missing argument"),
    (["compare", "{file}", "methods=[ful]"], "command line: methods[0] method 'ful' does not exist"),
    (["compare", "{file}", "--launcher", "pbs"], "'pbs' is not one of"),
])  # fmt: skip
def test_mistakes_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    path = str(grid_file(tmp_path))
    assert cli.run([word.format(file=path) for word in words]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_under_a_launcher_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.run(["compare", str(grid_file(tmp_path))]) == 2
    assert "call it once, without a launcher" in " ".join(capsys.readouterr().err.split())


def test_a_job_array_runs_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Bash runs each task of the script with a python that notes its words; names and folders have blanks, quotes and dollars."""
    priced_at_once(monkeypatch)
    folder = tmp_path / "a 'b' $HOME"
    folder.mkdir()
    noted = tmp_path / "noted"
    python = folder / "python it"
    python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "--" >> {noted}\n', encoding="utf-8")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    path = grid_file(folder, methods=["full", "bottom50", "bitfit"], jobs=2)
    begun = folder / "out/runs/tiny/letters/bottom50/size-all/seed-7"
    (begun / "checkpoint-1").mkdir(parents=True)
    (begun / "checkpoint-1/manifest.json").write_text("{}")
    stale = folder / "out/runs/tiny/letters/full/size-all/seed-7"
    stale.mkdir(parents=True)
    (stale / "recipe.yaml").write_text("{}")
    assert cli.run(["compare", str(path), "--launcher", "slurm"]) == 0
    assert "submit with: sbatch" in capsys.readouterr().err
    script = folder / "out/slurm/array.sh"
    text = script.read_text(encoding="utf-8")
    assert "#SBATCH --array=0-1%2\n" in text
    assert not any(str(folder) in line for line in text.splitlines() if line.startswith("#SBATCH"))
    for task in ("0", "1"):
        subprocess.run(["bash", str(script)], env={**os.environ, "SLURM_ARRAY_TASK_ID": task}, check=True)
    recipes = [str(folder / f"out/recipes/runs/tiny/letters/{m}/size-all/seed-7.yaml") for m in ("full", "bottom50")]
    first, second = (block.split("\n") for block in noted.read_text().removesuffix("\n--\n").split("\n--\n"))
    assert first == ["-m", "dsfreeze", "train", recipes[0]]
    assert second == ["-m", "dsfreeze", "train", recipes[1], "train.resume_from_checkpoint=true"]
    assert all(Path(recipe).is_file() for recipe in recipes)
    assert (stale.exists(), begun.exists()) == (False, True)
    states = read_results(folder / "out" / RESULTS)["cells"]
    assert [cell["status"] for cell in states.values()] == ["waiting", "waiting", "impossible"]


def test_jobs_that_have_ended_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """As an array's tasks would: the recipes that it wrote, trained one by one."""
    priced_at_once(monkeypatch)
    path = str(grid_file(tmp_path))
    assert cli.run(["compare", path, "--launcher", "slurm"]) == 0
    for recipe in sorted((tmp_path / "out/recipes").rglob("*.yaml")):
        assert cli.run(["train", str(recipe)]) == 0
    capsys.readouterr()
    assert cli.run(["compare", path, "--launcher", "slurm"]) == 0
    assert "nothing is left to run" in capsys.readouterr().err
    cells = read_results(tmp_path / "out" / RESULTS)["cells"]
    assert {cell["status"] for cell in cells.values()} == {"done"}


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 99}', b"\xff"])
def test_damaged_results_are_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RESULTS).write_bytes(content)
    with pytest.raises(UserError, match="results"):
        read_results(tmp_path / RESULTS)


@pytest.mark.slow
def test_the_shipped_comparison_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Shortened, on the model and data it names, in processes of its own."""
    monkeypatch.chdir(ROOT)
    words = [
        "train.max_steps=1",
        "sizes=[8]",
        "data.max_eval_examples=4",
        "seeds=[1]",
        "methods=[full, bottom50]",
        "jobs=2",
    ]
    assert cli.run(["compare", "recipes/compare_quick.yaml", *words, f"output_dir={tmp_path / 'out'}", "--json"]) == 0
    state = json.loads(capsys.readouterr().out)
    assert [cell["status"] for cell in state["cells"].values()] == ["done", "done"], state["cells"]
