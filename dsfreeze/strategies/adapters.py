"""Adapters: low-rank matrices beside the frozen weights that a strategy would otherwise train.

Names and shapes are peft's, as `Anatomy.with_adapters` gives them; nothing here needs torch or peft.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsfreeze.anatomy import ATTENTION, FUSED, MLP, Anatomy, Tensor
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.plan import Adapter
from dsfreeze.recipe import AdapterOptions

MATRICES = (*ATTENTION, *MLP)


def make_adapter(anatomy: Anatomy, options: AdapterOptions, trainable: frozenset[str]) -> Adapter:
    """The adapters for those trainable tensors that are matrices of the options' categories; UserError when none is."""
    wanted = _wanted(options.categories)
    blocks = [t for t in anatomy.block_tensors if t.name in trainable]
    targets = tuple(t.name for t in blocks if _takes_adapter(t) and t.category in wanted)
    if not targets:
        raise UserError(
            "freeze.adapter has no matrix to sit on: none of the categories "
            f"{', '.join(options.categories) or '(none)'} is among what this choice of layers trains. "
            "Train a layer that holds one, or name other freeze.adapter.categories."
        )
    return Adapter(options.kind, options.r, float(options.alpha), options.dropout, targets)


def adapter_names(adapted: Anatomy, targets: Iterable[str]) -> frozenset[str]:
    """The tensors that the adapters of these matrices brought."""
    modules = {name.rpartition(".")[0] for name in targets}
    adapters = (t for t in adapted.tensors if t.category == "adapter")
    return frozenset(t.name for t in adapters if t.name.partition(".lora_")[0] in modules)


def left_out(anatomy: Anatomy, options: AdapterOptions) -> tuple[str, ...]:
    """A note when matrices of the wanted categories cannot take an adapter (experts packed in one tensor)."""
    wanted = _wanted(options.categories)
    packed = [t for t in anatomy.block_tensors if t.category in wanted and not _takes_adapter(t)]
    return (f"{len(packed)} packed expert tensors take no adapter and stay frozen",) if packed else ()


def _takes_adapter(tensor: Tensor) -> bool:
    return len(tensor.shape) == 2 and tensor.category in MATRICES


def _wanted(categories: list[str]) -> set[str]:
    """The categories, with each fused one that holds any of them."""
    for name in categories:
        if name not in MATRICES:
            raise UserError(f"freeze.adapter.categories names '{name}'.{did_you_mean(name, MATRICES)}")
    return set(categories) | {fused for fused, parts in FUSED.items() if set(parts) & set(categories)}
