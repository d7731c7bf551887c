"""The core needs no torch. Oracle: `sys.modules` of a fresh process after importing each part of it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dsfreeze

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "peft", "numpy", "sklearn", "tensorboard", "wandb")
CORE = (
    "dsfreeze", "dsfreeze.errors", "dsfreeze.files", "dsfreeze.folder_lock", "dsfreeze.background", "dsfreeze.durations", "dsfreeze.checkpoint", "dsfreeze.recipe", "dsfreeze.recipe_section", "dsfreeze.recipe_freeze", "dsfreeze.recipe_preference", "dsfreeze.recipe_retain",
    "dsfreeze.recipe_yaml", "dsfreeze.recipe_reader", "dsfreeze.recipe_reference", "dsfreeze.zero_config", "dsfreeze.anatomy", "dsfreeze.fused", "dsfreeze.activations", "dsfreeze.shapes", "dsfreeze.plan", "dsfreeze.record",
    "dsfreeze.strategies", "dsfreeze.strategies.adaptive", "dsfreeze.strategies.mask_file", "dsfreeze.budget", "dsfreeze.ranking", "dsfreeze.setting", "dsfreeze.hardware", "dsfreeze.estimate", "dsfreeze.estimate.communication", "dsfreeze.estimate.buffers", "dsfreeze.estimate.price", "dsfreeze.estimate.caching", "dsfreeze.planner.study", "dsfreeze.planner.caching", "dsfreeze.picture",
    "dsfreeze.trackers", "dsfreeze.tables", "dsfreeze.quickstart", "dsfreeze.supervise", "dsfreeze.interrupt", "dsfreeze.journal", "dsfreeze.cli", "dsfreeze.section_reader", "dsfreeze.text_metrics",
    "dsfreeze.continual.matrix", "dsfreeze.continual.methods", "dsfreeze.continual.spec", "dsfreeze.continual.reading", "dsfreeze.continual.results", "dsfreeze.continual.tables", "dsfreeze.continual.trace", "dsfreeze.layered", "dsfreeze.named", "dsfreeze.state_file", "dsfreeze.metrics",
    "dsfreeze.compare.methods", "dsfreeze.compare.spec", "dsfreeze.compare.reading", "dsfreeze.compare.results", "dsfreeze.compare.pricing", "dsfreeze.compare.queue", "dsfreeze.compare.processes", "dsfreeze.compare.forking", "dsfreeze.compare.tuning", "dsfreeze.compare.running", "dsfreeze.compare.slurm",
    "dsfreeze.compare", "dsfreeze.compare.resampling", "dsfreeze.compare.pairs", "dsfreeze.compare.ranks", "dsfreeze.compare.statistics", "dsfreeze.compare.verdicts", "dsfreeze.compare.pareto", "dsfreeze.compare.rows", "dsfreeze.compare.tables",
    "dsfreeze.plotting", "dsfreeze.report",
    "dsfreeze.notebook.folders", "dsfreeze.notebook.showing", "dsfreeze.notebook.plans", "dsfreeze.notebook.importance", "dsfreeze.notebook.memory", "dsfreeze.notebook.throughput", "dsfreeze.notebook.scaling", "dsfreeze.notebook.forgetting", "dsfreeze.notebook.runs",
)  # fmt: skip


def heavy_after(program: str) -> str:
    """The heavy modules that a fresh process holds after running `program`, separated by blanks."""
    check = f"{program}; import sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip()


def test_the_check_can_fail():
    assert heavy_after("import numpy") == "numpy"


def test_the_whole_core_imports_nothing_heavy():
    assert heavy_after("; ".join(f"import {name}" for name in CORE)) == ""


def test_a_recipe_becomes_a_deepspeed_config_without_torch():
    program = (
        "from dsfreeze import load_recipe; from dsfreeze.zero_config import deepspeed_config;"
        "deepspeed_config(load_recipe(None, ['model=m']), 2)"
    )
    assert heavy_after(program) == ""


@pytest.mark.parametrize("name", [name for name in dsfreeze.__all__ if name != "train"])
def test_every_public_name_exists(name):
    assert getattr(dsfreeze, name) is not None
    assert name in dir(dsfreeze)


@pytest.mark.slow
def test_train_is_the_loops():
    from dsfreeze.loop import train

    assert dsfreeze.train is train


def test_no_public_name_is_a_modules():
    """A submodule that is imported becomes an attribute of the package, and would replace the name."""
    modules = {path.stem for path in (ROOT / "dsfreeze").iterdir()}
    assert not modules & set(dsfreeze.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = dsfreeze.trian


def test_only_the_engine_imports_deepspeed_or_torch_distributed():
    """Oracle: the import statements of every module."""
    offenders = []
    for path in (ROOT / "dsfreeze").rglob("*.py"):
        if "engine" in path.relative_to(ROOT / "dsfreeze").parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            offenders += [(path.name, name) for name in names if name.startswith(("deepspeed", "torch.distributed"))]
    assert not offenders
