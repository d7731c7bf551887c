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
