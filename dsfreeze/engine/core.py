"""What an engine is made of, and what engines differ in: how the optimizer is built (`_build`), how a loss goes backward (`_backward`), how a
step is taken (`_update`), where the flats and shards lie, and how ranks talk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import TensorState
from dsfreeze.engine.flats import Flat
from dsfreeze.engine.groups import Group, by_name
from dsfreeze.engine.holding import Holding
from dsfreeze.engine.masks import Bits
from dsfreeze.engine.memory import Meter
from dsfreeze.engine.modes import Modes, takes
from dsfreeze.engine.movement import Checksums
from dsfreeze.engine.parcels import Parcel
from dsfreeze.errors import UserError
from dsfreeze.objectives import Objective
from dsfreeze.plan import StateRule
from dsfreeze.recipe import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")


class Core(ABC):
    """`groups` are the optimizer's, one layer and decay setting each."""

    rank: int
    world_size: int
    config: Mapping[str, Any] | None
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        recipe: Recipe,
        device: torch.device,
        *,
        state: StateRule = "keep",
        drop_master: bool = False,
        masks: Mapping[str, Bits] | None = None,
        weights_on: torch.device | None = None,
    ) -> None:
        """`state` and `drop_master`: what a tensor that stops training takes along (see `refreeze`). `masks`: elements that
        train, of tensors of which not all do. `weights_on`: where the parameters wait until `_build` has placed them; the
        device, unless it is said."""
        self.module, self.anatomy, self.recipe, self.device = module, anatomy, recipe, device
        self.rule, self.drop_master = state, drop_master
        self.dtype = torch.bfloat16 if recipe.train.bf16 else torch.float32
        for parameter in module.parameters():
            parameter.data = parameter.data.to(weights_on or device, self.dtype)
            parameter.requires_grad_(False)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        module.eval()
        self._forward_options = {"use_cache": False} if takes(module, "use_cache") else {}
        self._named = by_name(module)
        self._parameters = list(module.named_parameters())
        self._meter = Meter(device)
        self._trainable: tuple[str, ...] = ()
        self._ever_trained: set[str] = set()
        self._modes: Modes | None = None
        self._frozen: Checksums = {}
        self._trained: Checksums = {}
        self.holding = Holding(masks or {}, device)
        self._watches_gradients = False
        self._gradients: dict[str, tuple[float, float]] = {}
        self._start: dict[str, torch.Tensor] = {}
        self.objective = Objective()
        self.groups: list[Group] = []
        #: What the optimizer steps on this rank; empty before a phase is entered.
        self.flats: list[Flat] = []

    def _check_flags(self) -> None:
        """UserError when a tensor's requires_grad is not what the plan says: the optimizer would ignore the change."""
        # two numbers first: this runs every micro-step
        if sum(p.requires_grad for _, p in self._parameters) == len(self._trainable) and all(
            self._named[name].requires_grad for name in self._trainable
        ):
            return
        flipped = [n for n, p in self._parameters if p.requires_grad != (n in self._trainable)]
        if flipped:
            raise UserError(
                f"requires_grad of {_some(flipped)} was changed behind the plan's back. The optimizer was built for "
                "the plan's tensors and ignores such a change silently; put it into the plan and enter that instead."
            )

    def _pass(self, batch: Mapping[str, torch.Tensor], weight: float, objective: Objective) -> float:
        batch = self._move(batch)
        outputs = self._forward(**objective.inputs(batch), **self._forward_options)
        if weight == 0:
            # the mean loss of a filler is over no terms (0/0); this is zero, and reaches every gradient hook
            loss = outputs.logits.sum(dtype=torch.float32) * 0.0
        elif (own := objective.loss(outputs, batch)) is None:
            raise UserError("The batch has no labels: the model computed no loss.")
        else:
            loss = own.float() * weight
            del own
        del outputs  # the logits, which backward does not read
        self._backward(loss)
        return float(loss.detach())

    def _move(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    def _hold_back(self) -> None:
        """Hold elements back in what trains now; whenever the optimizer or its flats are new."""
        self.holding.follow({n: self._named[n] for n in self._trainable}, self.optimizer, self.flats)

    def sum_over_pieces(self, values: list[float]) -> list[float]:
        return self.sum(values) if any(flat.world_size > 1 for flat in self.flats) else values

    def read_weight(self, name: str) -> torch.Tensor:
        return self.whole_weight(name).to("cpu", copy=True)

    def whole_weight(self, name: str) -> torch.Tensor:
        return self._named[name].detach()

    # -- what of a parameter this rank has -----------------------------------------------------------------------

    def _held(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of a parameter."""
        return parameter.data

    def _first_held(self, parameter: nn.Parameter) -> int:
        """The element of the flattened parameter that this rank's part begins with."""
        return 0

    def _copies(self, parameter: nn.Parameter) -> Iterable[torch.Tensor]:
        """Every live tensor that holds (part of) a parameter in the model's dtype."""
        return (parameter.data,)

    def _gradient_buffers(self) -> Iterable[torch.Tensor | None]:
        """Gradients held elsewhere than in `.grad`."""
        return ()

    # -- what engines differ in ----------------------------------------------------------------------------------

    @abstractmethod
    def _build(self) -> list[Flat]:
        """Make `optimizer` over `groups`; the tensors it steps, with their layout (collective)."""

    @abstractmethod
    def _forward(self, **batch: Any) -> Any: ...

    @abstractmethod
    def _backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to the step's: summed over micro-steps and ranks by the time of `_update`."""

    @abstractmethod
    def _update(self) -> float: ...

    @abstractmethod
    def _refreeze(self, names: tuple[str, ...]) -> None:
        """Make `names` what the optimizer steps, by the state rule, and note the new flats (collective)."""

    @abstractmethod
    def _prepare_groups(self, steps: Mapping[str, float | None]) -> None:
        """Make sure that no flat holds tensors of different step counts (collective)."""

    @abstractmethod
    def _gradient_shares(self) -> list[torch.Tensor]:
        """For each flat this rank's share of the step's gradient, before clipping."""

    @abstractmethod
    def _gradient_views(self) -> list[list[torch.Tensor]]:
        """For each flat the contiguous tensors that, end to end, are this rank's share of the step's gradient: not copies."""

    @abstractmethod
    def _parked(self) -> list[Parcel]:
        """What is kept of tensors that do not train now."""

    @abstractmethod
    def _park(self, state: Mapping[str, TensorState]) -> None:
        """Keep the loaded state of tensors that do not train now."""

    @abstractmethod
    def sum(self, values: list[float]) -> list[float]: ...

    @abstractmethod
    def gather(self, value: Any) -> list[Any]: ...

    @abstractmethod
    def _agree(self, value: str, what: str) -> None: ...

    @abstractmethod
    def _collect(self, share: torch.Tensor, world_size: int) -> list[torch.Tensor]:
        """The ranks' shares as 1-D CPU tensors on rank 0, [] elsewhere; with world size 1 rank 0's own (collective)."""


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
