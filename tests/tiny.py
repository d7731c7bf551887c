"""Tiny models, their anatomies, batches and DeepSpeed configurations for the engines' tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dsfreeze.anatomy import Anatomy, Layer, Tensor
from dsfreeze.plan import Phase
from dsfreeze.recipe import Recipe
from dsfreeze.zero_config import deepspeed_config

CATEGORIES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down",
}  # fmt: skip
NUM_LAYERS = 4


def tiny_llama(
    *, layers: int = NUM_LAYERS, hidden: int = 32, heads: int = 4, vocab: int = 61, seed: int = 0, **more: Any
) -> LlamaForCausalLM:
    """A randomly initialised Llama, head untied, fp32, the same weights for the same seed; `more` goes to its config."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, vocab_size=vocab, tie_word_embeddings=False, max_position_embeddings=256,
        attn_implementation="sdpa", bos_token_id=None, eos_token_id=None, **more,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def llama_anatomy(model: nn.Module) -> Anatomy:
    """Written by hand, so that the engines' tests lean on nothing else."""

    def tensor(name: str, value: torch.Tensor) -> Tensor:
        owner = name.split(".")[-2]
        bias = "bias" if name.endswith(".bias") else ""
        category = (
            bias or CATEGORIES.get(owner) or ("embed" if "embed" in name else "head" if "head" in name else "norm")
        )
        return Tensor(name, tuple(value.shape), category)

    tensors = [tensor(n, p) for n, p in model.named_parameters()]
    count = model.config.num_hidden_layers
    blocks = [
        Layer(f"layers.{i}", tuple(t for t in tensors if t.name.startswith(f"model.layers.{i}.")), f"model.layers.{i}")
        for i in range(count)
    ]
    single = {
        name: Layer(name, tuple(t for t in tensors if t.category == name and ".layers." not in t.name))
        for name in ("embed", "norm", "head")
    }
    return Anatomy("tiny", "llama", (single["embed"], *blocks, single["norm"], single["head"]))


#: Layers that train, by the name of the choice.
SETS = {
    "full": ["embed", "layers.0", "layers.1", "layers.2", "layers.3", "norm", "head"],
    "bottom": ["layers.2", "layers.3", "norm", "head"],
    "top": ["embed", "layers.0", "layers.1"],
    "interval": ["layers.0", "layers.2", "norm", "head"],
}


def phase_of(anatomy: Anatomy, choice: str | list[str]) -> Phase:
    if choice == "matrices":  # frozen norms inside trained blocks
        chosen = [t for layer in anatomy.blocks[1:] for t in layer.tensors if t.category != "norm"]
    else:
        names = SETS[choice] if isinstance(choice, str) else choice
        chosen = [t for layer in anatomy.layers if layer.name in names for t in layer.tensors]
    return Phase(0, None, tuple(t.name for t in chosen))


def recipe_of(zero: str = "zero2", **train: Any) -> Recipe:
    """eps is large, because Adam with a small one turns rounding noise into differences."""
    options = {
        "adam_epsilon": 1e-3,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "max_steps": 10,
        "per_device_train_batch_size": 1,
    }
    options |= train
    return Recipe.model_validate({"model": "tiny", "task": "causal_lm", "zero": zero, "train": options})


def config_of(recipe: Recipe, world_size: int, **zero: Any) -> dict[str, Any]:
    """The shipped configuration that the recipe names, its buckets smaller than the model, and further keys."""
    config = deepspeed_config(recipe, world_size, largest_set=4096)
    config["zero_optimization"] |= zero
    return config


def examples(step: int, count: int = 4, length: int = 8, vocab: int = 61) -> dict[str, torch.Tensor]:
    """A global batch: token ids, and labels of which a different number counts in each example."""
    ids = torch.randint(0, vocab, (count, length), generator=torch.Generator().manual_seed(1000 + step))
    labels = ids.clone()
    for row in range(count):
        labels[row, : (row + step) % 4] = -100
    return {"input_ids": ids, "labels": labels}


def micro_batches(
    batch: dict[str, torch.Tensor], rank: int, world_size: int, accumulation: int
) -> list[tuple[dict, float]]:
    """This rank's share of a global batch, and each micro-batch's weight: its terms over the global batch's."""
    size = len(batch["input_ids"]) // (world_size * accumulation)
    total = int((batch["labels"][:, 1:] != -100).sum())
    cut = []
    for micro in range(accumulation):
        first = (micro * world_size + rank) * size
        part = {name: value[first : first + size] for name, value in batch.items()}
        cut.append((part, int((part["labels"][:, 1:] != -100).sum()) / total))
    return cut


def train_steps(
    engine: Any, first: int, last: int, *, lr: float = 1e-2, accumulation: int = 1
) -> tuple[list[float], list[float]]:
    """Global losses and gradient norms of steps first .. last-1; the learning rate falls a little every step."""
    losses, norms = [], []
    for step in range(first, last):
        loss = 0.0
        for batch, weight in micro_batches(examples(step), engine.rank, engine.world_size, accumulation):
            loss += engine.forward_backward(batch, weight)
        norms.append(engine.step(lr * (1 - 0.02 * step)))
        losses.append(engine.sum([loss])[0])
    return losses, norms
