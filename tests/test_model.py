"""Loading by name or folder, heads and adapters: what is loaded, what is drawn, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from architectures import EXPECTED
from safetensors.torch import load_file, save_file
from tiny_runs import byte_tokenizer, llama_folder, t5_folder
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from dsfreeze.errors import UserError
from dsfreeze.model import (
    add_adapters,
    anatomy_of,
    base_hash,
    load_model,
    load_tokenizer,
    merge_adapters,
    read_anatomy,
)
from dsfreeze.plan import Adapter
from dsfreeze.recipe import ModelOptions

STORIES = Path(__file__).parents[1] / "../shared/weights/stories260K"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return llama_folder(tmp_path / "llama", layers=2)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = BertConfig(
        vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    byte_tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def load(folder: Path, task: str = "classification", num_labels: int | None = 3, seed: int = 1, **options) -> nn.Module:
    return load_model(ModelOptions(name=str(folder), **options), task, num_labels, dtype=torch.float32, seed=seed)


def head(module: nn.Module) -> torch.Tensor:
    return (module.score if hasattr(module, "score") else module.classifier).weight


# -- modules -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["classification", "tokens", "causal_lm", "sft", "preference"])
@pytest.mark.filterwarnings("error")
def test_weights_are_the_folders_own(llama: Path, task: str) -> None:
    """Oracle: the safetensors file; everything but a fresh head is in it, bit for bit, and nothing is warned about."""
    module = load(llama, task)
    stored = load_file(llama / "model.safetensors")
    drawn = [n for n, p in module.named_parameters() if n not in stored or not torch.equal(p, stored[n])]
    assert [n for n in drawn if not n.startswith("score.")] == []
    assert bool(drawn) == (task in ("classification", "tokens"))
    assert module.config.use_cache is False


def test_seq2seq_loads_both_stacks(tmp_path: Path) -> None:
    module = load(t5_folder(tmp_path / "t5"), "seq2seq", None)
    assert [b.stack for b in read_anatomy(module, "t5").blocks] == ["encoder", "encoder", "decoder", "decoder"]


def test_a_fresh_head_depends_on_the_seed_alone(llama: Path) -> None:
    """Oracle: equality bit for bit; the global generator is where it was."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = head(load(llama, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert torch.equal(head(load(llama, seed=1)), first)
    assert not torch.equal(head(load(llama, seed=2)), first)


def test_labels_and_problem_type(llama: Path, bert: Path) -> None:
    options = ModelOptions(name=str(bert))
    module = load_model(options, "classification", 2, labels=["no", "yes"], dtype=torch.float32, seed=0)
    assert module.config.id2label == {0: "no", 1: "yes"}
    assert module.config.label2id == {"no": 0, "yes": 1}
    assert module.config.problem_type == "single_label_classification"
    regression = load(llama, num_labels=1)
    assert regression.config.problem_type == "regression"
    assert head(regression).shape == (1, 32)


def test_bf16_reaches_every_parameter(llama: Path) -> None:
    module = load_model(ModelOptions(name=str(llama)), "classification", 3, dtype=torch.bfloat16, seed=0)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("probability", [0.0, 0.25])
def test_dropout_overrides_every_probability(tmp_path: Path, bert: Path, probability: float) -> None:
    """Oracle: the `p` of every nn.Dropout, and T5's rate."""
    module = load(bert, dropout=probability)
    assert {m.p for m in module.modules() if isinstance(m, nn.Dropout)} == {probability}
    assert module.config.classifier_dropout == probability
    t5 = load(t5_folder(tmp_path / "t5"), "seq2seq", None, dropout=probability)
    assert t5.config.dropout_rate == probability
    assert {m.p for m in t5.modules() if isinstance(m, nn.Dropout)} == {probability}
    EXPECTED["gpt2"].build("cpu").save_pretrained(tmp_path / "gpt2")
    gpt2 = load(tmp_path / "gpt2", "causal_lm", None, dropout=probability)
    assert {m.p for m in gpt2.modules() if isinstance(m, nn.Dropout)} == {probability}


