"""What an analysis has seen: tables with a row for each example (or batch), from which scores are mere reductions.

So the same scores of any half of the calibration data cost nothing more, which is how their stability is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from dsfreeze.anatomy import Anatomy
from dsfreeze.strategies.evidence import Change

#: Numbers by layer, by tensor, or both.
Scores = Mapping[str, float]

#: Tables with a row for each example, and with a row for each batch.
BY_EXAMPLE, BY_BATCH = ("influence", "fisher", "ablation"), ("gradients", "first_step")


@dataclass(frozen=True)
class Observations:
    """L is the number of transformer layers, T that of their tensors; tables are float64. Empty where a pass was not made."""

    anatomy: Anatomy
    tables: Mapping[str, np.ndarray] = field(default_factory=dict)
    """`influence`, `ablation` (examples, L); `fisher` (examples, T): squared gradients of log p; `gradients` (batches, T):
    squared norms; `first_step` (batches, T): what AdamW's first step lowers the loss by, per unit of learning rate."""
    traces: Mapping[str, np.ndarray] = field(default_factory=dict)
    """(rows, L + 1) distances of each space's state to its label."""
    labels: Sequence[Sequence[int]] = ()
    """Of each example the labels that its traces are measured against."""
    spaces: Sequence[torch.Tensor] = ()
    """L + 1 times (examples, positions, d), fp32: states at a few positions of each example."""
    reference_spaces: Sequence[torch.Tensor] = ()
    """The same of the reference model."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Squared norm of each tensor."""
    inputs: Sequence[Mapping[str, np.ndarray]] = ()
    """Of each half of the examples, by matrix (inputs,): the squared norm of each input over the tokens."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By matrix (inputs,): the sum of the absolute weights that each input meets."""
    changes: Sequence[Mapping[str, Change]] = ()
    """Of each probe run, how far every tensor moved."""
    sizes: Sequence[Mapping[str, tuple[float, float]]] = ()
    """Of each probe run, by tensor: its gradient's mean L1 norm in the first half of the steps, and in the second."""
    gates: Sequence[Sequence[float]] = ()
    """(fits, L) logits of the gates on the weight change."""
    spectra: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Numbers of each matrix's singular values, by score and tensor."""

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.anatomy.blocks)

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """Names of the layers' tensors: the columns of the tables with T of them."""
        return tuple(t.name for t in self.anatomy.block_tensors)

    @property
    def states(self) -> list[torch.Tensor]:
        """(examples x positions, d) of each space."""
        return [space.flatten(0, 1) for space in self.spaces]

    @property
    def reference(self) -> list[torch.Tensor]:
        return [space.flatten(0, 1) for space in self.reference_spaces]

    def mean(self, table: str) -> list[float]:
        """Of each column of a table, its mean over the rows; independent of their order."""
        means: list[float] = np.sort(self.tables[table], axis=0).mean(axis=0).tolist()
        return means

    def with_layers(self, per_tensor: Mapping[str, float]) -> dict[str, float]:
        """Numbers that add up, by tensor and summed by layer."""
        layers = {layer.name: sum(per_tensor[t.name] for t in layer.tensors) for layer in self.anatomy.blocks}
        return {**layers, **per_tensor}

    def halves(self, random: np.random.Generator) -> tuple[Observations, Observations]:
        """Two disjoint halves of the examples and of the batches; of the two probes, fits and sums over inputs, one each."""
        draw = int(random.integers(2**63))

        def cut(values: np.ndarray | torch.Tensor, side: int) -> np.ndarray | torch.Tensor:
            # tables of one length are cut alike, and whatever else there is
            order = np.random.default_rng([draw, len(values)]).permutation(len(values))
            return values[np.array_split(order, 2)[side]]

        return self._part(cut, 0), self._part(cut, 1)

    def _part(self, cut: Callable[[Any, int], Any], side: int) -> Observations:
        return replace(
            self,
            tables={name: cut(table, side) for name, table in self.tables.items()},
            traces={name: cut(trace, side) for name, trace in self.traces.items()},
            spaces=[cut(space, side) for space in self.spaces],
            reference_spaces=[cut(space, side) for space in self.reference_spaces],
            inputs=self.inputs[side : side + 1],
            changes=self.changes[side : side + 1],
            sizes=self.sizes[side : side + 1],
            gates=self.gates[side : side + 1],
        )
