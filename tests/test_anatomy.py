"""The anatomy: as read from modules on the meta device, as shipped, for a task, and with adapters."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from architectures import EXPECTED, LAYERS, VOCAB, D
from marks import some_fast
from public_models import PUBLIC, meta_module
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma3Config,
    Qwen3MoeConfig,
    T5Config,
)

from dsfreeze.adapters import add_adapters
from dsfreeze.anatomy import Anatomy, load_shipped, shipped
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import Adapter


def categories(anatomy: Anatomy, layer: str) -> Counter:
    return Counter(t.category for row in anatomy.layers if row.name == layer for t in row.tensors)


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.filterwarnings("error")
def test_architectures_are_read_as_the_table_says(name: str) -> None:
    """Oracle: `named_parameters` for what there is, the config for the depth, a handwritten table for categories."""
    expected = EXPECTED[name]
    module = expected.build()
    anatomy = read_anatomy(module, name)
    shapes = {n: tuple(p.shape) for n, p in module.named_parameters()}
    assert [t.name for t in anatomy.tensors] == list(dict.fromkeys(t.name for t in anatomy.tensors))
    assert {t.name: t.shape for t in anatomy.tensors} == shapes
    assert len(anatomy.blocks) == expected.blocks
    assert categories(anatomy, anatomy.blocks[-1].name) == Counter(expected.block.split())
    for layer in ("embed", "norm", "head"):
        assert categories(anatomy, layer) == Counter(getattr(expected, layer).split()), layer
    tied = {alias for t in anatomy.tied for alias in t.aliases}
    assert {n for n, _ in module.named_parameters(remove_duplicate=False)} - set(shapes) == tied
    assert (expected.tied in tied) if expected.tied else not tied
    assert (anatomy.hidden_size, anatomy.attention_width, anatomy.vocab_size) == (D, D, VOCAB)
    assert not anatomy.structural
    assert Anatomy.from_json(anatomy.to_json()) == anatomy


@pytest.mark.parametrize("name", EXPECTED)
def test_every_block_lies_under_its_path(name: str) -> None:
    """Oracle: `get_submodule` finds a module at each block's path, and its parameters are the block's."""
    module = EXPECTED[name].build()
    anatomy = read_anatomy(module, name)
    for block in anatomy.blocks:
        own = {f"{block.path}.{n}" for n, _ in module.get_submodule(block.path).named_parameters()}
        rest = {t.name for t in block.tensors} - own
        assert own <= {t.name for t in block.tensors}
        assert rest <= {"encoder.final_layer_norm.weight"}


def test_encoder_decoder_is_two_stacks_in_one_count() -> None:
    """Oracle: T5's modules; the encoder's final norm and position bias are in blocks, the decoder's norm is `norm`."""
    anatomy = read_anatomy(EXPECTED["t5"].build(), "t5")
    assert [b.stack for b in anatomy.blocks] == ["encoder"] * LAYERS + ["decoder"] * 2
    assert [b.path for b in anatomy.blocks][LAYERS] == "decoder.block.0"
    assert anatomy.layer_of["encoder.final_layer_norm.weight"].name == f"layers.{LAYERS - 1}"
    assert anatomy.layer_of["decoder.final_layer_norm.weight"].name == "norm"
    bias = anatomy.by_name["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert (bias.category, bias.flops_per_token, anatomy.layer_of[bias.name].name) == ("other", 0, f"layers.{LAYERS}")
    assert set(anatomy.layers[0].tensors[0].aliases) == {
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight",
    }  # fmt: skip


def test_gated_t5_tells_gate_from_up() -> None:
    """Oracle: T5 v1.1 computes act(wi_0) * wi_1."""
    config = T5Config(
        vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    with torch.device("meta"):
        anatomy = read_anatomy(AutoModelForSequenceClassification.from_config(config), "t5")
    dense = "transformer.encoder.block.1.layer.1.DenseReluDense"
    assert [anatomy.by_name[f"{dense}.{n}.weight"].category for n in ("wi_0", "wi_1", "wo")] == ["gate", "up", "down"]


def counted_flops(module: nn.Module, tokens: int) -> int:
    """What torch counts of one forward pass with plain matrix products."""
    module.eval().set_attn_implementation("eager")
    if "moe" in module.config.model_type or module.config.model_type in ("mixtral", "deepseek_v3"):
        module.set_experts_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.arange(2, 2 + tokens)[None], use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "gemma", "mixtral"])
def test_flops_per_token_are_what_torch_counts(name: str) -> None:
    """Oracle: torch.utils.flop_counter over a real forward pass, less attention (4 T^2 width a layer)."""
    module = EXPECTED[name].build("cpu")
    tokens = 8
    anatomy = read_anatomy(module, name)
    attention = LAYERS * 4 * tokens**2 * anatomy.attention_width
    total = sum(t.flops_per_token for t in anatomy.tensors)
    assert counted_flops(module, tokens) == tokens * total + attention


