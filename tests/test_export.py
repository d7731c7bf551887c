"""Exported models: plain transformers loads them, bit for bit what was trained; deltas find their way back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from architectures import EXPECTED
from safetensors.torch import load_file
from tiny_runs import byte_tokenizer, llama_folder, tiny_recipe
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from dsfreeze.checkpoint import Base
from dsfreeze.errors import UserError
from dsfreeze.export import export_delta, export_model, fill_delta, require_writable
from dsfreeze.job import prepare_job
from dsfreeze.loop import train
from dsfreeze.model import add_adapters, base_hash, load_model, load_tokenizer, merge_adapters, read_anatomy
from dsfreeze.plan import Adapter, FreezePlan, Phase
from dsfreeze.recipe import ModelOptions, Recipe

STORIES = Path(__file__).parents[1] / "../shared/weights/stories260K"
TEXT = "Once upon a time, there was a little girl named Lily."


class Trained:
    """A module that a run is supposed to have changed, with what an export wants to know."""

    def __init__(self, folder: Path, task: str = "classification", kind: str | None = None, bf16: bool = False) -> None:
        self.options = ModelOptions(name=str(folder))
        self.recipe = Recipe.model_validate({"model": str(folder), "task": task, "train": {"bf16": bf16, "seed": 7}})
        dtype = torch.bfloat16 if bf16 else torch.float32
        labels = ["no", "perhaps", "yes"] if task == "classification" else None
        self.module = load_model(self.options, task, 3 if labels else None, labels=labels, dtype=dtype, seed=7)
        self.tokenizer = load_tokenizer(self.options)
        anatomy = read_anatomy(self.module, str(folder))
        self.base = Base(str(folder), base_hash(self.module), anatomy.digest)
        self.plan = self._plan(anatomy, kind)
        self.train()

    def _plan(self, anatomy, kind: str | None) -> FreezePlan:
        block = anatomy.blocks[-1].tensors
        head = tuple(t.name for layer in anatomy.layers if layer.name == "head" for t in layer.tensors)
        if kind is None:
            return FreezePlan("top", (Phase(0, None, (*(t.name for t in block), *head)),))
        adapter = Adapter(kind, 4, 8.0, 0.0, tuple(t.name for t in block if t.category in ("q", "down")))
        add_adapters(self.module, adapter, seed=1)
        adapted = anatomy.with_adapters(adapter.targets, 4, kind == "dora")
        names = tuple(t.name for t in adapted.tensors if t.category == "adapter")
        return FreezePlan(kind, (Phase(0, None, (*names, *head)),), adapter)

    def train(self) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in sorted(self.plan.ever_trained):
                parameter = self.module.get_parameter(name)
                parameter += (0.05 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: self.module.get_parameter(name).detach().clone() for name in self.plan.ever_trained}

    def export(self, folder: Path, weights: dict[str, torch.Tensor] | None = None, **metrics: float) -> Path:
        return export_model(
            folder, self.module, self.tokenizer, weights=weights, plan=self.plan, recipe=self.recipe, metrics=metrics
        )

    def delta(self, folder: Path) -> Path:
        return export_delta(
            folder, self.weights(), module=self.module, plan=self.plan, recipe=self.recipe, base=self.base
        )


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "llama", layers=2)


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(torch.arange(2, 34).reshape(2, 16)).logits


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_plain_transformers_computes_the_same_logits(llama: Path, tmp_path: Path, kind: str | None, bf16: bool) -> None:
    """Oracle: the live module, its adapters merged in place; equal bit for bit. The export leaves it as it was."""
    trained = Trained(llama, kind=kind, bf16=bf16)
    before = state(trained.module)
    folder = trained.export(tmp_path / "model")
    assert_same(state(trained.module), before)
    unmerged = logits(trained.module)
    merge_adapters(trained.module)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), logits(trained.module))
    torch.testing.assert_close(logits(loaded), unmerged, rtol=0.05 if bf16 else 1e-4, atol=0.1 if bf16 else 1e-5)
    assert loaded.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    assert loaded.config.use_cache
    assert loaded.dtype == trained.module.dtype
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == trained.tokenizer("abc").input_ids


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the folder `shared` beside the repository")
def test_a_language_model_scores_the_same_loss_there(tmp_path: Path) -> None:
    """Oracle: the loss before the export; real weights, tied head, grouped-query attention."""
    trained = Trained(STORIES, task="causal_lm")
    ids = trained.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = trained.module.eval()(input_ids=ids, labels=ids).loss
        folder = trained.export(tmp_path / "model")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert loaded(input_ids=ids, labels=ids).loss == before
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral", "bert", "gemma", "modernbert", "opt"])
def test_other_architectures_come_back_whole(tmp_path: Path, name: str) -> None:
    """Oracle: the state before the export; ties, fused experts and Conv1D included."""
    module = EXPECTED[name].build("cpu")
    anatomy = read_anatomy(module, name)
    plan = FreezePlan("full", (Phase(0, None, tuple(t.name for t in anatomy.tensors)),))
    before = state(module)
    folder = export_model(
        tmp_path / "model", module, byte_tokenizer(), weights=None, plan=plan, recipe=Recipe(model=name), metrics={}
    )
    assert_same(state(type(module).from_pretrained(folder)), before)


def test_given_weights_take_the_place_of_a_sharded_modules(llama: Path, tmp_path: Path) -> None:
    """Oracle: ZeRO-3 leaves placeholders of no elements in the module; the full tensors come as `weights`."""
    trained = Trained(llama, kind="lora")
    full = {n: p.detach().clone() for n, p in trained.module.named_parameters()}
    expected = copy.deepcopy(trained.module)
    merge_adapters(expected)
    for parameter in trained.module.parameters():
        parameter.data = torch.empty(0)
    folder = trained.export(tmp_path / "model", weights=full)
    assert_same(state(AutoModelForSequenceClassification.from_pretrained(folder)), state(expected))
    with pytest.raises(AssertionError, match="full tensors"):
        trained.export(tmp_path / "other")


def test_some_weights_are_laid_over_the_modules_own(llama: Path, tmp_path: Path) -> None:
    """Oracle: a checkpoint holds the trained tensors alone; the rest is the base model's."""
    trained = Trained(llama)
    expected = state(trained.module)
    fresh = Trained.__new__(Trained)
    fresh.__dict__ |= trained.__dict__
    fresh.module = load_model(
        trained.options, "classification", 3, labels=["no", "perhaps", "yes"], dtype=torch.float32, seed=7
    )
    folder = fresh.export(tmp_path / "model", weights=trained.weights())
    assert_same(state(AutoModelForSequenceClassification.from_pretrained(folder)), expected)


