"""Runs without a prefix under ZeRO on two ranks. The oracle is the same recipe's whole model, under the same stage and locally."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from evicted_kit import changed, evicted, losses, rows_of, shelf, tensors_of
from forks import run_ranks
from tiny_runs import tiny_recipe

from dsfreeze.engine.process import process_group
from dsfreeze.errors import UserError
from dsfreeze.job import prepare_job
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.store import DiskStore
from dsfreeze.prefix.streaming import of_all_ranks, prefill
from dsfreeze.recipe import Recipe
from dsfreeze.saving import save_model


def run(text: str) -> tuple[list[float], int, int]:
    """Losses, and of this rank the bytes of weights and of Adam's state; the model is exported."""
    recipe = Recipe.model_validate_json(text)
    with process_group(recipe):
        found, stepper = losses(recipe)
        memory = stepper.engine.memory()
        save_model(stepper.engine, stepper.job, {})
        stepper.engine.close()
        return found, memory.weights, memory.optimizer_state


def on_ranks(recipe: Recipe, world_size: int = 2) -> tuple[list[float], int, int]:
    everyone = run_ranks(run, recipe.model_dump_json(exclude_unset=True), world_size=world_size)
    assert all(one[0] == everyone[0][0] for one in everyone)
    return everyone[0]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_every_stage_trains_the_suffix_as_it_trains_the_whole(tmp_path: Path, zero: str) -> None:
    recipe = changed(tiny_recipe(tmp_path), zero=zero, train={"per_device_train_batch_size": 2})
    wanted, weights, moments = on_ranks(recipe)
    found, suffix_weights, suffix_moments = on_ranks(evicted(recipe, output_dir=str(tmp_path / "evicted")))
    assert found == pytest.approx(wanted, rel=1e-5)
    alone = changed(recipe, zero="local", train={"per_device_train_batch_size": 4, "output_dir": str(tmp_path / "l")})
    assert found == pytest.approx(losses(evicted(alone))[0], rel=1e-5)
    assert suffix_weights < 0.6 * weights
    assert suffix_moments == moments
    ours, whole = tensors_of(tmp_path / "evicted" / "model"), tensors_of(tmp_path / "run" / "model")
    base = tensors_of(tmp_path / "model")
    assert ours.keys() == whole.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, whole[name], rtol=1e-4, atol=1e-6)
        if ".layers.0." in name or ".layers.1." in name or "embed" in name:
            assert torch.equal(tensor, base[name])


def fill_together(text: str, folder: str) -> tuple[int, int, int, str]:
    """How many examples this rank computes where ranks share a folder, and all; how many the store has then; and what it is told where they
    should share and do not."""
    recipe = Recipe.model_validate_json(text)
    with process_group(recipe) as ranks:
        job, share = prepare_job(recipe), (ranks.rank, ranks.world_size)
        store = DiskStore(Path(folder), 32, CODECS["fp32"], f"rank{ranks.rank}", may_write=True)
        filled = prefill(job, rows_of(job), store, shelf, share=share)
        computed, everyones, found = filled.examples, of_all_ranks(filled).examples, len(store)
        assert prefill(job, rows_of(job), store, shelf, share=share).examples == 0
        store.close()
        try:
            prefill(job, rows_of(job), shelf(), shelf, share=share)
        except UserError as error:
            return computed, everyones, found, str(error)
        return computed, everyones, found, ""


@pytest.mark.slow
def test_ranks_fill_one_store(tmp_path: Path) -> None:
    """Each computes a part and sees all; a store that lacks examples after all is an error on every rank."""
    recipe = evicted(changed(tiny_recipe(tmp_path), zero="zero2"))
    found = run_ranks(fill_together, recipe.model_dump_json(exclude_unset=True), str(tmp_path / "store"))
    assert {*found[0][1:3], *found[1][1:3]} == {found[0][0] + found[1][0]}
    assert min(found[0][0], found[1][0]) > 20
    assert all("lacks" in told and "after it was filled" in told for *_, told in found)
