"""Public configs of the shipped shapes, the totals their authors publish, and the same totals once more by hand.

`published` is the number of parameters that the model's hub repository shows (the count in the headers of its safetensors
files) where `source` says nothing else. `less` is what it counts beyond the model that transformers builds, item by item.
`by_hand` counts from the config's numbers alone, in a closed form written here; it knows nothing of transformers' classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)


@dataclass(frozen=True)
class Public:
    """A config as the hub repository has it (fields of the shape alone) and what is published about its size."""

    config: PreTrainedConfig
    published: int
    by_hand: int
    less: dict[str, int] = field(default_factory=dict)
    source: str = "hub"
    active: float = 0.0
    """Of a mixture of experts: parameters of a token, as published."""

    @property
    def numel(self) -> int:
        return self.published - sum(self.less.values())


def _sizes(vocab: int, d: int, ffn: int, layers: int, heads: int, groups: int = 0) -> dict[str, int]:
    return {
        "vocab_size": vocab, "hidden_size": d, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": groups or heads,
    }  # fmt: skip


def _decoder(
    sizes: dict[str, int], *, head: int = 0, tied: bool = False, norms: int = 2, qkv_bias: bool = False, inner: int = 0
) -> int:
    """RMS norms, gated feed-forward, grouped queries: `norms` of width d and `inner` further gains in a layer."""
    vocab, d, ffn, layers, heads, groups = sizes.values()
    head = head or d // heads
    attention = 2 * d * head * (heads + groups) + qkv_bias * head * (heads + 2 * groups)
    return vocab * d * (1 if tied else 2) + layers * (attention + 3 * d * ffn + norms * d + inner) + d


def _llama(published: int, sizes: dict[str, int], *, tied: bool = False, source: str = "hub", **less: int) -> Public:
    config = LlamaConfig(**sizes, tie_word_embeddings=tied)
    return Public(config, published, _decoder(sizes, tied=tied), less, source)


def _qwen2(published: int, sizes: dict[str, int], *, tied: bool = False) -> Public:
    return Public(Qwen2Config(**sizes, tie_word_embeddings=tied), published, _decoder(sizes, tied=tied, qkv_bias=True))


def _qwen3(published: int, sizes: dict[str, int]) -> Public:
    config = Qwen3Config(**sizes, head_dim=128, tie_word_embeddings=False)
    return Public(config, published, _decoder(sizes, head=128, inner=2 * 128))


def _gemma2(published: int, head: int, sizes: dict[str, int]) -> Public:
    config = Gemma2Config(**sizes, head_dim=head, tie_word_embeddings=True)
    return Public(config, published, _decoder(sizes, head=head, tied=True, norms=4))


def _olmo2(published: int, sizes: dict[str, int], source: str = "hub") -> Public:
    d, heads, groups = (sizes[k] for k in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    config = Olmo2Config(**sizes, tie_word_embeddings=False)
    return Public(config, published, _decoder(sizes, inner=d + d // heads * groups), source=source)


def _phi3(published: int, sizes: dict[str, int]) -> Public:
    return Public(Phi3Config(**sizes, tie_word_embeddings=False), published, _decoder(sizes))


def _bert(published: int, sizes: dict[str, int], less: dict[str, int]) -> Public:
    """Three tables with a norm; per layer four d x d, two d x ffn, their biases and two norms; a pooler."""
    vocab, d, ffn, layers, *_ = sizes.values()
    layer = 4 * (d * d + d) + 2 * d * ffn + ffn + d + 4 * d
    by_hand = (vocab + 512 + 2) * d + 2 * d + layers * layer + d * d + d
    sizes = {k: v for k, v in sizes.items() if k != "num_key_value_heads"}
    return Public(BertConfig(**sizes, max_position_embeddings=512), published, by_hand, less)


def _bert_heads(vocab: int, d: int) -> dict[str, int]:
    """What bert-*-uncased hold for pre-training: a transform with its norm, a bias for each word, and the pair's head."""
    return {"masked words": d * d + d + 2 * d + vocab, "next sentence": 2 * d + 2}


def _modernbert(published: int, sizes: dict[str, int]) -> Public:
    """No biases; gains alone; the first layer has no norm before its attention. The hub's model has a word head too."""
    vocab, d, ffn, layers, *_ = sizes.values()
    by_hand = vocab * d + d + layers * (4 * d * d + 3 * d * ffn + 2 * d) - d + d
    sizes = {k: v for k, v in sizes.items() if k != "num_key_value_heads"}
    return Public(ModernBertConfig(**sizes), published, by_hand, {"masked words": d * d + d + vocab})


# -- those with a shape of their own -----------------------------------------------------------------------------------