def test_weights_of_another_model_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    trained = Trained(llama)
    strange = {"model.layers.7.mlp.up_proj.weight": torch.zeros(1)}
    with pytest.raises(
        UserError, match=r"hold 'model\.layers\.7\.mlp\.up_proj\.weight'.*LlamaForSequenceClassification lacks"
    ):
        trained.export(tmp_path / "model", weights=trained.weights() | strange)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("task", "tied"), [("causal_lm", True), ("causal_lm", False), ("classification", True)])
def test_an_export_is_no_larger_than_what_transformers_writes(tmp_path: Path, task: str, tied: bool) -> None:
    """Oracle: `save_pretrained` of the same module, file sizes and names of tensors; what is tied is stored once."""
    trained = Trained(llama_folder(tmp_path / "llama", layers=2, tied=tied), task=task)
    theirs, mine = tmp_path / "theirs", trained.export(tmp_path / "model")
    trained.module.save_pretrained(theirs)
    stored = load_file(mine / "model.safetensors")
    assert stored.keys() == load_file(theirs / "model.safetensors").keys()
    assert (mine / "model.safetensors").stat().st_size == (theirs / "model.safetensors").stat().st_size
    assert ("lm_head.weight" in stored) == (task == "causal_lm" and not tied)


def test_a_checkpoint_holds_what_trained_and_no_more(tmp_path: Path) -> None:
    """DeepSpeed #3948: the whole model in every checkpoint of a mostly frozen one. Oracle: the plan, and bytes counted."""
    recipe = tiny_recipe(tmp_path, train={"save_strategy": "steps", "max_steps": 1, "export": False})
    trained = dict(prepare_job(recipe).module.named_parameters())
    plan = FreezePlan.from_json((Path(train(recipe)["record"]) / "plan.json").read_text())
    weights = tmp_path / "run" / "checkpoint-1" / "weights.safetensors"
    assert load_file(weights).keys() == plan.ever_trained
    numbers = sum(4 * trained[name].numel() for name in plan.ever_trained)
    assert numbers < weights.stat().st_size < 1.1 * numbers
    assert plan.ever_trained < trained.keys()


