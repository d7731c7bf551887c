"""Where a plan runs, as far as its price depends on it. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from dsfreeze.recipe import Recipe
from dsfreeze.zero_config import deepspeed_config, is_local, offload_of, stage_of


@dataclass(frozen=True)
class Setting:
    """`estimate`'s keywords: ZeRO stage, ranks, bytes of a weight (2 or 4), optimizer offload, positions of a sequence."""

    stage: int = 2
    world_size: int = 1
    dtype_bytes: int = 4
    offload: bool = False
    sequence_length: int = 512


def setting_of(recipe: Recipe, world_size: int) -> Setting:
    """The setting of a recipe's run on so many ranks; UserError where its DeepSpeed config contradicts itself."""
    config = None if is_local(recipe) else deepspeed_config(recipe, world_size)
    return Setting(
        stage_of(config) if config else 0,
        world_size,
        2 if recipe.train.bf16 else 4,
        bool(config and offload_of(config)),
        recipe.data.max_length,
    )


@dataclass(frozen=True)
class Workload:
    """What a rank does in a step, as far as its price depends on it: sequences of a micro-batch (two a pair), micro-steps, whether layers
    recompute, the attention (None: transformers' choice), whether the frozen prefix is read from a cache, how that is stored
    (a freeze.prefix_cache_dtype) and where, and whether the prefix's weights are off the device."""

    task: str = "causal_lm"
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    attention: str | None = None
    prefix_cache: bool = False
    prefix_cache_dtype: str = "auto"
    cache_in_memory: bool = False
    evict_prefix: bool = False


def workload_of(recipe: Recipe) -> Workload:
    """That of a recipe's run. A prefix cache is priced as it is read, from the second epoch on; `auto` as one on disk, the slower
    tier: where a run has chosen none, price its recipe with freeze.prefix_cache off."""
    train, freeze = recipe.train, recipe.freeze
    return Workload(
        recipe.task,
        train.per_device_train_batch_size * (2 if recipe.task == "preference" else 1),
        train.gradient_accumulation_steps,
        train.gradient_checkpointing,
        recipe.model.attn_implementation,
        freeze.prefix_cache != "off",
        freeze.prefix_cache_dtype,
        freeze.prefix_cache == "memory",
        freeze.evict_prefix,
    )
