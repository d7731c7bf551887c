"""Which weights ZeRO stage 3 gathers in one forward and backward pass, how often, and how many lie gathered at once.

A replay of DeepSpeed 0.19.8 (`runtime/zero/partitioned_param_coordinator.py`: `fetch_sub_module`,
`release_sub_module`, `__params_to_release`) over the modules of an anatomy, in the order in which they run:

- every module's own tensors are gathered before its forward, the frozen prefix's too, unless its states are read from a cache: then
  its modules do not run (from our loop, which runs the layers above alone; not counted against DeepSpeed's calls);
- and before its backward, where its output needs a gradient: something in it trains, or something trainable feeds it.
  Below the cut there is no backward;
- a recomputing block runs its forward once more in between. Its last module opens the block's backward; the others are
  gathered for the recomputation. What trains is then still there for its own backward, so that recomputing costs no
  second gather of it; what is frozen is released as soon as the opening module is done, whatever the limits say
  (`ds_recompute_parameters`), and gathered again. A block of the lowest trainable layer also recomputes, and gathers, what lies
  below its lowest tensor;
- after its pass a tensor is released, unless it is persistent (`stage3_param_persistence_threshold` elements or
  fewer, frozen or not), or comes again within `stage3_max_reuse_distance` elements of modules, or the prefetcher has
  already passed the place where it comes again;
- every module that runs prefetches up to `stage3_prefetch_bucket_size` elements more, while less than
  `stage3_max_live_parameters` lie gathered. Since this runs ahead faster than modules release, a large model holds that
  many, by default 1e9 elements (2 GB in bf16) whatever trains; a model of fewer is gathered once and stays.

Measured (tests/distributed/test_communication.py, test_buffers.py: two ranks, six plans, with and without recomputation): no
difference in elements gathered or in the peak with prefetching off, with limits that hold the whole model, and mostly with
limits in the proportion that the default ones have to a model of 7e9 (else up to +3.5 % gathered and -20 % at the peak, for
frozen matrices under recomputation). Modules without tensors of their own prefetch too, and an anatomy has none: with a
prefetch of a seventh of the model the replay gathers up to 9 % too much. peft reads lora_A outside of its module: 0.3 %.
What is prefetched counts as of the pass in which it is sent, so some of the backward's is among the forward's.

Left out: the first two passes after the trainable set changed, when the trace is recorded (nothing is prefetched, all
is released); modules that run in another order than their layers stand (the parts of a parallel block, q and k norms),
which shifts what a distance catches by less than a layer; the second use of an encoder-decoder's shared embedding; weights
gathered for evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from dsfreeze import zero_keys
from dsfreeze.anatomy import Anatomy, Tensor
from dsfreeze.estimate.flops import places_of

_KEYS = (
    "stage3_param_persistence_threshold", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """The keys of zero_optimization that steer stage 3, in elements; by default what "auto" becomes."""

    persistence: int = zero_keys.AUTO_ZERO[_KEYS[0]]
    reuse: int = zero_keys.AUTO_ZERO[_KEYS[1]]
    prefetch: int = zero_keys.AUTO_ZERO[_KEYS[2]]
    live: int = zero_keys.AUTO_ZERO[_KEYS[3]]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Limits:
        """Those of a DeepSpeed configuration; where it is silent, DeepSpeed's own are equal to what "auto" becomes."""
        zero = config["zero_optimization"]
        return cls(*(int(zero.get(key, zero_keys.AUTO_ZERO[key])) for key in _KEYS))


@dataclass(frozen=True)
class Gathers:
    """Elements of a pass of one micro-batch: gathered before forwards and before backwards (recomputation included), and the
    most that lie gathered at once beyond the persistent ones."""

    forward: int
    backward: int
    peak: int


@dataclass(frozen=True)
class _Use:
    tensors: tuple[Tensor, ...]
    backward: bool
    held: bool = False
    """Whether its tensors stay until they come again: the pass is not over."""
    dropped: frozenset[str] = frozenset()
    """Tensors that are released after it whatever comes."""

    @property
    def numel(self) -> int:
        return sum(t.numel for t in self.tensors)