def test_sampling_options_that_transformers_would_not_write(tmp_path: Path) -> None:
    """Some published models set a temperature without do_sample; transformers loads that and refuses to save it."""
    trained = Trained(llama_folder(tmp_path / "llama", layers=2), task="causal_lm")
    trained.module.generation_config.temperature = 0.6
    loaded = AutoModelForCausalLM.from_pretrained(trained.export(tmp_path / "model"))
    assert (loaded.generation_config.do_sample, loaded.generation_config.temperature) == (True, 0.6)


def test_the_card_has_plan_and_figures_and_no_paths(llama: Path, tmp_path: Path) -> None:
    folder = Trained(llama, kind="dora").export(tmp_path / "model", accuracy=0.8125)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert "DoRA adapters (r 4, alpha 8) on 2 matrices" in card
    assert "| 0 .. end | " in card
    assert "layers.1*, head |" in card
    assert "| accuracy | 0.8125 |" in card
    assert FreezePlan.from_json((folder / "dsfreeze_plan.json").read_text()).strategy == "dora"
    for file in folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


# -- folders -----------------------------------------------------------------------------------------------------------


def test_only_folders_of_ours_are_replaced(llama: Path, tmp_path: Path) -> None:
    trained = Trained(llama)
    for write in (trained.export, require_writable):
        with pytest.raises(UserError, match="was not written by an export"):
            write(llama)
    assert AutoConfig.from_pretrained(llama).num_hidden_layers == 2
    folder = trained.export(tmp_path / "model")
    (folder / "stale").touch()
    require_writable(folder)
    trained.export(folder)
    assert not (folder / "stale").exists()
    require_writable(tmp_path / "not-there")


def test_a_full_disk_leaves_the_earlier_export(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(llama)
    folder = trained.export(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(self: object, place: Path, **_: object) -> None:
        (Path(place) / "half").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trained.tokenizer), "save_pretrained", full)
    with pytest.raises(UserError, match=r"Could not write .*model: .*No space left.*Free disk space"):
        trained.export(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "model"]


# -- deltas ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [None, "lora", "dora"])
def test_a_delta_filled_in_is_the_export(llama: Path, tmp_path: Path, kind: str | None, bf16: bool) -> None:
    """Oracle: the whole export of the same module, file for file; the delta holds the trained tensors alone."""
    trained = Trained(llama, kind=kind, bf16=bf16)
    whole, delta = trained.export(tmp_path / "whole"), trained.delta(tmp_path / "delta")
    assert load_file(delta / "delta.safetensors").keys() == trained.plan.ever_trained
    filled = fill_delta(delta, trained.options, tmp_path / "filled")
    assert {p.name: p.read_bytes() for p in filled.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_a_delta_refuses_another_base(llama: Path, tmp_path: Path) -> None:
    delta = Trained(llama).delta(tmp_path / "delta")
    other = llama_folder(tmp_path / "other", layers=2, seed=1)
    with pytest.raises(UserError, match=r"trained from 'llama' \(\w{12}\), and '.*other' \(\w{12}\) has other weights"):
        fill_delta(delta, ModelOptions(name=str(other)), tmp_path / "filled")
    assert not (tmp_path / "filled").exists()


def test_a_damaged_delta_is_refused(llama: Path, tmp_path: Path) -> None:
    trained = Trained(llama)
    delta = trained.delta(tmp_path / "delta")
    weights = delta / "delta.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"delta\.safetensors is missing, truncated or changed"):
        fill_delta(delta, trained.options, tmp_path / "filled")
    manifest = json.loads((delta / "delta.json").read_text())
    (delta / "delta.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(UserError, match="format 99"):
        fill_delta(delta, trained.options, tmp_path / "filled")
    with pytest.raises(UserError, match="is no delta"):
        fill_delta(llama, trained.options, tmp_path / "filled")
