"""Everything a run needs before an engine is built: recipe -> tokenizer, data, model, anatomy, plan."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from dsfreeze.anatomy import Anatomy
from dsfreeze.checkpoint import Base
from dsfreeze.data import TaskData, num_steps_of, prepare
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.model import add_adapters, base_hash, load_model, load_tokenizer, read_anatomy
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import ModelOptions, Recipe
from dsfreeze.setting import setting_of
from dsfreeze.strategies import make_plan


@dataclass
class Job:
    """A recipe made concrete. `anatomy` is the module's as it trains, adapters included; `plain` is without them.

    `plan` is the one in force, which an adaptive strategy revises; `first_plan` the one the run began with.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    module: nn.Module
    anatomy: Anatomy
    plan: FreezePlan
    base: Base
    plain: Anatomy
    first_plan: FreezePlan

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.train.output_dir)


def load_task(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, TaskData, nn.Module]:
    """Tokenizer, tokenised examples and the model with the head the task needs (fresh heads seeded by train.seed)."""
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe, tokenizer)
    return tokenizer, data, task_module(recipe, data, recipe.model)


def task_module(recipe: Recipe, data: TaskData, model: ModelOptions) -> nn.Module:
    """A model with the head that the recipe's task needs."""
    dtype = torch.bfloat16 if recipe.train.bf16 else torch.float32
    return load_model(model, recipe.task, data.num_labels, labels=data.labels, dtype=dtype, seed=recipe.train.seed)


def prepare_job(recipe: Recipe, num_steps: int | None = None) -> Job:
    """Load and plan; raises UserError for every mistake in the recipe that loading can find.

    `num_steps`: the run's length where it is known already; else the recipe and the data give it.
    """
    tokenizer, data, module = load_task(recipe)
    plain = read_anatomy(module, recipe.model.name)
    setting = setting_of(recipe, read_ranks().world_size)
    plan = make_plan(plain, recipe.freeze, num_steps or _num_steps(recipe, data), setting)
    base = Base(recipe.model.name, base_hash(module), plain.digest)
    if plan.adapter is not None:
        add_adapters(module, plan.adapter, seed=recipe.train.seed)
    return Job(recipe, tokenizer, data, module, plan.adapted(plain), plan, base, plain, plan)


def _num_steps(recipe: Recipe, data: TaskData) -> int | None:
    """How many optimizer steps the run has; None when there is nothing to train on."""
    if data.train is None:
        return None
    return num_steps_of(recipe.train, len(data.train), read_ranks().world_size)
