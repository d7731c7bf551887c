"""Low-rank adapters (LoRA, DoRA) through peft, injected in place so that the module keeps its class and names."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from dsfreeze.plan import Adapter


def add_adapters(module: nn.Module, adapter: Adapter, seed: int) -> None:
    """Put adapters on the matrices that `adapter.targets` names; names and shapes are `Anatomy.with_adapters`' own.

    A (r, in) is drawn from `seed`, B (out, r) is zero, so the module computes what it did; adapters take their matrix's
    dtype and device. Freezes everything else, which entering a phase does anyway.
    """
    targets = [name.rpartition(".")[0] for name in adapter.targets]
    alpha: Any = adapter.alpha  # peft declares an int, and only divides it
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        # a regular expression matches whole paths; a list of names would match their ends too
        target_modules="|".join(re.escape(target) for target in targets),
        fan_in_fan_out=isinstance(module.get_submodule(targets[0]), Conv1D),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, module)
    for target in targets:
        layer: Any = module.get_submodule(target)
        matrix = layer.get_base_layer().weight
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(matrix.dtype)


def merge_adapters(module: nn.Module) -> None:
    """Add each adapter's update to its matrix and take the adapter away, in place; names are the base model's again."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(module, "peft_config"):
        del module.peft_config