def test_pad_token_is_the_tokenizers(tmp_path: Path) -> None:
    """Oracle: LlamaForSequenceClassification reads the last token that is not config.pad_token_id: they must agree."""
    folder = llama_folder(tmp_path / "m", layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": None}))
    module, tokenizer = load(folder), load_tokenizer(ModelOptions(name=str(folder)))
    assert module.config.pad_token_id == tokenizer.pad_token_id == 0
    alone = module(**tokenizer("abc", return_tensors="pt", return_token_type_ids=False)).logits
    padded = module(
        **tokenizer(["abc", "abcdefgh"], padding=True, return_tensors="pt", return_token_type_ids=False)
    ).logits
    torch.testing.assert_close(padded[:1], alone)


def test_tokenizer_pads_right_with_the_end_token_if_it_must(tmp_path: Path, llama: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shutil.copy(llama / "config.json", tmp_path / "tokenizer")
    loaded = load_tokenizer(ModelOptions(name=str(tmp_path / "tokenizer")))
    assert (loaded.padding_side, loaded.pad_token) == ("right", "</s>")


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs the folder `shared` beside the repository")
def test_real_weights_speak() -> None:
    """Oracle: TinyStories' own opening is far likelier under the model than chance (ln 512 = 6.2)."""
    module, tokenizer = load(STORIES, "causal_lm", None), load_tokenizer(ModelOptions(name=str(STORIES)))
    ids = tokenizer("Once upon a time, there was a little girl named Lily.", return_tensors="pt").input_ids
    assert module(input_ids=ids, labels=ids).loss < 2.0


@pytest.mark.parametrize("task", ["classification", "tokens", "causal_lm"])
def test_anatomy_of_needs_no_weights(llama: Path, task: str) -> None:
    """Oracle: the loaded module's anatomy; the weights are gone when it is asked for again."""
    options = ModelOptions(name=str(llama))
    loaded = read_anatomy(load(llama, task), options.name)
    (llama / "model.safetensors").unlink()
    assert anatomy_of(options, task, 3) == loaded


# -- warnings ----------------------------------------------------------------------------------------------------------


def test_missing_and_unused_weights_are_warned_about(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(llama)
    texts = [str(w.message) for w in caught]
    assert any("drawn at random: model.layers.1.mlp.up_proj.weight." in t for t in texts)
    assert any("does not use: model.layers.1.mlp.extra.weight." in t for t in texts)


def test_code_of_a_repository_is_warned_about(llama: Path) -> None:
    with pytest.warns(UserWarning, match="trust_remote_code is on"):
        load(llama, trust_remote_code=True)


@pytest.mark.filterwarnings("error")
def test_a_head_for_other_labels_gives_way_to_a_fresh_one(tmp_path: Path, llama: Path) -> None:
    load(llama, num_labels=5).save_pretrained(tmp_path / "five")
    module = load(tmp_path / "five", num_labels=3)
    assert head(module).shape == (3, 32)
    assert torch.equal(module.model.embed_tokens.weight, load(llama).model.embed_tokens.weight)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", r"No model 'smolm2-135m'.*Did you mean 'smollm2-135m'"),
        ("nobody/nothing", r"No model 'nobody/nothing': .*hub id"),
        ("two words", r"No model 'two words'"),
        ("./nowhere", r"'\./nowhere' does not exist"),
        ("nowhere.gguf", r"'nowhere.gguf' does not exist"),
        ("llama-2-7b", r"shape to plan with.*meta-llama/Llama-2-7b-hf"),
    ],
)
def test_an_unknown_model_is_named_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_model(ModelOptions(name=name), "classification", 2, dtype=torch.float32, seed=0)


def test_a_folder_without_config_or_a_plain_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        load(tmp_path)
    (tmp_path / "file.bin").touch()
    with pytest.raises(UserError, match="is a file"):
        load(tmp_path / "file.bin")
    (tmp_path / "config.json").write_text('{"model_type": "nonesuch"}')
    with pytest.raises(UserError, match=r"config\.json cannot be used"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_safetensors_is_named(llama: Path, keep: float) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match=rf"{file} is truncated or corrupt"):
        load(llama)


def test_weights_that_do_not_fit_the_config_are_refused(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 80}))
    with pytest.raises(UserError, match=r"do not fit its config\.json: model\.layers\.0\.mlp"):
        load(llama)


