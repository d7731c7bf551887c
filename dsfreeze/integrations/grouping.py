"""The parameter groups that a trainer made, remembered by tensor name: sets come and go, hyper-parameters stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError


@dataclass(frozen=True)
class Grouping:
    """`hyper`: each group without its parameters; `number`: the group of every tensor that the plan ever trains."""

    hyper: tuple[dict[str, Any], ...]
    number: Mapping[str, int]
    defaults: Mapping[str, Any]

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, module: nn.Module, names: Iterable[str]) -> Grouping:
        """As the optimizer has them now; UserError when it lacks one of the named tensors."""
        named = dict(module.named_parameters())
        place = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        missing = [name for name in sorted(names) if id(named[name]) not in place]
        if missing:
            raise UserError(
                f"The Trainer's optimizer does not hold '{missing[0]}', which the plan trains. Leave the optimizer to the "
                "Trainer, or give it every tensor that the plan ever trains."
            )
        return cls(_without_parameters(optimizer), {n: place[id(named[n])] for n in names}, dict(optimizer.defaults))

    @classmethod
    def single(cls, optimizer: torch.optim.Optimizer, names: Iterable[str]) -> Grouping:
        """Everything alike: DeepSpeed's own optimizer, from its configuration, is given one group of what trains first."""
        return cls(_without_parameters(optimizer)[:1], dict.fromkeys(names, 0), dict(optimizer.defaults))

    def groups_of(
        self, names: Iterable[str], anatomy: Anatomy, tensors: Mapping[str, torch.Tensor]
    ) -> list[dict[str, Any]]:
        """Groups of the named tensors, one per layer and group of the trainer's, for `optimizer.param_groups`."""
        groups: dict[tuple[str, int], dict[str, Any]] = {}
        for name in names:
            number = self.number[name]
            key = (anatomy.layer_of[name].name, number)
            groups.setdefault(key, {**self.hyper[number], "params": []})["params"].append(tensors[name])
        return list(groups.values())

    def settings(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Hyper-parameters by tensor name, as `refreeze` takes them. The learning rate is written before every step."""
        return {
            name: {k: v for k, v in self.hyper[self.number[name]].items() if k in self.defaults and k != "lr"}
            for name in names
        }


def _without_parameters(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], ...]:
    return tuple({k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups)
