"""Writes dsfreeze/anatomies/*.json from the public configs of well-known models, on the meta device.

    python -m tests.make_anatomies

`test_anatomy.py` holds the files against these configs, and their totals against the published ones.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GemmaConfig,
    LlamaConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from dsfreeze.anatomy import SHIPPED
from dsfreeze.anatomy_reader import read_anatomy


def _rope(theta: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


#: name -> (config as its hub repository has it, published number of parameters)
PUBLIC: dict[str, tuple[PreTrainedConfig, int]] = {
    "smollm2-135m": (  # HuggingFaceTB/SmolLM2-135M-Instruct
        LlamaConfig(
            vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
            **_rope(1e5),
        ),
        134_515_008,
    ),
    "minilm-l6": (  # sentence-transformers/all-MiniLM-L6-v2
        BertConfig(
            vocab_size=30522, hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12,
            max_position_embeddings=512,
        ),
        22_713_216,
    ),
    "llama-2-7b": (  # meta-llama/Llama-2-7b-hf
        LlamaConfig(
            vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False, **_rope(1e4),
        ),
        6_738_415_616,
    ),
    "gemma-2b": (  # google/gemma-2b
        GemmaConfig(
            vocab_size=256000, hidden_size=2048, intermediate_size=16384, num_hidden_layers=18, num_attention_heads=8,
            num_key_value_heads=1, head_dim=256, max_position_embeddings=8192, tie_word_embeddings=True, **_rope(1e4),
        ),
        2_506_172_416,
    ),
    "phi-2": (  # microsoft/phi-2
        PhiConfig(
            vocab_size=51200, hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32,
            max_position_embeddings=2048, tie_word_embeddings=False,
        ),
        2_779_683_840,
    ),
    "qwen2.5-0.5b": (  # Qwen/Qwen2.5-0.5B
        Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, max_position_embeddings=32768, tie_word_embeddings=True, **_rope(1e6),
        ),
        494_032_768,
    ),
}  # fmt: skip


def meta_module(config: PreTrainedConfig) -> nn.Module:
    """The causal LM, or BERT's base encoder, without memory for its weights."""
    auto = AutoModel if isinstance(config, BertConfig) else AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(config)


def main() -> None:
    for name, (config, _) in PUBLIC.items():
        (SHIPPED / f"{name}.json").write_text(
            read_anatomy(meta_module(config), name).to_json() + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
