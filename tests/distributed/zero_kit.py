"""Engines for the tests on two ranks, by the shipped configurations."""

from __future__ import annotations

import torch.distributed as dist
from tiny import config_of, llama_anatomy, phase_of, recipe_of, tiny_llama

from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.zero import ZeroEngine

SHARDED = {"stage3_param_persistence_threshold": 0}
#: shipped configuration, further zero_optimization keys
LAYOUTS = [
    ("zero0", {}),
    ("zero1", {"round_robin_gradients": True}),
    ("zero2", {}),
    ("zero3", SHARDED),
    ("zero2_offload", {"round_robin_gradients": True}),
    ("zero3_offload", {"stage3_param_persistence_threshold": 1000, "sub_group_size": 3000}),
]
STAGES = [("zero0", {}), ("zero1", {}), ("zero2", {}), ("zero3", SHARDED)]


def make_local(choice, **train):
    model = tiny_llama()
    anatomy = llama_anatomy(model)
    engine = LocalEngine(model, anatomy, recipe_of("local", **train))
    engine.enter(phase_of(anatomy, choice))
    return engine


def make_zero(choice, name, zero=None, **train):
    """Within a process group; `choice` None enters no phase."""
    model = tiny_llama()
    anatomy = llama_anatomy(model)
    recipe = recipe_of(name, **train)
    engine = ZeroEngine(model, anatomy, recipe, config_of(recipe, dist.get_world_size(), **(zero or {})))
    if choice:
        engine.enter(phase_of(anatomy, choice))
    return engine