def _phi2() -> Public:
    """Parallel blocks with one norm; every matrix has a bias, the head too."""
    sizes = _sizes(51200, 2560, 10240, 32, 32)
    vocab, d, ffn, layers, *_ = sizes.values()
    layer = 4 * (d * d + d) + 2 * d * ffn + ffn + d + 2 * d
    by_hand = 2 * vocab * d + vocab + layers * layer + 2 * d
    return Public(PhiConfig(**sizes, tie_word_embeddings=False), 2_779_683_840, by_hand)


def _gemma() -> Public:
    sizes = _sizes(256000, 2048, 16384, 18, 8, 1)
    config = GemmaConfig(**sizes, head_dim=256, tie_word_embeddings=True)
    return Public(config, 2_506_172_416, _decoder(sizes, head=256, tied=True))


def _gemma3() -> Public:
    """The whole model of the hub repository: text, the SigLIP tower without its pooling head, and the projector."""
    sizes = _sizes(262208, 5376, 21504, 62, 32, 16)
    text = _decoder(sizes, head=128, tied=True, norms=4, inner=2 * 128)
    d, ffn, layers, patches = 1152, 4304, 27, 64 * 64
    layer = 4 * (d * d + d) + 2 * d * ffn + ffn + d + 4 * d
    tower = d * 3 * 14 * 14 + d + patches * d + layers * layer + 2 * d
    config = Gemma3Config(
        text_config={**sizes, "head_dim": 128, "model_type": "gemma3_text"},
        vision_config={
            "hidden_size": d, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": 16,
            "image_size": 896, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model",
        },
    )  # fmt: skip
    return Public(config, 27_432_406_640, text + tower + d + d * 5376)


def _mistral() -> Public:
    sizes = _sizes(32000, 4096, 14336, 32, 32, 8)
    return Public(MistralConfig(**sizes, tie_word_embeddings=False), 7_241_732_096, _decoder(sizes))


def _mixtral() -> Public:
    sizes = _sizes(32000, 4096, 14336, 32, 32, 8)
    more = sizes["num_hidden_layers"] * (7 * 3 * 4096 * 14336 + 8 * 4096)  # seven more experts, and a router
    config = MixtralConfig(**sizes, num_local_experts=8, num_experts_per_tok=2, tie_word_embeddings=False)
    return Public(config, 46_702_792_704, _decoder(sizes) + more, active=12.9e9)


def _qwen3_moe() -> Public:
    sizes = _sizes(151936, 4096, 1536, 94, 64, 4)  # the feed-forward is an expert's
    more = sizes["num_hidden_layers"] * (127 * 3 * 4096 * 1536 + 128 * 4096)
    config = Qwen3MoeConfig(
        **sizes | {"intermediate_size": 12288}, head_dim=128, moe_intermediate_size=1536, num_experts=128,
        num_experts_per_tok=8, tie_word_embeddings=False,
    )  # fmt: skip
    return Public(config, 235_093_634_560, _decoder(sizes, head=128, inner=2 * 128) + more, active=22e9)


def _deepseek_v3() -> Public:
    """The main model; the hub's files hold a module for multi-token prediction and scales of fp8 blocks besides.

    A parameter that steers the choice of experts is no parameter in transformers, but a buffer.
    """
    d, heads, rope, nope, value, q_rank, kv_rank = 7168, 128, 64, 128, 128, 1536, 512
    queries = d * q_rank + q_rank + q_rank * heads * (nope + rope)
    keys_values = d * (kv_rank + rope) + kv_rank + kv_rank * heads * (nope + value)
    layer = queries + keys_values + heads * value * d + 2 * d
    expert = 3 * d * 2048
    by_hand = 2 * 129280 * d + d + 61 * layer + 3 * (3 * d * 18432) + 58 * ((256 + 1) * expert + 256 * d)
    config = DeepseekV3Config(
        **_sizes(129280, d, 18432, 61, heads), moe_intermediate_size=2048, n_routed_experts=256, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=3, q_lora_rank=q_rank, kv_lora_rank=kv_rank,
        qk_rope_head_dim=rope, qk_nope_head_dim=nope, v_head_dim=value, tie_word_embeddings=False,
    )  # fmt: skip
    source = "headers of the hub's files without model.layers.61 and the fp8 scales; README_WEIGHTS.md says 671B"
    return Public(config, 671_026_419_200, by_hand, {"experts' biases": 58 * 256}, source, active=36.6e9)


_NO_HUB_COUNT = "its hub repository shows no count; that of fine-tuned models in mteb's metadata, and by hand"

