"""What a cached state depends on: the example, and everything that turns it into that state.

The state that leaves the prefix is a function of the tokenised example, the prefix's weights and shape, the attention kernel and
precision, and the libraries that compute it. The example gives the key, the rest the fingerprint of the whole cache.
Learning rates, seeds, heads and whatever trains above the cut are in neither: runs that differ in these share a cache.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from dsfreeze.anatomy import Layer
from dsfreeze.data.examples import Example

KEY_BYTES = 16
#: Of a config what does not bear on the prefix in eval mode: the task's head, names, versions. Whatever is about dropout is
#: left out too.
BESIDE = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "num_labels",
    "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip


def example_key(example: Example) -> bytes:
    """16 bytes that tell one tokenised example from another: of all that the model sees but the labels."""
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for name in sorted(example):
        if name != "labels":
            digest.update(name.encode())
            digest.update(np.asarray(example[name], dtype=np.int64).tobytes())
    return digest.digest()


def layer_digest(layer: Layer, weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of a layer's weights, given under their names; where the layer lies in a module does not count."""
    digest = hashlib.sha256()
    for tensor in layer.tensors:
        value = weights[tensor.name].detach().to("cpu").contiguous()
        own = tensor.name.removeprefix(layer.path) if layer.path else tensor.name.rpartition(".")[2]
        digest.update(f"{own} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def manifest_of(
    *,
    model: str,
    config: PreTrainedConfig,
    cut: int,
    layers: Sequence[str],
    buffers: Mapping[str, torch.Tensor],
    attention: str | None,
    dtype: torch.dtype,
    stored: str,
    device: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """What a cache was made from, with its `fingerprint`. `layers`: digests of the prefix's layers, input first, of which `cut` are
    transformer layers; `buffers`: what these layers keep beside their weights and is saved with them (a router's biases)."""
    told = {
        "weights": _digest(layers),
        "cut": cut,
        "buffers": _digest(f"{name} {value.tolist()}" for name, value in sorted(buffers.items())),
        "config": _config_digest(config),
        "attention": attention or "",
        "dtype": str(dtype).removeprefix("torch."),
        "stored": stored,
        "device": device,
        "tokenizer": _tokenizer_digest(tokenizer),
        "max_length": max_length,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }
    return {"model": model, **told, "fingerprint": _digest([json.dumps(told, sort_keys=True)])}


def _config_digest(config: PreTrainedConfig) -> str:
    values = config.to_dict()
    kept = {key: value for key, value in values.items() if key not in BESIDE and "drop" not in key}
    return _digest([json.dumps(kept, sort_keys=True, default=str)])


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    return _digest(f"{token} {index}" for token, index in sorted(tokenizer.get_vocab().items()))


def _digest(parts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()
