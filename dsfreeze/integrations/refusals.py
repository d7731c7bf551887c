"""Trainers and plans that `attach` cannot serve, each refused by name with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from transformers.training_args import ParallelMode

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.plan import FreezePlan

#: Optimizers whose state our checkpoints know: two moments and a step count.
ADAMS = ("Adam", "AdamW", "FusedAdam", "DeepSpeedCPUAdam")

Check = tuple[Callable[[Trainer, FreezePlan], Any], str, str]


def moves(plan: FreezePlan) -> bool:
    """Whether a plan ever changes what trains."""
    return len({phase.trainable for phase in plan.phases}) > 1


def _unread_options(trainer: Trainer, _: FreezePlan) -> bool:
    return not isinstance(trainer.args.activation_checkpointing_kwargs or {}, dict)


def _reentrant(trainer: Trainer, _: FreezePlan) -> bool:
    options: Any = trainer.args.activation_checkpointing_kwargs or {}
    return bool(trainer.args.activation_checkpointing and options.get("use_reentrant"))


def _partial_checkpointing(trainer: Trainer, _: FreezePlan) -> bool:
    options = trainer.args.activation_checkpointing_kwargs or {}
    return bool(trainer.args.activation_checkpointing and set(options) - {"use_reentrant"})


def _is_ddp(trainer: Trainer, plan: FreezePlan) -> bool:
    # DISTRIBUTED is of a single rank too, which torchrun starts as it starts several
    wrapped = trainer.args.world_size > 1 or trainer.args.parallel_mode is ParallelMode.DISTRIBUTED
    return wrapped and not trainer.is_deepspeed_enabled and moves(plan)


def _pushes_checkpoints(trainer: Trainer, _: FreezePlan) -> bool:
    return bool(trainer.args.push_to_hub and trainer.args.hub_strategy != "end")


#: (whether it is so, its name, why it is refused and what to do instead)
REFUSED: tuple[Check, ...] = (
    (lambda t, p: p.decide_at is not None, "an adaptive plan",
     "it is revised from measurements that only our own loop makes; train from a recipe: dsfreeze train"),
    (lambda t, p: p.adapter is not None, "a plan with adapters",
     "it needs them put into the model and merged on export; train from a recipe: dsfreeze train"),
    (lambda t, p: p.masks, "a plan with masks of elements",
     "only our own engines hold elements back; train from a recipe: dsfreeze train"),
    (lambda t, p: hasattr(t.model, "peft_config"), "a model with peft adapters",
     "its trainable tensors are the adapters, and peft saves them itself; leave out attach"),
    (lambda t, p: t.is_in_train or t.state.global_step > 0, "a Trainer that is already stepping",
     "its optimizer was built for another set; attach before trainer.train()"),
    (lambda t, p: t.is_fsdp_enabled or t.is_fsdp_xla_enabled, "FSDP",
     "its flat parameters fix what trains when they are built; use DeepSpeed ZeRO-3"),
    (lambda t, p: t.is_distributed_loading_by_transformers, "a model sharded by transformers",
     "its tensors are DTensors; use DeepSpeed ZeRO-3"),
    (_is_ddp, "a moving plan under DDP",
     "DDP fixes which gradients it reduces when it is built; launch with DeepSpeed, ZeRO 0 does the same work"),
    (lambda t, p: t.args.n_gpu > 1, "DataParallel", "it copies the module for every step; launch one process a GPU"),
    (lambda t, p: t.args.fp16, "fp16", "its loss scaling skips steps without a word to the plan; use bf16"),
    (lambda t, p: t.args.auto_find_batch_size, "auto_find_batch_size", "it starts the run anew; set the batch size"),
    (lambda t, p: t.model_init is not None, "model_init", "it makes a new model at train(); pass the model"),
    (lambda t, p: t.args.load_best_model_at_end and moves(p), "load_best_model_at_end with a moving plan",
     "the best checkpoint does not hold what trained after it; load it from its folder instead"),
    (_pushes_checkpoints, "pushing checkpoints to the hub", "they hold trained tensors alone; set hub_strategy='end'"),
    (_unread_options, "activation_checkpointing_kwargs that are no dictionary",
     "transformers reads a string as JSON alone; write a dictionary, or leave them out"),
    (_reentrant, "reentrant gradient checkpointing",
     "below a frozen prefix it gives no gradients; set use_reentrant to False"),
    (_partial_checkpointing, "every_n_layers, offload and other activation_checkpointing_kwargs",
     "checkpointing is placed by the plan, from the lowest trainable layer up; leave them out"),
)  # fmt: skip


def require_served(trainer: Any, plan: FreezePlan) -> None:
    """UserError for what `attach` cannot serve."""
    if not isinstance(trainer, Trainer):
        raise UserError(f"attach takes a transformers Trainer (TRL's are), not a {type(trainer).__name__}.")
    if getattr(trainer, "_dsfreeze", None) is not None:
        raise UserError("This Trainer has a plan attached already. Make a new Trainer for another plan.")
    for is_so, name, reason in REFUSED:
        if is_so(trainer, plan):
            raise UserError(f"attach cannot serve {name}: {reason}.")


def require_names(plan: FreezePlan, anatomy: Anatomy) -> None:
    """UserError when the plan trains tensors that the model lacks."""
    own = {tensor.name for tensor in anatomy.tensors}
    missing = sorted(plan.ever_trained - own)
    if missing:
        raise UserError(
            f"The plan trains {len(missing)} tensors that the Trainer's model lacks, such as '{missing[0]}'."
            f"{did_you_mean(missing[0], own)} Make the plan from this model's anatomy."
        )


def require_adam(optimizer: Any) -> None:
    """UserError for an optimizer with other state than Adam's."""
    if type(optimizer).__name__ not in ADAMS or any(group.get("amsgrad") for group in optimizer.param_groups):
        raise UserError(
            f"attach cannot serve the optimizer {type(optimizer).__name__}: its state is not known to be two moments and "
            "a step count for every tensor. Use optim='adamw_torch'."
        )