def gathers(
    anatomy: Anatomy, trainable: frozenset[str], limits: Limits, *, checkpointing: bool, cached: bool = False
) -> Gathers:
    """What stage 3 gathers in one pass, once its trace is complete (rules: above); `cached` when the prefix's states are read."""
    uses = list(_uses(anatomy, trainable, checkpointing, cached))
    keepers = _kept(uses, limits.reuse)
    queue = [(step, t) for step, use in enumerate(uses) for t in use.tensors if t.numel > limits.persistence]
    seen_at: dict[str, int] = {}  # the last use that the prefetcher has passed, by tensor
    live: dict[str, int] = {}
    counts, peak, head = [0, 0], 0, 0
    for step, use in enumerate(uses):
        wanted = [t for t in use.tensors if t.numel > limits.persistence and t.name not in live]
        live |= {t.name: t.numel for t in wanted}
        fetched = sum(t.numel for t in wanted)
        while head < len(queue) and queue[head][0] <= step:
            head += 1
        budget = min(limits.live - sum(live.values()), limits.prefetch)
        ahead = 0
        while head < len(queue) and ahead < budget:
            last, tensor = queue[head]
            head += 1
            seen_at[tensor.name] = max(seen_at.get(tensor.name, -1), last)
            if tensor.name not in live:
                live[tensor.name] = tensor.numel
                ahead += tensor.numel
        counts[use.backward] += fetched + ahead
        peak = max(peak, sum(live.values()))
        for tensor in use.tensors:
            if seen_at.get(tensor.name, -1) <= step and (step, tensor.name) not in keepers:
                live.pop(tensor.name, None)
        for name in use.dropped:
            live.pop(name, None)
    return Gathers(counts[0], counts[1], peak)


def persistent(anatomy: Anatomy, limits: Limits, evicted: frozenset[str] = frozenset()) -> int:
    """Elements that stay gathered, frozen ones too, a cached prefix's too, but not those that are `evicted`."""
    return sum(t.numel for t in anatomy.tensors if t.numel <= limits.persistence and t.name not in evicted)


def _kept(uses: Sequence[_Use], reuse: int) -> set[tuple[int, str]]:
    """The uses (step, tensor) after which the tensor comes again within `reuse` elements of the modules in between."""
    before = [0, *accumulate(use.numel for use in uses)]
    last: dict[str, int] = {}
    kept: set[tuple[int, str]] = set()
    for step, use in enumerate(uses):
        for tensor in use.tensors:
            previous = last.get(tensor.name)
            if previous is not None and (uses[previous].held or before[step] - before[previous + 1] < reuse):
                kept.add((previous, tensor.name))
            last[tensor.name] = step
    return kept


def _uses(anatomy: Anatomy, trainable: frozenset[str], checkpointing: bool, cached: bool) -> Iterator[_Use]:
    """Forward and backward of every module with tensors of its own, in the order in which they run."""
    modules, lowest = _modules(anatomy), _lowest(anatomy, trainable)
    cut = anatomy.lowest_trainable(trainable)
    yield from (_Use(tensors, False) for layer, _, tensors in modules if layer >= cut or not cached)
    recomputed = {n for n, layer in enumerate(anatomy.layers) if checkpointing and layer.is_block and n >= cut}
    backward = [
        (layer, _Use(tensors, True))
        for layer, place, tensors in reversed(modules)
        if place > lowest or any(t.name in trainable for t in tensors)
    ]
    for layer, use in backward:
        if layer not in recomputed:
            yield use
            continue
        recomputed.remove(layer)
        yield replace(use, held=True)
        inner = [tensors for n, _, tensors in modules if n == layer]
        yield from (_Use(tensors, True) for tensors in inner[:-1])
        frozen = frozenset(t.name for tensors in inner for t in tensors if t.name not in trainable)
        yield _Use(inner[-1], True, dropped=frozen)


def _modules(anatomy: Anatomy) -> list[tuple[int, tuple[int, float], tuple[Tensor, ...]]]:
    """(layer, place, own tensors) of every module as it runs; a tied embedding a second time at the end."""
    places = places_of(anatomy)
    found: dict[tuple[int, str], list[Tensor]] = {}
    for index, layer in enumerate(anatomy.layers):
        for tensor in layer.tensors:
            found.setdefault((index, tensor.module), []).append(tensor)
    tied = [t for t in anatomy.tensors if places[t.name][0] == len(anatomy.layers)]
    modules = [
        (index, (0, 0.0) if tensors[0] in tied else places[tensors[0].name], tuple(tensors))
        for (index, _), tensors in found.items()
    ]
    modules += [(len(anatomy.layers), places[t.name], (t,)) for t in tied]
    return sorted(modules, key=lambda module: module[1])


def _lowest(anatomy: Anatomy, trainable: frozenset[str]) -> tuple[int, float]:
    """Where the lowest trainable module runs."""
    running = [place for _, place, tensors in _modules(anatomy) if any(t.name in trainable for t in tensors)]
    return min(running, default=(len(anatomy.layers) + 1, 0.0))
