"""Our engines around a module and an optimizer that somebody else made and steps.

Entering phases, state by tensor name, prefix and checkpointing are the engines' own; these classes only find where
things are. Forward, backward and step stay the trainer's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import TensorState
from dsfreeze.engine.base import BaseEngine
from dsfreeze.engine.flats import Flat, whole
from dsfreeze.engine.groups import by_name
from dsfreeze.engine.layout import flats_of, group_numbers
from dsfreeze.engine.local import LocalEngine
from dsfreeze.engine.parcels import Parcel
from dsfreeze.engine.ranks import read_ranks
from dsfreeze.engine.refreeze import live_names, refreeze, regroup
from dsfreeze.engine.zero import ZeroEngine
from dsfreeze.integrations.grouping import Grouping
from dsfreeze.plan import FreezePlan


class Adopted(BaseEngine):
    """What both have in common. `grouping`: the parameter groups as the trainer made them."""

    grouping: Grouping

    def _adopt(
        self, module: nn.Module, anatomy: Anatomy, plan: FreezePlan, device: torch.device, *, checkpointing: bool
    ) -> None:
        bf16 = next(module.parameters()).dtype == torch.bfloat16
        options = SimpleNamespace(bf16=bf16, weight_decay=0.0, gradient_checkpointing=checkpointing)
        # an empty module first: the engines' own start moves and casts weights, which are the trainer's here
        recipe: Any = SimpleNamespace(train=options)
        BaseEngine.__init__(self, nn.Module(), anatomy, recipe, device, state=plan.state, drop_master=plan.drop_master)
        self.module, self._named, self._parameters = module, by_name(module), list(module.named_parameters())

    def before_forward(self) -> None:
        """The prefix back into eval mode: the trainer calls `model.train()` before every forward pass."""
        assert self._modes is not None, "enter a phase first"
        self._modes.train()

    def check_flags(self) -> None:
        self._check_flags()

    @torch.no_grad()
    def load_weights(self, state: Mapping[str, TensorState]) -> None:
        self.write_weights({name: entry["weight"].to(self.dtype) for name, entry in state.items()})

    def let_go(self) -> None:
        """Take away our hooks and leave everything else to the trainer."""
        BaseEngine.close(self)

    @abstractmethod
    def members(self) -> list[str]:
        """For each parameter group of the optimizer, a tensor in it, which stands for all of them."""


class AdoptedLocal(Adopted, LocalEngine):
    """A plain torch optimizer, which steps the weights themselves, whatever their dtype: there are no masters."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, grouping: Grouping, anatomy: Anatomy,
        plan: FreezePlan, device: torch.device, *, checkpointing: bool,
    ) -> None:  # fmt: skip
        self._adopt(module, anatomy, plan, device, checkpointing=checkpointing)
        self.optimizer, self.grouping, self._idle = optimizer, grouping, []

    def _build(self) -> list[Flat]:
        names = [name for group in self.groups for name in group.tensors]
        self.optimizer.state.clear()  # the state of what goes on is put back by `_refreeze`
        self.optimizer.param_groups[:] = self.grouping.groups_of(names, self.anatomy, self._named)
        return [whole(name, self._named[name]) for name in names]

    def _live(self) -> list[Parcel]:
        state = self.optimizer.state
        return [Parcel(flat, dict(state.get(flat.tensor, {})), has_master=False, live=True) for flat in self.flats]

    def members(self) -> list[str]:
        names = {id(parameter): name for name, parameter in self._parameters}
        return [names[id(group["params"][0])] for group in self.optimizer.param_groups]


class AdoptedZero(Adopted, ZeroEngine):
    """A live DeepSpeed engine. It is changed in place only: the trainer's loop holds on to the object."""

    def __init__(
        self, engine: Any, grouping: Grouping, anatomy: Anatomy, plan: FreezePlan, *, checkpointing: bool
    ) -> None:
        ranks = read_ranks()
        self.rank, self.world_size, self.config = ranks.rank, ranks.world_size, engine.config
        self.stage = engine.zero_optimization_stage()
        self._adopt(engine.module, anatomy, plan, ranks.device, checkpointing=checkpointing)
        self.engine, self.grouping = engine, grouping
        self._own_rates = bool(plan.rates)

    def _build(self) -> list[Flat]:
        if self.stage == 0:
            self.engine.basic_optimizer.state.clear()  # in bf16 DeepSpeed takes a trial step while it is built
        names = [name for group in self.groups for name in group.tensors]
        if set(names) != set(live_names(self.engine)):
            self._refreeze(tuple(names))
        elif self._own_rates:  # the trainer's groups hold several layers
            with self._scheduler_aside():
                regroup(self.engine, {}, method="in_place")
        self._take_over()
        return self.flats

    def _refreeze(self, names: tuple[str, ...]) -> None:
        with self._scheduler_aside():
            refreeze(
                self.engine, names, self.rule, drop_master=self.drop_master,
                settings=self.grouping.settings(names), method="in_place",
            )  # fmt: skip
        self._take_over()

    def _prepare_groups(self, steps: Mapping[str, float | None]) -> None:
        with self._scheduler_aside():
            super()._prepare_groups(steps)

    @contextmanager
    def _scheduler_aside(self) -> Iterator[None]:
        """The scheduler knows the trainer's groups alone; `Rates` writes what it says to the groups of now."""
        scheduler, self.engine.lr_scheduler = self.engine.lr_scheduler, None
        try:
            yield
        finally:
            self.engine.lr_scheduler = scheduler

    def members(self) -> list[str]:
        flats = flats_of(self.engine, self.rank, self.world_size)
        names: dict[int, str] = {}
        for flat, number in zip(flats, group_numbers(self.engine), strict=True):
            names.setdefault(number, flat.names[0])
        return [names[number] for number in range(len(names))]
