"""Engines on plans as strategies make them, for what the estimate says of them."""

from __future__ import annotations

import torch.distributed as dist
from tiny import config_of, llama_anatomy, recipe_of, tiny_llama
from zero_kit import SHARDED

from dsfreeze.engine.zero import ZeroEngine
from dsfreeze.model import add_adapters
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan

PLANS = {
    "full": {"strategy": "full"},
    "bottom": {"count": 2},
    "interval": {"strategy": "interval", "fraction": 0.5, "offset": 0},
    "norms": {"strategy": "norms"},
    "bitfit": {"strategy": "bitfit"},
    "lora": {"count": 2, "adapter": {"kind": "lora", "r": 2, "alpha": 16}},
    "one matrix": {"strategy": "patterns", "trainable": ["layers.1.self_attn.o_proj"]},
    # half the matrices of every layer, as half fine-tuning would choose them
    "half": {"strategy": "patterns", "trainable": ["layers.*.self_attn.[qo]_proj", "layers.*.mlp.up_proj"]},
}
#: stage 3 keeps nothing and prefetches nothing
TIGHT = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
BARE = {**SHARDED, **TIGHT}
#: to the toy's 45,000 elements what the default limits are to 7e9
PROPORTIONAL = {
    "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 3000, "stage3_max_reuse_distance": 6700,
    "stage3_max_live_parameters": 6700,
}  # fmt: skip


def planned(choice, name, zero=None, model=None, **train):
    """(engine in the plan's phase, the plan, the anatomy as trained); within a process group."""
    module = model or tiny_llama()
    plain = llama_anatomy(module)
    plan = make_plan(plain, FreezeOptions(**PLANS[choice]))
    if plan.adapter is not None:
        add_adapters(module, plan.adapter, seed=0)
    anatomy = plan.adapted(plain)
    recipe = recipe_of(name, **train)
    engine = ZeroEngine(module, anatomy, recipe, config_of(recipe, dist.get_world_size(), **(zero or {})))
    engine.enter(plan.phases[0])
    return engine, plan, anatomy
