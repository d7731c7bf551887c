"""Everything a run needs before an engine is built: recipe -> tokenizer, data, model, anatomy, plan.

With freeze.evict_prefix the model is planned from its outline, and then the part above the prefix alone is read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dsfreeze.anatomy import Anatomy
from dsfreeze.checkpoint import Base
from dsfreeze.data import TaskData, num_steps_of, prepare
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.model import add_adapters, base_hash, load_model, load_tokenizer, outline_of, read_anatomy
from dsfreeze.plan import FreezePlan
from dsfreeze.prefix.eviction import EVICT, Asked, Eviction, evict, read_digests, refuse_early, refuse_metrics, without
from dsfreeze.recipe import ModelOptions, Recipe
from dsfreeze.setting import setting_of
from dsfreeze.strategies import make_plan


@dataclass
class Job:
    """A recipe made concrete. `anatomy` is the module's as it trains, adapters included; `plain` is without them.

    `plan` is the one in force, which an adaptive strategy revises; `first_plan` the one the run began with. With an `eviction` the
    module holds no prefix, whose layers' digests (`embed` first) are in `prefix_digests`; anatomies are the whole model's in any case.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    data: TaskData
    module: PreTrainedModel
    anatomy: Anatomy
    plan: FreezePlan
    base: Base
    plain: Anatomy
    first_plan: FreezePlan
    eviction: Eviction | None = None
    prefix_digests: tuple[str, ...] = ()

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.train.output_dir)

    @property
    def held(self) -> Anatomy:
        """The anatomy of what the module holds: an engine's, and what can be exported from it."""
        return without(self.anatomy, self.eviction.names) if self.eviction else self.anatomy

    def read_part(self, kept: Collection[str]) -> PreTrainedModel:
        """The model with the named tensors alone, read from its files; no adapters."""
        return task_module(self.recipe, self.data, self.recipe.model, kept=kept)

    def whole_module(self) -> PreTrainedModel:
        """The module with its prefix, adapters in place. Where that is evicted the whole model is read again, into host memory."""
        if self.eviction is None:
            return self.module
        module = task_module(self.recipe, self.data, self.recipe.model)
        _add_adapters(module, self.plan, self.recipe)
        for parameter in module.parameters():  # as an engine takes it over
            parameter.data = parameter.data.to(dtype_of(self.recipe))
        return module


def load_task(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, TaskData, PreTrainedModel]:
    """Tokenizer, tokenised examples and the model with the head the task needs (fresh heads seeded by train.seed)."""
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe, tokenizer)
    return tokenizer, data, task_module(recipe, data, recipe.model)


def task_module(
    recipe: Recipe, data: TaskData, model: ModelOptions, *, kept: Collection[str] | None = None
) -> PreTrainedModel:
    """A model with the head that the recipe's task needs; `kept` names what of it is read, None is everything."""
    return load_model(
        model,
        recipe.task,
        data.num_labels,
        labels=data.labels,
        dtype=dtype_of(recipe),
        seed=recipe.train.seed,
        kept=kept,
    )


def dtype_of(recipe: Recipe) -> torch.dtype:
    """Of weights and states."""
    return torch.bfloat16 if recipe.train.bf16 else torch.float32


def prepare_job(recipe: Recipe, num_steps: int | None = None, *, whole: bool = False) -> Job:
    """Load and plan; raises UserError for every mistake in the recipe that loading can find.

    `num_steps`: the run's length where it is known already; else the recipe and the data give it. `whole`: hold the whole model,
    whatever freeze.evict_prefix says.
    """
    if recipe.freeze.evict_prefix and not whole:
        job = prepare_evicted(recipe, num_steps)
        refuse_metrics(job.data)
        return job
    tokenizer, data, module = load_task(recipe)
    plain = read_anatomy(module, recipe.model.name)
    plan = _plan(recipe, data, plain, num_steps)
    base = Base(recipe.model.name, base_hash(module), plain.digest)
    _add_adapters(module, plan, recipe)
    return Job(recipe, tokenizer, data, module, plan.adapted(plain), plan, base, plain, plan)


def prepare_evicted(recipe: Recipe, num_steps: int | None = None, asked: Asked = EVICT) -> Job:
    """The same without the prefix's weights, which are read once and given up again, for the base's hash."""
    refuse_early(recipe, asked)
    tokenizer = load_tokenizer(recipe.model)
    data = prepare(recipe, tokenizer)
    outline = outline_of(recipe.model, recipe.task, data.num_labels, labels=data.labels)
    plain = read_anatomy(outline, recipe.model.name)
    plan = _plan(recipe, data, plain, num_steps)
    eviction = evict(outline, plain, plan, asked)

    def read(kept: Collection[str]) -> PreTrainedModel:
        return task_module(recipe, data, recipe.model, kept=kept)

    module = read({t.name for t in plain.tensors} - eviction.names)
    digest, layers = read_digests(
        read, module, outline, plain, eviction, room=room_of(recipe, plan, plain), dtype=dtype_of(recipe)
    )
    base = Base(recipe.model.name, digest, plain.digest)
    _add_adapters(module, plan, recipe)
    return Job(recipe, tokenizer, data, module, plan.adapted(plain), plan, base, plain, plan, eviction, tuple(layers))


def room_of(recipe: Recipe, plan: FreezePlan, plain: Anatomy) -> int:
    """Bytes that the prefix may take while it passes by: what training holds on a rank beside weights, gradients and Adam's states
    of the largest phase (and fp32 masters in bf16), which do not exist yet then."""
    numel = {t.name: t.numel for t in plan.adapted(plain).tensors}
    largest = max(sum(numel[name] for name in phase.trainable) for phase in plan.phases)
    setting = setting_of(recipe, read_ranks().world_size)
    return largest * (14 if recipe.train.bf16 else 12) // (setting.world_size if setting.stage else 1)


def _plan(recipe: Recipe, data: TaskData, plain: Anatomy, num_steps: int | None) -> FreezePlan:
    setting = setting_of(recipe, read_ranks().world_size)
    return make_plan(plain, recipe.planned_freeze, num_steps or _num_steps(recipe, data), setting)


def _add_adapters(module: nn.Module, plan: FreezePlan, recipe: Recipe) -> None:
    if plan.adapter is not None:
        add_adapters(module, plan.adapter, seed=recipe.train.seed)


def _num_steps(recipe: Recipe, data: TaskData) -> int | None:
    """How many optimizer steps the run has; None when there is nothing to train on."""
    if data.train is None:
        return None
    return num_steps_of(recipe.train, len(data.train), read_ranks().world_size)
