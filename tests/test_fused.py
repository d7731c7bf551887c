"""Which outputs of a fused matrix are whose. Oracle: the model's own forward pass, which tells q, k and v, gate and up apart by what
becomes of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    Glm4Config,
    GlmConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    GPTNeoXJapaneseConfig,
    ModernBertConfig,
    MptConfig,
    OpenAIGPTConfig,
    PersimmonConfig,
    Phi3Config,
    PreTrainedConfig,
)

from dsfreeze.anatomy import FUSED, Anatomy, Tensor
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.fused import pattern_of

D, HEADS, VOCAB = 32, 4, 40
_WORDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_USUAL = {
    **_WORDS, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": HEADS, "attn_implementation": "eager",
}  # fmt: skip
_WIDE = {**_USUAL, "intermediate_size": 48}
_SHORT = {**_WORDS, "n_layer": 2, "n_head": HEADS, "n_embd": D, "n_positions": 32, "attn_implementation": "eager"}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**_SHORT),
    "openai": OpenAIGPTConfig(**_SHORT),
    "mpt": MptConfig(**_WORDS, d_model=D, n_heads=HEADS, n_layers=2, max_seq_len=32),
    "phi3": Phi3Config(**_WIDE, num_key_value_heads=2),
    "modernbert": ModernBertConfig(**_WIDE, cls_token_id=2, sep_token_id=3),
    "gpt_neox": GPTNeoXConfig(**_WIDE),
    "gpt_neox_japanese": GPTNeoXJapaneseConfig(**_USUAL, intermediate_multiple_size=2),
    "bloom": BloomConfig(**_WORDS, hidden_size=D, n_layer=2, n_head=HEADS),
    "persimmon": PersimmonConfig(**_WIDE),
    "falcon": FalconConfig(**_USUAL, multi_query=True, bias=True),
    "falcon_by_head": FalconConfig(**_USUAL, multi_query=False),
    "falcon_grouped": FalconConfig(**_USUAL, new_decoder_architecture=True, num_kv_heads=2),
    "bigcode": GPTBigCodeConfig(**_SHORT, multi_query=True),
    "bigcode_by_head": GPTBigCodeConfig(**_SHORT, multi_query=False),
    "codegen": CodeGenConfig(**_SHORT, rotary_dim=4),
    "glm": GlmConfig(**_WIDE, num_key_value_heads=2, head_dim=8),
    "glm4": Glm4Config(**_WIDE, num_key_value_heads=2, head_dim=8),
}
WITH_QKV = [name for name in CONFIGS if not name.startswith("glm")]
WITH_GATE = ["phi3", "modernbert", "glm", "glm4"]


@cache
def built(name: str) -> tuple[nn.Module, Anatomy]:
    torch.manual_seed(0)
    module = AutoModel.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # biases too start from something
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module, read_anatomy(module, name)


def fused(anatomy: Anatomy, category: str) -> Tensor:
    return next(t for t in anatomy.blocks[0].tensors if t.category == category)


class Trial:
    """What a module gives, with some outputs of its fused matrix (and of its bias) multiplied or redrawn."""

    def __init__(self, name: str, category: str, last: str) -> None:
        self.module, anatomy = built(name)
        self.tensor = fused(anatomy, category)
        self.end = fused(anatomy, last)

    def run(self, change=None, zeroed: str = "") -> torch.Tensor:
        """(positions, width) what reaches the module's last matrix."""
        owner = self.module.get_submodule(self.tensor.module)
        kept = {n: p.detach().clone() for n, p in owner.named_parameters()}
        found: list[torch.Tensor] = []
        handle = self.module.get_submodule(self.end.module).register_forward_pre_hook(
            lambda _, args: found.append(args[0].flatten(0, -2).clone())
        )
        try:
            with torch.no_grad():
                for p in owner.parameters():
                    outputs = p.T if p.dim() > 1 and self.tensor.fan_in_fan_out else p
                    for part in zeroed.split():
                        for first, last in self.tensor.outputs_of(part):
                            outputs[first:last] = 0
                    if change:
                        part, factor = change
                        for first, last in self.tensor.outputs_of(part):
                            outputs[first:last] *= factor
                self.module(input_ids=torch.arange(2, 12).unsqueeze(0))
        finally:
            handle.remove()
            with torch.no_grad():
                for n, p in owner.named_parameters():
                    p.copy_(kept[n])
        return found[0]


@pytest.mark.parametrize("name", WITH_QKV)
def test_q_k_and_v_are_where_the_forward_pass_finds_them(name):
    """An attention is linear in v. Without q it does not see k, and without k it does not see q; with both, it does."""
    trial = Trial(name, "qkv", "o")
    plain = trial.run()
    torch.testing.assert_close(trial.run(("v", 3.0)), 3 * plain)
    assert torch.count_nonzero(trial.run(zeroed="v")) == 0
    for one, other in (("q", "k"), ("k", "q")):
        torch.testing.assert_close(trial.run((other, 5.0), zeroed=one), trial.run(zeroed=one))
        assert not torch.allclose(trial.run((other, 5.0)), plain)


@pytest.mark.parametrize("name", WITH_GATE)
def test_gate_and_up_are_where_the_forward_pass_finds_them(name):
    """A gated feed-forward is linear in up, and not in the gate, which goes through the activation."""
    trial = Trial(name, "gate_up", "down")
    plain = trial.run()
    torch.testing.assert_close(trial.run(("up", 3.0)), 3 * plain)
    assert not torch.allclose(trial.run(("gate", 3.0)), 3 * plain, rtol=0.05)
    assert torch.count_nonzero(trial.run(zeroed="gate")) == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parts_are_all_of_it(name):
    """Oracle: the blocks of all parts together, in order, are the outputs, each once; and JSON keeps them."""
    _, anatomy = built(name)
    for tensor in (t for t in anatomy.tensors if t.category in FUSED):
        blocks = sorted(block for part in FUSED[tensor.category] for block in tensor.outputs_of(part))
        assert [i for first, last in blocks for i in range(first, last)] == list(range(tensor.outputs))
    assert Anatomy.from_json(anatomy.to_json()) == anatomy


def test_what_is_not_known_is_not_guessed():
    """Oracle: GPT-2's cross-attention fuses k and v alone; a model of no known type has no parts, nor has a matrix that is not fused."""
    assert pattern_of(CONFIGS["gpt2"], "qkv", 2 * D) == ()
    assert pattern_of(PreTrainedConfig(), "qkv", 3 * D) == pattern_of(PreTrainedConfig(), "gate_up", 96) == ()
    _, anatomy = built("phi3")
    assert fused(anatomy, "o").parts == fused(anatomy, "o").outputs_of("q") == ()
