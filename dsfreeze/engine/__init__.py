"""The engine: the only place that imports deepspeed or torch.distributed.

`Engine` is what the loop knows of it; `local.py` is plain PyTorch in one process, the reference that `zero.py`
(DeepSpeed ZeRO 0-3) is held against. Import those modules only where an engine is built: they are heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dsfreeze.objectives import Objective
    from dsfreeze.plan import Phase


@dataclass(frozen=True)
class Memory:
    """Bytes on this rank. All but the last two are counted from live objects; `allocated` and `peak` are the device's
    (CUDA allocator), or the process's resident set on a CPU. `parked` is the state of tensors that trained before and do
    not now: on the device where the plan keeps it, in host memory otherwise."""

    weights: int
    gradients: int
    masters: int
    optimizer_state: int
    parked: int
    allocated: int
    peak: int


@dataclass(frozen=True)
class Movement:
    """What a phase did to the weights, against its plan; names in model order. Both are empty when all is well.

    A masked tensor changed where one of the elements held back did, and never moved where none of those that train did.
    """

    frozen_changed: tuple[str, ...]
    never_moved: tuple[str, ...]


@dataclass(frozen=True)
class Piece:
    """Elements `first` .. `last - 1` (flattened) of a trained tensor: the part of it that this rank steps. 1-D views: `value` of
    what the optimizer steps, fp32; `gradient`, where there is one, of the step's, in the engine's dtype, summed over ranks and
    micro-steps and not yet clipped."""

    name: str
    first: int
    last: int
    value: torch.Tensor
    gradient: torch.Tensor | None = None

    def add(self, term: torch.Tensor) -> None:
        """Add fp32 [last - first] to the gradient, rounding once."""
        assert self.gradient is not None, "gradients are there between the passes and the step"
        self.gradient.copy_(self.gradient.float() + term)


def gradients_of(pieces: Sequence[Piece]) -> list[torch.Tensor]:
    """Between the passes and the step every piece has one."""
    found = [piece.gradient for piece in pieces if piece.gradient is not None]
    assert len(found) == len(pieces), "gradients are there between the passes and the step"
    return found


#: (batch, weight) for each micro-step, as `Engine.forward_backward` takes them.
MicroBatches = Sequence[tuple[Mapping[str, "torch.Tensor"], float]]


#: Full (unsharded) CPU tensors of one trained parameter: `weight` in the model's dtype, fp32 `master` (absent in fp32,
#: where the weight is its own master), fp32 `exp_avg` and `exp_avg_sq`, and `step` as a 0-dim fp32 tensor; the last
#: three are absent before a first step.
TensorState = dict[str, "torch.Tensor"]


class Engine(Protocol):
    """One rank's hold on the model while it trains. Collective calls are marked; every rank must make them."""

    rank: int
    world_size: int
    device: torch.device
    module: nn.Module
    config: Mapping[str, Any] | None
    """The DeepSpeed configuration; None without DeepSpeed."""
    objective: Objective
    """What `forward_backward` minimises; the model's own loss unless another is put here."""

    def enter(self, phase: Phase) -> None:
        """Make exactly the phase's tensors trainable; the same set again is free (collective: digests of the set are
        compared first). Tensors that leave and come back do so by the plan's state rule."""

    def forward_backward(self, batch: Mapping[str, torch.Tensor], weight: float) -> float:
        """Backward of `weight` x the objective's (mean) loss; returns that product. With weight 0 a batch is a filler.

        Called gradient_accumulation_steps times before `step`. Gradients SUM over ranks and micro-steps: whoever calls
        passes local items / global items as the weight, so that a step does not depend on the world size.
        """

    def step(self, learning_rate: float, own_rates: Mapping[str, float] | None = None) -> float:
        """Clip, update, clear gradients; returns the global gradient norm before clipping (collective).

        `own_rates`: learning rates of layers, by name, that differ from `learning_rate`.
        """

    # what is added to an objective works on pieces (dsfreeze/objectives/retain): at every stage a rank holds what it steps

    def pieces(self) -> list[Piece]:
        """What this rank steps, in model order, without gradients; where weights are not sharded that is everything."""

    def edited_gradients(self) -> AbstractContextManager[list[Piece]]:
        """Between a step's last backward pass and `step`: pieces whose gradients, as they are left, are what is clipped and
        stepped with. Nothing collective may fail within."""

    def scratch_gradients(
        self,
        micro_batches: MicroBatches,
        take: Callable[[list[Piece]], None],
        *,
        objective: Objective | None = None,
        squared: bool = False,
    ) -> float:
        """Gradients of a step that is not taken, before the passes of one that is (collective): `take` sees those of
        gradient_accumulation_steps micro-batches, and then they are dropped. Returns this rank's loss.

        `squared`: in eval mode, the sum over micro-batches and ranks of each one's squared gradient, instead of the sum.
        """

    def sum_over_pieces(self, values: list[float]) -> list[float]:
        """Sums that each rank took over its pieces, over all of them (collective)."""

    def join(self, name: str, first: int, mine: torch.Tensor | None) -> torch.Tensor:
        """fp32, 1-D, on the device: a tensor as large as the trained one of that name from the ranks' parts of it, each from its
        `first` element on; None where a rank has none (collective)."""

    def whole_weight(self, name: str) -> torch.Tensor:
        """A parameter on the device, to be read alone (collective at stage 3)."""

    def watch(self, *, gradients: bool = False, changes: bool = False) -> None:
        """From now on measure what `gradients` and `changes` report, and nothing else; `changes` counts from here."""

    def gradients(self) -> dict[str, tuple[float, float]]:
        """(L1 norm, squared L2 norm) of each trained tensor's gradient in the last step, before clipping (collective)."""

    def changes(self) -> dict[str, tuple[float, float]]:
        """(squared distance from the start, squared norm at the start) of each tensor that trains now (collective)."""

    def host_bytes(self) -> int:
        """Bytes of what `watch` copied into host memory."""

    def no_grad_forward(self, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
        """The module's output, for the objective's inputs of the batch, in eval mode without a graph (collective at stage 3)."""

    def scan_gradients(
        self, batch: Mapping[str, torch.Tensor], names: Iterable[str], take: Callable[[str, torch.Tensor], None]
    ) -> float:
        """Backward of the objective's mean loss over this rank's batch, before a phase is entered: `take(name, gradient)` gets
        each named tensor's whole gradient as the pass reaches it, and none is kept. Returns the loss (collective at stage 3)."""

    def read_weight(self, name: str) -> torch.Tensor:
        """A full CPU copy of a parameter, on every rank (collective at stage 3)."""

    def write_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put full CPU tensors in the model's dtype in place of the named parameters; every rank passes the same. Only for an
        engine that does not train: optimizer and masters are left as they are."""

    def generate(self, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """`module.generate` in eval mode, greedy unless told otherwise (collective at stage 3)."""

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over ranks in float64 (collective)."""

    def gather(self, value: Any) -> list[Any]:
        """The ranks' values in rank order, on every rank (collective; our own objects only)."""

    def barrier(self) -> None: ...

    def export_state(self) -> dict[str, TensorState]:
        """State of every tensor that ever trained by name, full and on the CPU, on rank 0; {} elsewhere (collective).

        A tensor that does not train now has, beside its weight, what the state rule keeps of it.
        """

    def load_state(self, state: Mapping[str, TensorState]) -> None:
        """Put back what `export_state` gave, at any stage and world size; every rank passes all of it (collective).

        The phase that it was exported in must have been entered.
        """

    def export_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Full CPU copies of the named parameters in the model's dtype, on rank 0; {} elsewhere (collective)."""

    def movement(self, *, frozen: bool = True) -> Movement:
        """Frozen tensors that changed since they froze, and trained ones that did not since the phase was entered
        (collective). With `frozen` False the former, which costs a pass over the weights, are not looked at."""

    def memory(self, *, reset_peak: bool = False) -> Memory: ...

    def close(self) -> None:
        """Leave the process group in order; no call may follow (collective unless another rank died)."""
