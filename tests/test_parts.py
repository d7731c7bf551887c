"""Reading a part of a model. The oracle is the whole load: what is kept is its tensor to the last bit, under its name, and a fresh
head is the one that the whole load draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPECTED
from safetensors.torch import load_file, save_file
from tiny_runs import byte_tokenizer, llama_folder
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from dsfreeze.errors import UserError
from dsfreeze.model import base_hash, load_model, outline_of, read_anatomy
from dsfreeze.recipe import ModelOptions

SINGLE_STACK = [name for name in EXPECTED if name != "t5"]


def saved(folder: Path, name: str, kind: Any = None) -> Path:
    """The architecture with random weights and a byte tokenizer: as a causal LM, an encoder as the base alone (`kind` for others)."""
    expected = EXPECTED[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        encoder = name in ("bert", "roberta", "deberta-v2", "modernbert")
        model = (kind or AutoModel).from_config(expected.config) if kind or encoder else expected.build("cpu")
        for parameter in model.parameters():  # biases and norms are told apart too
            parameter.data += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def load(folder: Path, kept: set[str] | None = None, task: str = "classification", **options: Any) -> PreTrainedModel:
    return load_model(ModelOptions(name=str(folder)), task, 3, seed=5, kept=kept, **options)


def upper(whole: nn.Module, cut: int = 2) -> set[str]:
    """Everything but the layers below `cut` and the token embedding, unless that is tied."""
    anatomy = read_anatomy(whole, "")
    lower = {t.name for layer in anatomy.blocks[:cut] for t in layer.tensors}
    embedding = whole.get_input_embeddings().weight
    lower |= {n for n, p in whole.named_parameters() if p is embedding and not anatomy.by_name[n].aliases}
    return {t.name for t in anatomy.tensors} - lower


@pytest.mark.parametrize("name", SINGLE_STACK)
def test_a_part_is_the_whole_loads_in_every_bit(tmp_path: Path, name: str) -> None:
    """A checkpoint without the task's head, an encoder's without the task's prefix in its names: the head is fresh in both loads."""
    folder = saved(tmp_path, name)
    whole = load(folder)
    kept = upper(whole)
    part = load(folder, kept)
    wanted = {n: p for n, p in whole.named_parameters() if n in kept}
    found = dict(part.named_parameters())
    assert list(found) == list(wanted)
    assert all(torch.equal(found[n], p) for n, p in wanted.items())
    assert type(part) is type(whole)
    assert "not held" in repr(part)
    assert part.has_fresh_head
    assert whole.has_fresh_head
    assert [n for n, _ in part.named_modules()] == [n for n, _ in whole.named_modules()]
    named = dict(whole.named_buffers())
    assert all(torch.equal(b, named[n]) for n, b in part.named_buffers())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "falcon"])
def test_a_tied_head_stays_tied(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    whole = load(folder, task="causal_lm")
    part = load(folder, upper(whole), task="causal_lm")
    tied = whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    assert tied == (name != "llama")
    assert torch.equal(part.get_output_embeddings().weight, whole.get_output_embeddings().weight)
    assert part.get_input_embeddings().weight is (part.get_output_embeddings().weight if tied else None)


@pytest.mark.parametrize("name", SINGLE_STACK)
def test_a_part_of_one_layer_needs_no_head(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name)
    whole = load(folder)
    layer = read_anatomy(whole, "").blocks[1]
    part = load(folder, {t.name for t in layer.tensors})
    wanted = dict(whole.named_parameters())
    assert [n for n, _ in part.named_parameters()] == [t.name for t in layer.tensors]
    assert all(torch.equal(p, wanted[n]) for n, p in part.named_parameters())


def test_a_head_that_the_checkpoint_has_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, "bert", AutoModelForSequenceClassification)
    options = ModelOptions(name=str(folder))
    whole = load_model(options, "classification", 2)
    part = load_model(options, "classification", 2, kept=upper(whole))
    assert not part.has_fresh_head
    assert torch.equal(part.classifier.weight, whole.classifier.weight)


def test_nothing_else_is_read_from_the_disk(tmp_path: Path) -> None:
    """Bytes that would change any tensor of the prefix change nothing; the next load is a whole one again."""
    folder = llama_folder(tmp_path)
    whole = load(folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    save_file({n: torch.full_like(t, torch.nan) if ".layers.0." in n else t for n, t in tensors.items()}, file)
    part = load(folder, upper(whole))
    assert all(p.isfinite().all() for p in part.parameters())
    assert load(folder).model.layers[0].mlp.up_proj.weight.isnan().all()
    assert base_hash(load(folder)) != base_hash(whole)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "one")
    load(folder, task="causal_lm").save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    byte_tokenizer().save_pretrained(tmp_path / "many")
    whole = load(folder)
    part = dict(load(tmp_path / "many", upper(whole)).named_parameters())
    assert part.keys() == upper(whole)
    assert all(torch.equal(p, part[n]) for n, p in whole.named_parameters() if n in part)


def test_what_a_part_lacks_is_an_error(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path)
    whole = load(folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"lacks weights \(model.layers.3.mlp.up_proj.weight\)"):
        load(folder, upper(whole))


@pytest.mark.parametrize("name", SINGLE_STACK)
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_the_outline_has_the_anatomy_of_what_is_loaded(tmp_path: Path, name: str, task: str) -> None:
    folder = saved(tmp_path, name)
    if task == "causal_lm" and name in ("bert", "roberta", "deberta-v2", "modernbert"):
        pytest.skip("an encoder")
    options = ModelOptions(name=str(folder))
    outline, whole = outline_of(options, task, 3), load(folder, task=task)
    assert read_anatomy(outline, "x") == read_anatomy(whole, "x")
    assert [n for n, _ in outline.named_parameters()] == [n for n, _ in whole.named_parameters()]
    assert all(p.is_meta for p in outline.parameters())
