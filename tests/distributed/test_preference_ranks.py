"""Preference tuning on two ranks. Oracle: the local engine in one process with the same global batch, and the file it leaves."""

from __future__ import annotations

import pytest
from forks import run_ranks
from marks import some_fast
from safetensors.numpy import load_file
from test_train import losses, train, values
from tiny_runs import preference_recipe


def go_on(raw: dict, folder: str) -> tuple[dict, dict, list[int]]:
    """A run, and another one that goes on from its second checkpoint, elsewhere; their summaries, and the passes without a graph of the
    second (module level: it is pickled by name for the ranks)."""
    from dsfreeze.engine.base import BaseEngine
    from dsfreeze.engine.process import process_group
    from dsfreeze.recipe import Recipe

    again = {**raw, "train": {**raw["train"], "output_dir": folder, "eval_strategy": "no"}}
    again["train"]["resume_from_checkpoint"] = f"{raw['train']['output_dir']}/checkpoint-4"
    with process_group(Recipe.model_validate(raw)):
        first, passes, real = train(raw), [], BaseEngine.no_grad_forward
        BaseEngine.no_grad_forward = lambda engine, batch, **options: (
            passes.append(len(batch["input_ids"])) or real(engine, batch, **options)
        )
        try:
            return first, train(again), passes
        finally:
            BaseEngine.no_grad_forward = real


@pytest.mark.parametrize("zero", some_fast(["zero2", "zero3"]))
def test_two_ranks_have_the_losses_of_the_local_engine(tmp_path, zero):
    """21 pairs in batches of 4: at an epoch's end one rank has a filler. The reference is shared, is that of one process to the last
    bit, and is not measured again by a run that goes on."""
    recipe = preference_recipe(tmp_path, train={"save_strategy": "steps", "save_steps": 4, "export": False})
    alone = train(values(recipe, "local", tmp_path / "local", ranks=1))
    raw = values(recipe, zero, tmp_path / zero, ranks=2)
    found = run_ranks(go_on, raw, str(tmp_path / "again"), timeout=120)
    assert losses(tmp_path / zero) == pytest.approx(losses(tmp_path / "local"), abs=1e-5)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "local")[4:], abs=1e-5)
    tables = [load_file(tmp_path / run / "reference.safetensors") for run in ("local", zero, "again")]
    assert all(table[part].tobytes() == tables[0][part].tobytes() for table in tables for part in ("train", "eval"))
    for first, _, passes in found:
        assert first["metrics"]["before"] == alone["metrics"]["before"]
        assert first["metrics"]["after"] == pytest.approx(alone["metrics"]["after"], abs=1e-5)
        assert passes == []
