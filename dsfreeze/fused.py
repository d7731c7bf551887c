"""Which outputs of a fused matrix are whose: families differ in the order, and some deal them out head by head.

A pattern is ((category, number of outputs), ...), repeated until the matrix ends. A family that is not here has none:
what cannot be known is left unknown (tests/test_fused.py holds each against the model's own forward pass). No torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Pattern = tuple[tuple[str, int], ...]


def pattern_of(config: Any, category: str, outputs: int) -> Pattern:
    """The parts of a fused matrix with so many outputs in a model of this config; () when they are not known.

    Of `gate_up`, the half that goes through the activation is the gate, whatever the code calls it.
    """
    kind = getattr(config, "model_type", None)
    if category == "gate_up" and kind in _GATE_FIRST:
        return ("gate", outputs // 2), ("up", outputs // 2)
    if category != "qkv" or kind not in _QKV:
        return ()
    pattern = _QKV[kind](config)
    return pattern if outputs % sum(size for _, size in pattern) == 0 else ()  # GPT-2's cross-attention: k and v alone


def _heads(config: Any) -> tuple[int, int]:
    """(number of query heads, outputs of one)."""
    heads = config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _in_a_row(config: Any, groups: int | None = None) -> Pattern:
    """All of q, then all of k, then all of v; k and v as wide as there are key heads."""
    heads, size = _heads(config)
    groups = groups or getattr(config, "num_key_value_heads", None) or heads
    return ("q", heads * size), ("k", groups * size), ("v", groups * size)


def _head_by_head(config: Any, queries: int = 1) -> Pattern:
    """q (of so many query heads), k and v of one head, then those of the next."""
    size = _heads(config)[1]
    return ("q", queries * size), ("k", size), ("v", size)


def _falcon(config: Any) -> Pattern:
    if config.new_decoder_architecture:
        return _head_by_head(config, config.num_attention_heads // config.num_kv_heads)
    return _in_a_row(config, 1) if config.multi_query else _head_by_head(config)


def _gpt_bigcode(config: Any) -> Pattern:
    return _in_a_row(config, 1) if config.multi_query else _head_by_head(config)


def _codegen(config: Any) -> Pattern:
    """Four times q, v, k of a quarter of the heads, for the four cores it was trained on."""
    heads, size = _heads(config)
    return tuple((part, heads * size // 4) for part in "qvk")


_QKV: dict[str, Callable[[Any], Pattern]] = {
    "gpt2": _in_a_row, "openai-gpt": _in_a_row, "mpt": _in_a_row, "phi3": _in_a_row, "modernbert": _in_a_row,
    "gpt_neox": _head_by_head, "gpt_neox_japanese": _head_by_head, "bloom": _head_by_head, "persimmon": _head_by_head,
    "falcon": _falcon, "gpt_bigcode": _gpt_bigcode, "codegen": _codegen,
}  # fmt: skip
_GATE_FIRST = ("phi3", "glm", "glm4", "modernbert", "modernbert-decoder")
