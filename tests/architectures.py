"""Tiny configs of the architectures whose anatomy is tested, and by hand what each must be read as."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    DebertaV2Config,
    FalconConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
)

D, HEADS, WIDE, VOCAB, LAYERS = 32, 4, 48, 96, 3
_USUAL = {
    "vocab_size": VOCAB, "hidden_size": D, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_SHORT = {
    "vocab_size": VOCAB,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Expected:
    """What a causal LM (an encoder: its sequence classifier) must be read as.

    Categories of the last block and of `embed`, `norm`, `head`, as words; `tied` is the alias of the token embedding.
    """

    config: PreTrainedConfig
    block: str
    embed: str = "embed"
    norm: str = "norm"
    head: str = ""
    tied: str = ""
    blocks: int = LAYERS

    def build(self, device: str = "meta") -> nn.Module:
        """A model of its own config: a model that is told another attention writes it there."""
        auto = AutoModelForCausalLM
        if self.config.model_type in ("bert", "roberta", "deberta-v2", "modernbert"):
            auto = AutoModelForSequenceClassification
        elif self.config.is_encoder_decoder:
            auto = AutoModelForSeq2SeqLM
        with torch.device(device):
            return auto.from_config(copy.deepcopy(self.config))


_LLAMA = "q k v o gate up down norm norm"
_GPT2 = "qkv o up down norm norm" + " bias" * 6
_BERT = "q k v o up down norm norm" + " bias" * 8
_BERT_HEAD = "head bias head bias"  # pooler (or dense), classifier

EXPECTED = {
    "llama": Expected(LlamaConfig(**_GROUPED), _LLAMA, head="head"),
    "mistral": Expected(MistralConfig(**_GROUPED), _LLAMA, head="head"),
    "qwen2": Expected(Qwen2Config(**_GROUPED), _LLAMA + " bias" * 3, head="head"),
    "qwen3": Expected(Qwen3Config(**_GROUPED, head_dim=8), _LLAMA + " norm norm", head="head"),
    "gemma": Expected(GemmaConfig(**_GROUPED, head_dim=8), _LLAMA, tied="lm_head.weight"),
    "gemma3": Expected(Gemma3TextConfig(**_GROUPED, head_dim=8), _LLAMA + " norm" * 4, tied="lm_head.weight"),
    "phi": Expected(
        PhiConfig(**_GROUPED), "q k v o up down norm" + " bias" * 7, norm="norm bias", head="head bias"
    ),
    "phi3": Expected(Phi3Config(**_GROUPED), "qkv o gate_up down norm norm", head="head"),
    "mixtral": Expected(
        MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "q k v o gate_up down other norm norm",
        head="head",
    ),
    "gpt2": Expected(
        GPT2Config(**_SHORT, n_embd=D), _GPT2, embed="embed embed", norm="norm bias", tied="lm_head.weight"
    ),
    "gpt_neox": Expected(GPTNeoXConfig(**_USUAL), _GPT2, norm="norm bias", head="head"),
    "bloom": Expected(
        BloomConfig(**_SHORT, hidden_size=D), _GPT2, embed="embed norm bias", norm="norm bias", tied="lm_head.weight"
    ),
    "falcon": Expected(
        FalconConfig(
            vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            bos_token_id=1, eos_token_id=1,
        ),
        "qkv o up down norm bias",
        norm="norm bias",
        tied="lm_head.weight",
    ),
    "opt": Expected(
        OPTConfig(
            vocab_size=VOCAB, hidden_size=D, ffn_dim=WIDE, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
            word_embed_proj_dim=24, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        ),
        _BERT,
        embed="embed embed embed",  # tokens, positions, projection to the hidden size
        norm="norm bias",
        head="head",  # projection back
        tied="lm_head.weight",
    ),
    "bert": Expected(BertConfig(**_USUAL), _BERT, embed="embed embed embed norm bias", norm="", head=_BERT_HEAD),
    "roberta": Expected(RobertaConfig(**_USUAL), _BERT, embed="embed embed embed norm bias", norm="", head=_BERT_HEAD),
    "deberta-v2": Expected(
        DebertaV2Config(
            **_USUAL, relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False,
            share_att_key=True,
        ),
        _BERT,
        embed="embed norm bias embed",
        norm="",
        head=_BERT_HEAD,
    ),
    "modernbert": Expected(
        ModernBertConfig(**_USUAL, cls_token_id=2, sep_token_id=3),
        "qkv o gate_up down norm norm",
        embed="embed norm",
        head="head norm head bias",
    ),
    "t5": Expected(
        T5Config(
            vocab_size=VOCAB, d_model=D, d_kv=8, d_ff=WIDE, num_layers=LAYERS, num_decoder_layers=2, num_heads=HEADS
        ),
        "q k v o q k v o up down norm norm norm",
        tied="lm_head.weight",
        blocks=LAYERS + 2,
    ),
}  # fmt: skip
