"""Training without the prefix: which tensors a run never holds, and reading a whole model's digests without holding it.

The transformer layers below the cut go, and the token embedding where nothing that stays is tied to it. The small tensors beside it
(positions, norms, relative positions that upper layers read) stay: a model's own forward pass looks them up on its way. So do the
modules, without weights, that names and hooks may go on as before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.data import TaskData
from dsfreeze.engine.memory import freed_memory_given_back, give_back
from dsfreeze.errors import UserError
from dsfreeze.metrics import generates
from dsfreeze.model import hash_tensors
from dsfreeze.plan import FreezePlan
from dsfreeze.prefix.keys import layer_digest
from dsfreeze.prefix.passage import cut_of
from dsfreeze.recipe import Recipe

#: Reads the named tensors of a model, and gives the module that holds them alone, on the CPU.
Load = Callable[[Collection[str]], nn.Module]


@dataclass(frozen=True)
class Asked:
    """What the user wrote that has the prefix pass by in parts, in the words of errors: what it `does`, and what to do `instead`."""

    does: str
    instead: str
    #: Where there is no prefix at all.
    pointless: str

    def refusal(self, why: str) -> UserError:
        return UserError(f"{self.does}, and {why}. {self.mend}")

    @property
    def mend(self) -> str:
        """`instead` as a sentence."""
        return f"{self.instead[0].upper()}{self.instead[1:]}."


EVICT = Asked(
    "freeze.evict_prefix trains without the prefix's weights",
    "write freeze.evict_prefix: false",
    "Else write freeze.evict_prefix: false.",
)
CACHE = Asked(
    "`dsfreeze cache` computes the prefix in parts before training",
    "train with freeze.prefix_cache=disk, which fills the cache on the way",
    "Else `dsfreeze cache` has nothing to do.",
)


@dataclass(frozen=True)
class Eviction:
    """The `cut` transformer layers of the prefix, and the names of the tensors that a run does without."""

    cut: int
    names: frozenset[str]
    asked: Asked = EVICT


def refuse_early(recipe: Recipe, asked: Asked = EVICT) -> None:
    """UserError for what does not go with what was asked for, as far as the recipe alone tells it."""
    if recipe.model.trust_remote_code:
        raise asked.refusal("a model with code of its own (model.trust_remote_code) is not read in parts")
    if recipe.data.packing and asked is EVICT:  # a cache that is only filled is tried out by the run that reads it
        raise asked.refusal("packed examples (data.packing) are tried out on the whole model first")


def refuse_metrics(data: TaskData) -> None:
    """UserError when the evaluation needs the prefix after all."""
    if generates(data.metrics):
        raise EVICT.refusal(f"one of the metrics ({', '.join(data.metrics)}) generates text, which passes the prefix")


def evict(outline: nn.Module, anatomy: Anatomy, plan: FreezePlan, asked: Asked = EVICT) -> Eviction:
    """What the plan's run can do without, from first step to last; `outline`: the whole model on the meta device, `anatomy` its own.

    UserError for a model of two stacks, for a plan that might need it after all, and where that is nothing.
    """
    if plan.decide_at is not None:
        raise asked.refusal(f"strategy '{plan.strategy}' decides on the way what trains, a lower layer too perhaps")
    if len({layer.stack for layer in anatomy.blocks}) != 1:
        stacks = "two" if anatomy.blocks else "none"
        raise asked.refusal(f"that goes through one stack of layers, and {anatomy.name} has {stacks}")
    adapted = plan.adapted(anatomy)
    cut = min(cut_of(adapted, phase.trainable) for phase in plan.phases)
    if cut == 0:
        raise UserError(
            f"Strategy '{plan.strategy}' leaves no layer frozen below all that trains, so there is no prefix to cache or to evict. Strategies "
            "with one are bottom, head, budget and salf, or patterns that freeze the embedding and the first layers; adapters on top "
            f"of them are fine. {asked.pointless}"
        )
    return Eviction(cut, _evictable(outline, anatomy, cut), asked)


def _evictable(outline: nn.Module, anatomy: Anatomy, cut: int) -> frozenset[str]:
    embedding = token_embedding(outline)
    lower = [t for layer in anatomy.blocks[:cut] for t in layer.tensors]
    lower += [t for t in anatomy.tensors if t.name in embedding]
    return frozenset(t.name for t in lower if not t.aliases)


def token_embedding(module: nn.Module) -> set[str]:
    """Names of the parameters that the look-up of a token reads."""
    model: Any = module
    own = {id(p) for p in model.get_input_embeddings().parameters(recurse=False)}
    return {name for name, parameter in module.named_parameters() if id(parameter) in own}


def without(anatomy: Anatomy, names: Collection[str]) -> Anatomy:
    """The anatomy of what is held: without the named tensors. A layer that loses all stays, empty, for its place and path."""
    layers = (
        replace(layer, tensors=tuple(t for t in layer.tensors if t.name not in names)) for layer in anatomy.layers
    )
    return replace(anatomy, layers=tuple(layers))


def prefix_layers(anatomy: Anatomy, cut: int) -> list[Layer]:
    """`embed`, if the model has one, and `layers.0` .. `layers.cut - 1`."""
    return [layer for layer in anatomy.layers if layer.name == "embed" or layer in anatomy.blocks[:cut]]


def groups_of(layers: Sequence[Layer], room: int, dtype: torch.dtype) -> list[list[Layer]]:
    """Consecutive layers whose weights in `dtype` take at most `room` bytes together, or one layer."""
    groups: list[list[Layer]] = []
    for layer in layers:
        if groups and sum(one.numel for one in (*groups[-1], layer)) * dtype.itemsize <= room:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return groups


def read_digests(
    load: Load,
    module: nn.Module,
    outline: nn.Module,
    anatomy: Anatomy,
    eviction: Eviction,
    *,
    room: int,
    dtype: torch.dtype,
) -> tuple[str, list[str]]:
    """(`base_hash` of the whole model, digests of its prefix's layers in `dtype`, input first), from `module`, which holds what is not
    evicted, and one reading of the rest in groups of at most `room` bytes. The whole model is never in memory."""
    order = [name for name, _ in outline.named_parameters()]
    layers = prefix_layers(anatomy, eviction.cut)
    parts = [layers[:1], *groups_of(layers[1:], room, dtype)]
    groups = [eviction.names.intersection(t.name for layer in part for t in layer.tensors) for part in parts]
    digests: dict[str, str] = {}
    stream = _every_tensor(order, dict(module.named_parameters()), groups, load)
    with freed_memory_given_back():
        base = hash_tensors(_noting(stream, layers, dtype, digests))
    give_back()
    return base, [digests[layer.name] for layer in layers]


def _every_tensor(
    order: Sequence[str], held: Mapping[str, torch.Tensor], groups: Sequence[Collection[str]], load: Load
) -> Iterator[tuple[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    for name in order:
        if name in held:
            yield name, held[name]
            continue
        if name not in part:
            part = {}  # given up before the next is read
            give_back()
            part = dict(load(next(group for group in groups if name in group)).named_parameters())
        yield name, part[name]


def _noting(
    stream: Iterator[tuple[str, torch.Tensor]], layers: Sequence[Layer], dtype: torch.dtype, digests: dict[str, str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The stream as it is; on its way each of the layers' digests, as soon as all of the layer has come by."""
    layer_of = {t.name: layer for layer in layers for t in layer.tensors}
    waiting: dict[str, dict[str, torch.Tensor]] = {layer.name: {} for layer in layers}
    for name, tensor in stream:
        yield name, tensor
        if (layer := layer_of.get(name)) is None:
            continue
        weights = waiting[layer.name]
        weights[name] = tensor.detach().to(dtype)
        if len(weights) == len(layer.tensors):
            digests[layer.name] = layer_digest(layer, weights)
            del waiting[layer.name], weights