@pytest.mark.parametrize("q_rank", [12, None])
def test_latent_attention_and_shared_experts_cost_what_torch_counts(q_rank: int | None) -> None:
    """Oracle: torch.utils.flop_counter; categories by hand. Keys are 12 wide and values 6: the width is their mean."""
    config = DeepseekV3Config(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3,
        n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=q_rank, kv_lora_rank=10, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config)
    anatomy = read_anatomy(module, "latent")
    assert anatomy.attention_width == 4 * (12 + 6) // 2
    assert not anatomy.notes
    queries = "q q norm" if q_rank else "q"
    latent = f"{queries} k v norm o norm norm"
    assert categories(anatomy, "layers.0") == Counter(f"{latent} gate up down".split())
    assert categories(anatomy, "layers.2") == Counter(f"{latent} gate_up down other gate up down".split())
    tokens = 8
    total = sum(t.flops_per_token for t in anatomy.tensors)
    attention = LAYERS * 4 * tokens**2 * anatomy.attention_width
    # the router works on flattened tokens in single precision: no more and no less
    assert counted_flops(module, tokens) == tokens * total + attention


def test_routed_experts_count_by_their_share() -> None:
    """Oracle: torch.utils.flop_counter over Qwen3's experts, three of eight a token."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=8, num_experts_per_tok=3,
    )  # fmt: skip
    module = AutoModelForCausalLM.from_config(config)
    anatomy = read_anatomy(module, "experts")
    total = sum(t.flops_per_token for t in anatomy.tensors)
    assert counted_flops(module, 8) == 8 * total + LAYERS * 4 * 64 * anatomy.attention_width


def test_experts_without_a_number_to_choose_count_whole() -> None:
    """Oracle: two FLOPs for each element; DeepSeek-V2's class leaves the number open."""
    config = DeepseekV2Config(
        vocab_size=VOCAB, hidden_size=D, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=None, kv_lora_rank=8,
        q_lora_rank=None, first_k_dense_replace=0,
    )  # fmt: skip
    with torch.device("meta"):
        anatomy = read_anatomy(AutoModelForCausalLM.from_config(config), "all")
    experts = [t for t in anatomy.tensors if ".experts." in t.name]
    assert experts
    assert all(t.flops_per_token == 2 * t.numel for t in experts)


def test_a_vision_tower_is_no_part_of_the_text_model() -> None:
    """Oracle: Gemma 3's text model alone, built from its text config: the same layers, norm and products."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    vision = {**sizes, "num_hidden_layers": LAYERS, "vision_use_head": False, "model_type": "siglip_vision_model"}
    text = {**sizes, "num_hidden_layers": LAYERS, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": VOCAB}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        whole = read_anatomy(AutoModelForCausalLM.from_config(config), "whole")
        alone = read_anatomy(AutoModelForCausalLM.from_config(config.text_config), "alone")
    assert whole.layer_names == alone.layer_names
    assert [b.path for b in whole.blocks] == [f"model.language_model.layers.{i}" for i in range(LAYERS)]
    for mine, theirs in zip(whole.layers[1:], alone.layers[1:], strict=True):
        assert [(t.shape, t.category, t.flops_per_token) for t in mine.tensors] == [
            (t.shape, t.category, t.flops_per_token) for t in theirs.tensors
        ]
    assert whole.layers[0].flops_per_token == alone.layers[0].flops_per_token
    assert {t.name.split(".")[1] for t in whole.layers[0].tensors} == {
        "vision_tower", "multi_modal_projector", "language_model",
    }  # fmt: skip


def test_conv1d_rows_are_inputs() -> None:
    """Oracle: GPT-2's c_fc maps D to 4 D and is stored (D, 4 D)."""
    anatomy = read_anatomy(EXPECTED["gpt2"].build(), "gpt2")
    matrix = anatomy.by_name["transformer.h.0.mlp.c_fc.weight"]
    assert matrix.shape == (D, 4 * D)
    assert {t.name.split(".", 3)[-1] for t in anatomy.blocks[0].tensors if t.fan_in_fan_out} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    }  # fmt: skip


# -- unknown architectures ---------------------------------------------------------------------------------------------


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(7))


class _MadeUp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lookup = nn.Embedding(9, 4)
        self.few = nn.ModuleList([nn.Linear(4, 4)])
        self.stages = nn.ModuleList(_Block() for _ in range(3))
        self.last_norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 9)