PUBLIC: dict[str, Public] = {
    "smollm2-135m": _llama(134_515_008, _sizes(49152, 576, 1536, 30, 9, 3), tied=True),
    "smollm2-360m": _llama(361_821_120, _sizes(49152, 960, 2560, 32, 15, 5), tied=True),
    "smollm2-1.7b": _llama(1_711_376_384, _sizes(49152, 2048, 8192, 24, 32), tied=True),
    "minicpm-2b": _llama(2_724_880_896, _sizes(122753, 2304, 5760, 40, 36), tied=True, source=_NO_HUB_COUNT),
    # the hub's Llama 2 files hold each layer's 64 rotary frequencies
    "llama-2-7b": _llama(6_738_417_664, _sizes(32000, 4096, 11008, 32, 32), frequencies=32 * 64),
    "llama-2-13b": _llama(13_015_866_880, _sizes(32000, 5120, 13824, 40, 40), frequencies=40 * 64),
    "llama-2-70b": _llama(68_976_653_312, _sizes(32000, 8192, 28672, 80, 64, 8), frequencies=80 * 64),
    "llama-3-8b": _llama(8_030_261_248, _sizes(128256, 4096, 14336, 32, 32, 8)),
    "llama-3-70b": _llama(70_553_706_496, _sizes(128256, 8192, 28672, 80, 64, 8)),
    "llama-3-405b": _llama(405_853_388_800, _sizes(128256, 16384, 53248, 126, 128, 8)),
    "mistral-7b": _mistral(),
    "mixtral-8x7b": _mixtral(),
    "qwen2.5-0.5b": _qwen2(494_032_768, _sizes(151936, 896, 4864, 24, 14, 2), tied=True),
    "qwen2.5-1.5b": _qwen2(1_543_714_304, _sizes(151936, 1536, 8960, 28, 12, 2), tied=True),
    "qwen2.5-3b": _qwen2(3_085_938_688, _sizes(151936, 2048, 11008, 36, 16, 2), tied=True),
    "qwen2.5-7b": _qwen2(7_615_616_512, _sizes(152064, 3584, 18944, 28, 28, 4)),
    "qwen2.5-14b": _qwen2(14_770_033_664, _sizes(152064, 5120, 13824, 48, 40, 8)),
    "qwen2.5-32b": _qwen2(32_763_876_352, _sizes(152064, 5120, 27648, 64, 40, 8)),
    "qwen2.5-72b": _qwen2(72_706_203_648, _sizes(152064, 8192, 29568, 80, 64, 8)),
    "qwen3-8b": _qwen3(8_190_735_360, _sizes(151936, 4096, 12288, 36, 32, 8)),
    "qwen3-32b": _qwen3(32_762_123_264, _sizes(151936, 5120, 25600, 64, 64, 8)),
    "qwen3-235b-a22b": _qwen3_moe(),
    "gemma-2b": _gemma(),
    "gemma-2-2b": _gemma2(2_614_341_888, 256, _sizes(256000, 2304, 9216, 26, 8, 4)),
    "gemma-2-9b": _gemma2(9_241_705_984, 256, _sizes(256000, 3584, 14336, 42, 16, 8)),
    "gemma-2-27b": _gemma2(27_227_128_320, 128, _sizes(256000, 4608, 36864, 46, 32, 16)),
    "gemma-3-27b": _gemma3(),
    "phi-2": _phi2(),
    "phi-3-mini": _phi3(3_821_079_552, _sizes(32064, 3072, 8192, 32, 32)),
    "phi-3-medium": _phi3(13_960_238_080, _sizes(32064, 5120, 17920, 40, 40, 10)),
    "olmo-2-7b": _olmo2(7_298_617_344, _sizes(100352, 4096, 11008, 32, 32)),
    "olmo-2-13b": _olmo2(13_716_198_400, _sizes(100352, 5120, 13824, 40, 40)),
    "olmo-2-32b": _olmo2(32_234_279_936, _sizes(100352, 5120, 27648, 64, 40, 8), source="by hand; 32B is published"),
    "deepseek-v3": _deepseek_v3(),
    # the hub's MiniLM holds the numbers of its 512 positions
    "minilm-l6": _bert(22_713_728, _sizes(30522, 384, 1536, 6, 12), {"positions": 512}),
    "bert-base": _bert(110_106_428, _sizes(30522, 768, 3072, 12, 12), _bert_heads(30522, 768)),
    "bert-large": _bert(336_226_108, _sizes(30522, 1024, 4096, 24, 16), _bert_heads(30522, 1024)),
    "modernbert-base": _modernbert(149_655_232, _sizes(50368, 768, 1152, 22, 12)),
    "modernbert-large": _modernbert(395_881_664, _sizes(50368, 1024, 2624, 28, 16)),
}


def meta_module(config: PreTrainedConfig) -> nn.Module:
    """The causal LM, or an encoder without a head, without memory for its weights."""
    auto = AutoModel if isinstance(config, BertConfig | ModernBertConfig) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)
