"""Commands under a launcher. Oracle: the same command in one process: the same bits, printed once."""

from __future__ import annotations

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest
from forks import run_ranks
from tiny_runs import tiny_recipe

from dsfreeze.loop import train


def spoken(words: list[str]) -> tuple[int, str, int]:
    """Exit code, standard output, and forward passes of a command (module level: it is pickled by name for the ranks)."""
    from dsfreeze.cli import run
    from dsfreeze.engine.base import BaseEngine

    passes = []
    real = BaseEngine.no_grad_forward
    BaseEngine.no_grad_forward = lambda engine, batch, **options: (
        passes.append(engine.rank) or real(engine, batch, **options)
    )
    try:
        with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()):
            code = run(words)
    finally:
        BaseEngine.no_grad_forward = real
    return code, out.getvalue(), len(passes)


@pytest.mark.slow
def test_evaluate_shares_the_work_and_prints_once(tmp_path):
    """18 examples in batches of 4 are five batches: three rounds on two ranks, the last with a filler."""
    recipe = tiny_recipe(tmp_path, train={"per_device_eval_batch_size": 4, "max_steps": 4})
    train(recipe)
    words = ["evaluate", str(tmp_path / "run"), "zero=zero3", "--json"]
    code, expected, passes = spoken(words)
    assert (code, passes) == (0, 5)
    assert {"loss", "accuracy"} <= json.loads(expected)["metrics"].keys()
    assert run_ranks(spoken, words, timeout=120) == [(0, expected, 3), (0, "", 3)]


@pytest.mark.slow
def test_a_local_recipe_is_not_evaluated_on_two_ranks(tmp_path):
    train(tiny_recipe(tmp_path, train={"max_steps": 1}))
    assert run_ranks(spoken, ["evaluate", str(tmp_path / "run")]) == [(2, "", 0), (2, "", 0)]
