"""What comes into every matrix: of each input its squared norm over all tokens, and nothing else is kept.

One example at a time, so that no padding is among the tokens, whatever shape a module sees them in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from dsfreeze.analyze.bench import Bench, halves_of
from dsfreeze.anatomy import Tensor
from dsfreeze.engine import Engine
from dsfreeze.evaluation import deal, losses_of
from dsfreeze.scores.spectrum import matrices

#: By tensor, of each input the sum of squares, float64.
Sums = dict[str, torch.Tensor]


def squared_inputs(bench: Bench) -> tuple[dict[str, np.ndarray], ...]:
    """For each half of the examples, by matrix (inputs,): the sum of squares of each input over the half's tokens (collective). A
    matrix whose module is never called, such as one of an attention that multiplies by itself, is left out."""
    engine, tensors = bench.engine, matrices(bench.anatomy)
    first, _ = halves_of(len(bench.examples))
    sums: tuple[Sums, Sums] = ({}, {})
    examples = [np.asarray([index]) for index in range(len(bench.examples))]
    for chosen, counts in bench.watch(list(deal(examples, engine.rank, engine.world_size))):
        own = sums[int(chosen[0] >= len(first))] if counts else {}
        with watched_inputs(engine.module, tensors, own):
            losses_of(engine, bench.data, bench.collate(chosen))
    called = {name for share in engine.gather([*sums[0], *sums[1]]) for name in share}
    return tuple({t.name: _over_ranks(engine, half, t) for t in tensors if t.name in called} for half in sums)


def _over_ranks(engine: Engine, sums: Sums, tensor: Tensor) -> np.ndarray:
    nothing = torch.zeros(tensor.numel // tensor.outputs, dtype=torch.float64)
    return np.asarray(engine.sum(sums.get(tensor.name, nothing).tolist()))


def column_sums(bench: Bench) -> dict[str, np.ndarray]:
    """By matrix (inputs,): the sum of the absolute weights that each input meets, float64 (collective)."""
    found = {}
    for tensor in matrices(bench.anatomy):
        weight = bench.engine.read_weight(tensor.name).abs()
        found[tensor.name] = weight.sum(1 if tensor.fan_in_fan_out else 0, dtype=torch.float64).numpy()
    return found


@contextmanager
def watched_inputs(module: nn.Module, tensors: Sequence[Tensor], sums: Sums) -> Iterator[None]:
    """Within it a forward pass adds the squares of what comes into each tensor's module to `sums`."""

    def add(name: str, _: nn.Module, args: Any) -> None:
        squares = args[0].detach().flatten(0, -2).float().square().sum(0, dtype=torch.float64).cpu()
        sums[name] = sums[name] + squares if name in sums else squares

    with ExitStack() as stack:
        for tensor in tensors:
            hook = module.get_submodule(tensor.module).register_forward_pre_hook(partial(add, tensor.name))
            stack.callback(hook.remove)
        yield