def test_an_unknown_architecture_falls_back_to_its_longest_list() -> None:
    """Oracle: a module made up here; lists inside a block are longer and must not count."""
    with pytest.warns(
        UserWarning, match=r"unknown architecture _MadeUp.*3 entries of its longest ModuleList, 'stages'"
    ):
        anatomy = read_anatomy(_MadeUp(), "mine")
    assert anatomy.structural
    assert any("names that no rule knows" in note for note in anatomy.notes)
    assert [b.path for b in anatomy.blocks] == ["stages.0", "stages.1", "stages.2"]
    assert {t.name for t in anatomy.layers[0].tensors} == {"lookup.weight", "few.0.weight", "few.0.bias"}
    assert categories(anatomy, "norm") == Counter(["norm", "bias"])
    assert categories(anatomy, "head") == Counter(["head", "bias"])
    assert categories(anatomy, "layers.1") == Counter({"other": 8, "bias": 9, "norm": 1})


def test_a_module_without_a_list_has_no_layers() -> None:
    with pytest.raises(UserError, match="ModuleList"):
        read_anatomy(nn.Sequential(nn.Linear(2, 2)), "mine")


# -- shipped -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.filterwarnings("error")
def test_shipped_anatomies_are_the_public_models(name: str) -> None:
    """Oracle: transformers' own module for the public config. Their totals: test_shapes.py."""
    assert load_shipped(name) == read_anatomy(meta_module(PUBLIC[name].config), name)


def test_nothing_else_is_shipped() -> None:
    assert set(shipped()) == set(PUBLIC)


@pytest.mark.parametrize("name", some_fast(PUBLIC, 10))
@pytest.mark.parametrize(
    ("task", "auto"),
    [("classification", AutoModelForSequenceClassification), ("tokens", AutoModelForTokenClassification)],
)
def test_for_task_is_the_model_that_transformers_builds(name: str, task: str, auto: type) -> None:
    """Oracle: the task model itself, on the meta device; where transformers has none, a refusal."""
    config = copy.deepcopy(PUBLIC[name].config)
    config.num_labels = 3
    if type(config) not in auto._model_mapping:
        with pytest.raises(UserError, match=f"cannot do task '{task}'"):
            load_shipped(name).for_task(task, 3)
        return
    with torch.device("meta"):
        module = auto.from_config(config)
    assert load_shipped(name).for_task(task, 3) == read_anatomy(module, name)


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v2", "modernbert", "gpt2", "t5"])
def test_with_labels_is_a_classifier_of_more_classes(name: str) -> None:
    """Oracle: transformers' classifiers with two and with five labels."""
    anatomies = []
    for labels in (2, 5):
        config = copy.deepcopy(EXPECTED[name].config)
        config.num_labels = labels
        with torch.device("meta"):
            anatomies.append(read_anatomy(AutoModelForSequenceClassification.from_config(config), name))
    two, five = anatomies
    assert two != five
    assert two.with_labels(5) == five


def test_for_task_keeps_the_head_of_a_language_model_and_refuses_what_cannot_be() -> None:
    llama = load_shipped("llama-2-7b")
    assert llama.for_task("sft", None) is llama
    with pytest.raises(UserError, match=r"minilm-l6.*cannot do task 'causal_lm'.*classification, tokens"):
        load_shipped("minilm-l6").for_task("causal_lm", None)
    with pytest.raises(UserError, match=r"cannot do task 'seq2seq'.*causal_lm, sft"):
        llama.for_task("seq2seq", None)
    with pytest.raises(UserError, match="Did you mean 'llama-2-7b'"):
        load_shipped("llama-2-7")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": [{"layer": "embed"}]}', '{"layers": 3}', "not json"])
def test_what_is_no_anatomy_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="Not an anatomy"):
        Anatomy.from_json(text)


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "bert", "phi3"])
def test_with_adapters_foretells_what_peft_injects(name: str, kind: str) -> None:
    """Oracle: peft's injection into the real module: the same names and shapes, in the same order."""
    module = EXPECTED[name].build("cpu")
    plain = read_anatomy(module, name)
    matrices = ("q", "qkv", "o", "down")
    targets = tuple(t.name for b in plain.blocks[1:] for t in b.tensors if t.category in matrices)
    add_adapters(module, Adapter(kind, 4, 8.0, 0.0, targets), seed=0)
    foretold = plain.with_adapters(targets, 4, dora=kind == "dora")
    assert read_anatomy(module, name) == foretold
    order = [n for n, _ in module.named_parameters()]
    for layer in foretold.layers:
        names = [t.name for t in layer.tensors]
        assert names == sorted(names, key=order.index)


def test_conv1d_adapters_swap_in_and_out() -> None:
    """Oracle: LoRA's definition, A (r, in) and B (out, r), on a matrix stored (in, out)."""
    anatomy = read_anatomy(EXPECTED["gpt2"].build(), "gpt2").with_adapters(
        ["transformer.h.2.mlp.c_fc.weight"], 4, dora=True
    )
    shapes = {t.name.split("lora_")[1].split(".")[0]: t.shape for t in anatomy.tensors if t.category == "adapter"}
    assert shapes == {"A": (4, D), "B": (4 * D, 4), "magnitude_vector": (4 * D,)}
