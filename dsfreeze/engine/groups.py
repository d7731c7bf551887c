"""Parameter groups: one per layer, in model order; in two where weight decay must spare biases and norm gains.

Adam counts steps per flat group under ZeRO, and a group's shard depends on nothing but its tensors and the world size.
One layer a group therefore keeps bias correction right and a layer's state whole when the set changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.recipe import TrainOptions

UNDECAYED = ("bias", "norm")


@dataclass(frozen=True)
class Group:
    """The trained tensors of one layer that share a decay setting."""

    layer: str
    tensors: tuple[str, ...]
    weight_decay: float


def group_tensors(anatomy: Anatomy, trainable: Sequence[str], weight_decay: float) -> list[Group]:
    """Groups of the named tensors in model order, none empty; decayed before undecayed within a layer."""
    chosen = set(trainable)
    groups: list[Group] = []
    for layer in anatomy.layers:
        tensors = [t for t in layer.tensors if t.name in chosen]
        decayed = [t.name for t in tensors if weight_decay == 0 or t.category not in UNDECAYED]
        spared = [t.name for t in tensors if weight_decay > 0 and t.category in UNDECAYED]
        groups += [Group(layer.name, tuple(names), d) for names, d in ((decayed, weight_decay), (spared, 0.0)) if names]
    return groups


def make_adamw(
    groups: Sequence[Group], tensors: Mapping[str, torch.Tensor], options: TrainOptions
) -> torch.optim.AdamW:
    """torch's fused AdamW over the groups, `tensors` by name; compiles nothing.

    The learning rate is 0 until a step writes its own, so that DeepSpeed's trial step at stage 0 in bf16 (zero
    gradients, but weight decay) changes nothing.
    """
    return torch.optim.AdamW(
        [{"params": [tensors[name] for name in group.tensors], **settings_of(group)} for group in groups],
        lr=0.0,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        fused=True,
    )


def settings_of(group: Group) -> dict[str, Any]:
    """The hyper-parameters that a group's tensors carry in the optimizer, its layer among them."""
    return {"lr": 0.0, "weight_decay": group.weight_decay, "layer": group.layer}


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float, own_rates: Mapping[str, float]) -> None:
    """Write the step's learning rate into every group of the optimizer; `own_rates` by layer go before."""
    for entry in optimizer.param_groups:
        entry["lr"] = own_rates.get(entry["layer"], learning_rate)


def by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter under each of its names (a tied head has two)."""
    return dict(module.named_parameters(remove_duplicate=False))
