"""`dsfreeze check`. Oracle: the damage that each test does to a run that was whole; `sha256sum` itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tiny_runs import tiny_recipe

from dsfreeze import cli
from dsfreeze.errors import UserError
from dsfreeze.loop import train
from dsfreeze.verify import resumed_from, verify


@pytest.fixture(scope="module")
def run(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "export": True}
    recipe = tiny_recipe(folder, train=options)
    train(recipe, Console(quiet=True))
    return Path(recipe.train.output_dir)


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


def verdicts(folder: Path) -> dict[str, str]:
    return {finding.path: finding.verdict for finding in verify(folder)}


def flip(path: Path, at: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_all_is_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verdicts(run) == {".": "whole", "checkpoint-2": "whole", "checkpoint-4": "whole", "model": "whole"}
    assert verdicts(run.parent)[f"{run.name}/checkpoint-2"] == "whole"
    assert verdicts(run / "checkpoint-2") == verdicts(run / "model") == {".": "whole"}
    assert cli.run(["check", str(run)]) == 0
    told = capsys.readouterr()
    assert "nothing is damaged" in told.err
    assert "would go on from checkpoint-4" in told.err
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=run / "model", check=True)


@pytest.mark.parametrize(("damage", "path", "words"), [
    (lambda run: flip(run / "checkpoint-4/weights.safetensors"), "checkpoint-4", "weights.safetensors is missing, truncated or changed"),
    (lambda run: flip(run / "model/model.safetensors"), "model", "is not what was written"),
    (lambda run: (run / "checkpoint-4/state.safetensors").unlink(), "checkpoint-4", "state.safetensors is missing"),
    (lambda run: (run / "checkpoint-4/manifest.json").unlink(), "checkpoint-4", "no manifest.json"),
    (lambda run: (run / "checkpoint-4/manifest.json").write_text("{"), "checkpoint-4", "manifest.json cannot be read"),
    (lambda run: (run / "model/model.safetensors").write_bytes(b"xx"), "model", "no whole safetensors file"),
    (lambda run: (run / "model/model.safetensors").unlink(), "model", "holds no .safetensors file"),
    (lambda run: (run / "plan.json").write_text("[]"), ".", "plan.json"),
])  # fmt: skip
def test_damage_is_found_where_it_is(copied: Path, damage: Callable[[Path], Any], path: str, words: str) -> None:
    damage(copied)
    found = {finding.path: finding for finding in verify(copied)}
    assert [name for name, each in found.items() if each.verdict == "damaged"] == [path]
    assert words in found[path].told
    assert cli.run(["check", str(copied)]) == 1
    assert resumed_from(copied) == ("checkpoint-2" if path == "checkpoint-4" else "checkpoint-4")


def test_a_manifest_that_lies_is_found(copied: Path) -> None:
    """Its checksums are right, and what it says of the tensors is not."""
    manifest = copied / "checkpoint-2/manifest.json"
    values = json.loads(manifest.read_text())
    name = next(iter(values["tensors"]))
    values["tensors"][name]["shape"][0] += 1
    manifest.write_text(json.dumps(values))
    assert f"has '{name}' in shape" in {each.path: each.told for each in verify(copied)}["checkpoint-2"]


def test_what_a_killed_run_leaves(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "summary.json").unlink()
    (copied / ".checkpoint-6.tmp").mkdir()
    (copied / "checkpoint-4").rename(copied / "abandoned-checkpoint-4")
    found = verdicts(copied)
    assert (found["."], found[".checkpoint-6.tmp"], found["abandoned-checkpoint-4"]) == (
        "unfinished",
        "left over",
        "left over",
    )
    assert cli.run(["check", str(copied), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["resumes_from"] == "checkpoint-2"
    assert {each["path"]: each["verdict"] for each in told["findings"]} == found


def test_nothing_to_check(tmp_path: Path) -> None:
    for folder, words in (
        (tmp_path / "no", "There is no folder"),
        (tmp_path, "holds no run, checkpoint or exported model"),
    ):
        with pytest.raises(UserError, match=words):
            verify(folder)