def test_weights_of_another_architecture_are_refused(llama: Path, bert: Path) -> None:
    shutil.copy(llama / "model.safetensors", bert)
    with pytest.raises(UserError, match="fit no layer of BertForSequenceClassification"):
        load(bert)


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def test_pickled_weights_are_not_read(llama: Path) -> None:
    """Oracle: a pickle that would leave a file behind when loaded."""
    (llama / "model.safetensors").unlink()
    (llama / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(llama / "trace")))
    with pytest.raises(UserError, match="no safetensors file, and dsfreeze reads no pickled weights"):
        load(llama)
    assert not (llama / "trace").exists()


@pytest.mark.parametrize(("kind", "task"), [("llama", "seq2seq"), ("bert", "sft"), ("bert", "seq2seq"), ("t5", "sft")])
def test_a_task_the_model_cannot_do_is_refused(request, tmp_path: Path, kind: str, task: str) -> None:
    folder = t5_folder(tmp_path / "t5") if kind == "t5" else request.getfixturevalue(kind)
    with pytest.raises(UserError, match=rf"\({kind}\) cannot do task '{task}'. Its tasks: classification, tokens"):
        load(folder, task, None)


def test_an_unknown_attention_is_refused(llama: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load(llama, attn_implementation="nonesuch")


# -- hashes ------------------------------------------------------------------------------------------------------------


def test_base_hash_sees_a_single_bit(llama: Path) -> None:
    module = load(llama)
    first, folder_hash = base_hash(module), base_hash(llama)
    assert base_hash(load(llama)) == first
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight.view(torch.int32)[0, 0] ^= 1
    assert base_hash(module) != first
    data = bytearray((llama / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (llama / "model.safetensors").write_bytes(data)
    assert base_hash(llama) != folder_hash
    with pytest.raises(UserError, match="no safetensors"):
        base_hash(llama.parent)


# -- adapters ----------------------------------------------------------------------------------------------------------


def deep_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=12, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_start_as_nothing_and_come_from_the_seed(kind: str) -> None:
    """Oracle: with B = 0 the module computes what it did; A is the same for a seed wherever the generator stands."""
    ids = torch.arange(8)[None]
    targets = ("model.layers.1.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight")
    states = []
    for position in (0, 1):
        module = deep_llama()
        plain = module(ids).logits
        torch.manual_seed(position)
        before = torch.get_rng_state()
        add_adapters(module, Adapter(kind, 4, 8.0, 0.0, targets), seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        assert type(module) is LlamaForCausalLM
        torch.testing.assert_close(module.eval()(ids).logits, plain)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_adapters_sit_on_whole_paths_only() -> None:
    """Oracle: the target's name; layers.1 is not layers.11, nor is a longer path that ends alike."""
    module = deep_llama()
    module.model.up = nn.ModuleDict({"model": nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})})
    module.layers = nn.ModuleList([nn.Linear(2, 2)])
    targets = ("model.layers.1.mlp.up_proj.weight", "layers.0.weight")
    add_adapters(module, Adapter("lora", 2, 2.0, 0.0, targets), seed=0)
    adapted = {n.split(".lora_")[0] for n, _ in module.named_parameters() if "lora_" in n}
    assert adapted == {"model.layers.1.mlp.up_proj", "layers.0"}


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_merging_gives_the_base_model_with_the_update_in(name: str) -> None:
    """Oracle: W + alpha / r * B A, by hand, in the storage order of the matrix."""
    module = EXPECTED[name].build("cpu").eval()
    anatomy = read_anatomy(module, name)
    target = next(t for t in anatomy.blocks[1].tensors if t.category == "up")
    weight = module.get_parameter(target.name).clone()
    add_adapters(module, Adapter("lora", 4, 6.0, 0.0, (target.name,)), seed=0)
    wrapped = module.get_submodule(target.module)
    with torch.no_grad():
        wrapped.lora_B["default"].weight.normal_()
        update = 6.0 / 4 * wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight
    merge_adapters(module)
    assert read_anatomy(module, name) == anatomy
    expected = weight + (update.T if target.fan_in_fan_out else update)
    torch.testing.assert_close(module.get_parameter(target.name), expected)


def test_adapters_take_the_dtype_of_their_matrix() -> None:
    module = deep_llama().to(torch.bfloat16)
    add_adapters(module, Adapter("dora", 2, 2.0, 0.0, ("model.layers.1.mlp.up_proj.weight",)), seed=0)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


def test_sequence_classifiers_of_decoders_are_the_class_we_say(llama: Path) -> None:
    assert isinstance(load(llama), LlamaForSequenceClassification)
