"""Jobs without a prefix. The oracle is the same recipe's ordinary job: its base hash, anatomy, losses and exported model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from evicted_kit import changed, evicted, losses, rows_of, shelf, tensors_of
from marks import some_fast
from tiny_runs import byte_tokenizer, t5_folder, tiny_recipe
from transformers import AutoModel, BertConfig, GPT2Config, GPTNeoXConfig

from dsfreeze.commands import export_folder
from dsfreeze.errors import UserError
from dsfreeze.job import prepare_evicted, prepare_job
from dsfreeze.model import outline_of, read_anatomy
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.eviction import CACHE, evict, prefix_layers, refuse_early, refuse_metrics
from dsfreeze.prefix.keys import layer_digest
from dsfreeze.prefix.store import DiskStore
from dsfreeze.prefix.streaming import prefill
from dsfreeze.recipe import ModelOptions, Recipe
from dsfreeze.record import RECIPE
from dsfreeze.saving import CheckpointWriter, save_model

CONFIGS = {
    "gpt2": GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=258, n_positions=64, bos_token_id=1, eos_token_id=1),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, hidden_dropout=0.1, bos_token_id=1, eos_token_id=1,
    ),
    "bert": BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64,
    ),
}  # fmt: skip


def recipe_of(folder: Path, name: str = "llama", **changes: Any) -> Any:
    """GPT-2, GPT-NeoX and BERT with dropout of 0.1; the second has none but the token embedding."""
    if name in CONFIGS:
        torch.manual_seed(0)
        AutoModel.from_config(CONFIGS[name]).save_pretrained(folder / "model")
        byte_tokenizer().save_pretrained(folder / "model")
    return tiny_recipe(folder, **changes)


@pytest.mark.parametrize("adapter", [None, {"kind": "lora", "r": 2}])
@pytest.mark.parametrize("name", some_fast(["gpt2", "llama", "gpt_neox", "bert"]))
def test_losses_and_export_are_those_of_the_whole_model(tmp_path: Path, name: str, adapter: Any) -> None:
    """Dropout included: the suffix draws the numbers that it draws behind a prefix."""
    recipe = recipe_of(tmp_path, name, freeze={"strategy": "bottom", "fraction": 0.5, "adapter": adapter})
    wanted, ordinary = losses(recipe)
    found, without = losses(evicted(recipe, output_dir=str(tmp_path / "evicted")))
    assert found == pytest.approx(wanted, rel=1e-6)
    assert len(set(found)) == 4
    assert without.job.base == ordinary.job.base
    assert without.job.anatomy == ordinary.job.anatomy
    assert without.job.plan.digest == ordinary.job.plan.digest
    weights = dict(prepare_job(recipe).module.named_parameters())
    layers = prefix_layers(ordinary.job.plain, 2)
    assert without.job.prefix_digests == tuple(layer_digest(layer, weights) for layer in layers)
    assert sum(p.numel() for p in without.job.module.parameters()) == without.job.held.numel
    assert without.job.held.numel < 0.7 * ordinary.job.anatomy.numel
    exported = [tensors_of(save_model(s.engine, s.job, {})) for s in (ordinary, without)]
    assert exported[0].keys() == exported[1].keys()
    prefix = {t.name for layer in layers for t in layer.tensors}
    base = dict(weights)
    for name, tensor in exported[1].items():
        if name in prefix:
            assert torch.equal(tensor, exported[0][name])
            assert torch.equal(tensor, base[name])
        assert torch.allclose(tensor, exported[0][name], rtol=1e-4, atol=1e-6)
    assert any(not torch.equal(t, base[n]) for n, t in exported[1].items() if n in base)


def test_checkpoints_serve_both_and_export_the_whole_model(tmp_path: Path) -> None:
    """`dsfreeze export RUN` holds the whole model; what it writes is what the run itself exports."""
    recipe = evicted(recipe_of(tmp_path))
    _, stepper = losses(recipe)
    job = stepper.job
    writer = CheckpointWriter(job)
    writer.save(stepper.engine, 4, {"num_steps": 8, "global_batch_size": 4})
    writer.wait()
    (job.output_dir / RECIPE).write_text(recipe.model_dump_json(exclude_unset=True))
    exported = tensors_of(export_folder(job.output_dir, tmp_path / "out", delta=False, base=None))
    own = tensors_of(save_model(stepper.engine, job, {}))
    assert exported.keys() == own.keys()
    assert all(torch.equal(t, own[n]) for n, t in exported.items())
    delta = export_folder(job.output_dir, tmp_path / "delta", delta=True, base=None)
    again = tensors_of(export_folder(delta, tmp_path / "again", delta=False, base=str(tmp_path / "model")))
    assert all(torch.equal(t, own[n]) for n, t in again.items())


def test_bf16_and_a_head_alone(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, freeze={"strategy": "head", "fraction": None}, train={"bf16": True})
    wanted, _ = losses(recipe)
    found, stepper = losses(evicted(recipe))
    assert stepper.job.eviction is not None
    assert stepper.job.eviction.cut == 4
    assert found == pytest.approx(
        wanted, rel=0.02
    )  # states of a batch with other padding differ by a rounding in 16 bits
    assert {n for n, _ in stepper.job.module.named_parameters()} == {"model.norm.weight", "score.weight"}


def test_the_cut_is_the_lowest_of_all_phases(tmp_path: Path) -> None:
    """A frozen layer above it is held; the second phase trains it."""
    ranges = {"embed": [0, -1], "layers.0": [0, -1], "layers.1": 4, "layers.2": 4}
    recipe = changed(recipe_of(tmp_path), freeze={"strategy": "step_ranges", "step_ranges": ranges, "fraction": None})
    wanted, _ = losses(recipe)
    found, stepper = losses(evicted(recipe))
    assert stepper.job.eviction is not None
    assert stepper.job.eviction.cut == 1
    assert found == pytest.approx(wanted, rel=1e-6)
    stepper.engine.enter(stepper.job.plan.phases[1])
    assert stepper.step(5) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": {"strategy": "full"}}, "'full' leaves no layer frozen .* bottom, head, budget"),
        ({"freeze": {"strategy": "lisa"}}, "'lisa' leaves no layer frozen"),
        ({"freeze": {"strategy": "autofreeze"}}, "'autofreeze' decides on the way what trains"),
        ({"model": {"trust_remote_code": True}}, "code of its own"),
    ],
)
def test_what_needs_the_prefix_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = evicted(recipe_of(tmp_path)).model_dump(mode="json", exclude_unset=True)
    del values["freeze"]["fraction"]
    model = {**values.pop("model"), **changes.get("model", {})}
    freeze = {**values.pop("freeze"), **changes.get("freeze", {})}
    with pytest.raises(UserError, match=message):
        prepare_job(Recipe.model_validate({**values, "model": model, "freeze": freeze}))


def test_packing_and_generation_are_refused(tmp_path: Path) -> None:
    recipe = evicted(recipe_of(tmp_path))
    packed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": True})})
    with pytest.raises(UserError, match=r"packed examples \(data.packing\)"):
        prepare_job(packed)
    job = prepare_job(recipe)
    rest = (outline_of(recipe.model, "classification", 3), job.plain, job.plan)
    with pytest.raises(UserError, match=r"one of the metrics \(rouge\) generates text"):
        refuse_metrics(replace(job.data, metrics=("rouge",)))
    assert evict(*rest) == job.eviction


def test_filling_alone_is_refused_in_its_own_words(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    refuse_early(recipe.model_copy(update={"data": recipe.data.model_copy(update={"packing": True})}), CACHE)
    outline = outline_of(recipe.model, "classification", 3)
    t5 = outline_of(ModelOptions(name=str(t5_folder(tmp_path / "t5"))), "seq2seq", None)
    job = prepare_evicted(recipe, asked=CACHE)
    assert job.eviction is not None
    assert job.eviction.asked is CACHE
    adaptive = prepare_job(changed(recipe, freeze={"strategy": "autofreeze", "fraction": None, "switch_every": 2})).plan
    for refused in (
        lambda: evict(t5, read_anatomy(t5, "x"), job.plan, CACHE),
        lambda: evict(outline, job.plain, adaptive, CACHE),
        lambda: prepare_evicted(changed(recipe, model={"trust_remote_code": True}), asked=CACHE),
        lambda: prepare_evicted(changed(recipe, freeze={"strategy": "full", "fraction": None}), asked=CACHE),
    ):
        with pytest.raises(UserError, match="dsfreeze cache") as told:
            refused()
        assert "evict_prefix" not in str(told.value)


def test_a_store_that_may_not_be_written_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    recipe = evicted(recipe_of(tmp_path))
    job = prepare_job(recipe)
    rows, folder = rows_of(job), tmp_path / "store"
    computes = job.read_part
    job.read_part = lambda kept: pytest.fail("it computes")  # type: ignore[method-assign]
    reading = DiskStore(folder, 32, CODECS["fp32"], "b", may_write=False)
    with pytest.raises(
        UserError, match=r"lacks 62 examples, and this run may not write it.*write freeze\.evict_prefix: f"
    ):
        prefill(job, rows, reading, shelf)
    failed = shelf()
    failed.failure = "The disk is gone."
    with pytest.raises(UserError, match=r"cannot be filled: The disk is gone\. Free space there"):
        prefill(job, rows, failed, shelf)
    job.read_part = computes  # type: ignore[method-assign]
    assert prefill(job, rows, DiskStore(folder, 32, CODECS["fp32"], "a", may_write=True), shelf).examples == 62
    assert prefill(job, rows, reading, shelf).examples == 0  # what lacks nothing need not be written


def test_two_stacks_are_refused(tmp_path: Path) -> None:
    recipe = evicted(recipe_of(tmp_path))
    job = prepare_job(recipe)
    outline = outline_of(ModelOptions(name=str(t5_folder(tmp_path / "t5"))), "seq2seq", None)
    with pytest.raises(UserError, match="one stack of layers, and x has two"):
        evict(outline, read_anatomy(outline, "x"), job.plan)
