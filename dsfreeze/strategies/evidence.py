"""What a run measures for an adaptive strategy between two decisions, and what a decision is. Plain numbers, no torch.

The engine measures, the loop carries the sums over ranks, rank 0 decides, every rank receives the revised plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dsfreeze.plan import FreezePlan

#: What a strategy asks to be measured: gradients of the trained tensors at every step, the weights' distance from where
#: they started, hidden states of a fixed probe batch against those of the start model.
Measure = Literal["gradient", "change", "activations"]


@dataclass(frozen=True)
class Gradient:
    """A tensor's gradients since the last decision (reduced over ranks, before clipping), summed over the steps in which
    it trained: L1 norms, L2 norms, squared L2 norms; `steps` is the number of those steps."""

    l1: float = 0.0
    l2: float = 0.0
    squared: float = 0.0
    steps: int = 0


@dataclass(frozen=True)
class Change:
    """A tensor's squared distance from its value at the start of the run, and the squared norm of that value."""

    squared: float
    start_squared: float


@dataclass(frozen=True)
class Similarity:
    """A layer's output on the probe batch, now against the start model's: linear CKA (1 = alike), and the
    similarity-preserving loss of Egeria (0 = alike)."""

    cka: float
    plasticity: float


@dataclass(frozen=True)
class Evidence:
    """Measured after `step` steps. Tensor and layer names are those of the plan's (adapted) anatomy."""

    step: int
    losses: tuple[float, ...] = ()
    """Of every step since the last decision."""
    learning_rate: float = 0.0
    """Of the last step."""
    gradients: Mapping[str, Gradient] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    similarities: Mapping[str, Similarity] = field(default_factory=dict)


@dataclass(frozen=True)
class Revision:
    """A decision: the plan from here on (its phases up to now unchanged), the scores that caused it by layer or tensor,
    and what the strategy wants to find again at the next decision (JSON values; saved in checkpoints)."""

    plan: FreezePlan
    scores: Mapping[str, float]
    memory: Mapping[str, Any] = field(default_factory=dict)
