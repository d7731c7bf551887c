"""`attach(trainer, plan)`: make a Hugging Face Trainer train what the plan says, when it says so.

A callback enters the phases. What no callback reaches is replaced on the instance, and nowhere else: the Trainer builds
optimizer and engine once, for what trains then (`_prepare_for_training`, `create_optimizer`); its checkpoints hold every
frozen weight, and optimizer files that load one layer's state into another (`_save_checkpoint`, `save_model`,
`_save_optimizer_and_scheduler`, `_load_from_checkpoint`, `_load_best_model`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dsfreeze.anatomy import Anatomy
from dsfreeze.checkpoint import Base
from dsfreeze.engine.flats import Pieces, Slot
from dsfreeze.engine.modes import set_trainable
from dsfreeze.engine.parcels import full
from dsfreeze.engine.process import agree
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.engine.support import require_tested_version, unsupported
from dsfreeze.errors import UserError
from dsfreeze.integrations.adopted import Adopted, AdoptedLocal, AdoptedZero
from dsfreeze.integrations.checkpoints import Checkpoints
from dsfreeze.integrations.grouping import Grouping
from dsfreeze.integrations.rates import Rates
from dsfreeze.integrations.refusals import require_adam, require_names, require_served
from dsfreeze.model import base_hash, read_anatomy
from dsfreeze.plan import FreezePlan, Phase


def attach(trainer: Any, plan: FreezePlan, anatomy: Anatomy | None = None) -> Any:
    """Attach a static or moving plan to a transformers or TRL Trainer, before `train()`; returns the trainer.

    `anatomy`: the one the plan was made from; read from the model without it. Raises UserError, before anything has
    changed, for what cannot be served; see docs/integrations.md for that and for what is replaced. With several ranks
    every one must call it (collective at ZeRO-3).
    """
    require_served(trainer, plan)
    agree(plan.digest, "the freeze plan")
    anatomy = anatomy or _anatomy_of(trainer.model)
    require_names(plan, anatomy)
    trainer._dsfreeze = Attachment(trainer, plan, anatomy)
    trainer.add_callback(trainer._dsfreeze.callback)
    return trainer


class Attachment:
    """One trainer's plan, and the instance methods it replaces."""

    def __init__(self, trainer: Any, plan: FreezePlan, anatomy: Anatomy) -> None:
        self.trainer, self.plan, self.anatomy = trainer, plan, anatomy
        self.callback = PlanCallback(self)
        self.engine: Adopted | None = None
        self.rates: Rates | None = None
        self._grouping: Grouping | None = None
        self._phase: Phase | None = None
        model = trainer.model
        base = Base(str(getattr(model.config, "_name_or_path", "")), base_hash(_whole(model)), anatomy.digest)
        self.checkpoints = Checkpoints(trainer, plan, base, anatomy)
        self._upstream_prepare, self._upstream_optimizer = trainer._prepare_for_training, trainer.create_optimizer
        trainer._prepare_for_training, trainer.create_optimizer = self._prepare, self._create_optimizer
        set_trainable(model, plan.phases[0].trainable)
        model.register_forward_pre_hook(self._before_forward)

    # -- building ----------------------------------------------------------------------------------------------

    def _prepare(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Upstream's part, which builds optimizer, engine and scheduler, around the phase that the run is in; it is told
        of no checkpoint, because ours is loaded after it."""
        found = self.checkpoints.find(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.engine is not None:  # a second train()
            self.engine.let_go()
        # a checkpoint's last step may be the last of a phase: its state belongs to that one
        self._phase = self.plan.phase_at(found.step - 1 if found else 0)
        set_trainable(self.trainer.model, self._phase.trainable)
        prepared = self._upstream_prepare(max_steps, train_dataloader, None)
        _stop_checkpointing(self.trainer.model)
        known = self._adopt()
        assert self.engine is not None
        assert self._grouping is not None
        self.rates = Rates(self.trainer.lr_scheduler, self._grouping, known, self.plan, self.anatomy)
        self.checkpoints.engine, self.checkpoints.rates = self.engine, self.rates
        self.engine.enter(self._phase)
        if found:
            self.checkpoints.load(found)
        self._follow()
        return prepared

    def _create_optimizer(self, model: nn.Module | None = None) -> Any:
        """Upstream's groups of everything that the plan ever trains, remembered; then without what does not train yet, so
        that DeepSpeed makes no masters and moments for it."""
        set_trainable(self.trainer.model, self.plan.ever_trained)
        optimizer = self._upstream_optimizer(model)
        assert self._phase is not None
        set_trainable(self.trainer.model, self._phase.trainable)
        if not isinstance(optimizer, torch.optim.Optimizer):  # a stand-in for DeepSpeed's own, from its configuration
            return optimizer
        if self._grouping is None:
            require_adam(optimizer)
            self._grouping = Grouping.of(optimizer, self.trainer.model, self.plan.ever_trained)
        if self.trainer.is_deepspeed_enabled:
            _narrow(optimizer)
        return optimizer

    def _adopt(self) -> list[int]:
        """Find engine and optimizer as upstream left them; the numbers of the groups that its scheduler knows."""
        trainer, checkpointing = self.trainer, bool(self.trainer.args.activation_checkpointing)
        assert self._phase is not None
        if not trainer.is_deepspeed_enabled:
            assert self._grouping is not None
            self.engine = AdoptedLocal(
                trainer.model, trainer.optimizer.optimizer, self._grouping, self.anatomy, self.plan,
                trainer.args.device, checkpointing=checkpointing,
            )  # fmt: skip
            return list(range(len(self._grouping.hyper)))
        engine = trainer.model_wrapped
        require_tested_version()
        for refused in unsupported(engine):
            raise UserError(f"{refused}.")
        require_adam(engine.basic_optimizer)
        if self._grouping is None:  # DeepSpeed's own optimizer: upstream's was not asked for
            self._grouping = Grouping.single(engine.basic_optimizer, self.plan.ever_trained)
        self.engine = AdoptedZero(engine, self._grouping, self.anatomy, self.plan, checkpointing=checkpointing)
        return sorted({self._grouping.number[name] for name in self._phase.trainable})

    # -- steps -------------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Enter the phase of an optimizer step, and write its learning rates; before its first micro-batch."""
        assert self.engine is not None
        assert self.rates is not None
        self.engine.check_flags()
        phase = self.plan.phase_at(step)
        if phase is not self._phase:
            self.rates.write_plain(self.engine.optimizer.param_groups, self.engine.members())
            self.engine.enter(phase)
            self._phase = phase
            self._follow()
        self.rates.write(self.engine.optimizer.param_groups, self._members, step)

    def _follow(self) -> None:
        """Point accelerate's wrapper at the engine's optimizer of now."""
        assert self.engine is not None
        self._members = self.engine.members()
        if isinstance(self.engine, AdoptedZero):
            wrapper = self.trainer.optimizer
            wrapper.optimizer = self.engine.engine.optimizer
            wrapper.__has_overflow__ = hasattr(wrapper.optimizer, "overflow")

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if self.engine is not None and module.training:
            self.engine.before_forward()


class PlanCallback(TrainerCallback):
    """Tells the attachment of the trainer's steps."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._attachment.begin_step(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._attachment.begin_step(state.global_step)


# -- the model ---------------------------------------------------------------------------------------------------------


def _anatomy_of(model: nn.Module) -> Anatomy:
    """The model's anatomy; of one that ZeRO-3 has cut up, from its configuration on the meta device."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if not _is_cut_up(model):
        return read_anatomy(model, name)
    with torch.device("meta"):
        return read_anatomy(type(model)(copy.deepcopy(model.config)), name)


def _is_cut_up(model: nn.Module) -> bool:
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())


class _Gathered(nn.Module):
    """A module cut up by ZeRO-3 that shows whole parameters, one at a time (collective)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._cut_up = [model]

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        ranks = read_ranks()
        cut_up: Iterator[tuple[str, Any]] = self._cut_up[0].named_parameters()
        for name, parameter in cut_up:
            slot, share = Slot(name, tuple(parameter.ds_shape), 0), parameter.ds_tensor.data
            flat = Pieces(share, (slot,), ranks.rank, ranks.world_size)
            yield name, nn.Parameter(full(flat, share, slot, ranks.device).view(slot.shape), requires_grad=False)


def _whole(model: nn.Module) -> nn.Module:
    return _Gathered(model) if _is_cut_up(model) else model


def _stop_checkpointing(model: nn.Module) -> None:
    """Undo upstream's gradient checkpointing: on every block, and with a hook on the input that re-opens the graph down
    to the embedding. The engine places its own."""
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
        for number, hook in list(module._forward_hooks.items()):
            if "make_inputs_require_grad" in getattr(hook, "__qualname__", ""):
                del module._forward_hooks[number]


def _narrow(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
