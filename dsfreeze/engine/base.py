"""What every engine does alike: phases, weighted losses, evaluation, state by tensor name, bytes, movement.

An engine adds how the optimizer is built (`_build`), how a loss goes backward (`_backward`), how a step is taken
(`_update`), where the flats and shards lie, and how ranks talk.
"""

from __future__ import annotations

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import Memory, Movement, TensorState
from dsfreeze.engine.flats import Flat
from dsfreeze.engine.groups import Group, by_name, group_tensors
from dsfreeze.engine.memory import Meter, nbytes, spanned_bytes
from dsfreeze.engine.modes import Modes, set_trainable
from dsfreeze.engine.movement import Checksums, changed, checksums, merge
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.plan import Phase
from dsfreeze.recipe import Recipe, Strategy

MOMENTS = ("exp_avg", "exp_avg_sq")


class BaseEngine(ABC):
    """See `dsfreeze.engine.Engine` for the contract. `groups` are the optimizer's, one layer and decay setting each."""

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        recipe: Recipe,
        device: torch.device,
        *,
        weights_on: torch.device | None = None,
    ) -> None:
        """`weights_on`: where the parameters wait until `_build` has placed them; the device, unless it is said."""
        self.module, self.anatomy, self.recipe, self.device = module, anatomy, recipe, device
        self.dtype = torch.bfloat16 if recipe.train.bf16 else torch.float32
        for parameter in module.parameters():
            parameter.data = parameter.data.to(weights_on or device, self.dtype)
            parameter.requires_grad_(False)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(device)
        module.eval()
        self._forward_options = {"use_cache": False} if _takes(module, "use_cache") else {}
        self._named = by_name(module)
        self._parameters = list(module.named_parameters())
        self._meter = Meter(device)
        self._trainable: tuple[str, ...] = ()
        self._modes: Modes | None = None
        self.groups: list[Group] = []
        #: What the optimizer steps on this rank; empty before a phase is entered.
        self.flats: list[Flat] = []

    # -- phases ------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """Make exactly the phase's tensors trainable and build the optimizer over them; the same set again is free.

        Raises UserError, on every rank, when ranks name different sets, when a set is empty or names what the model
        lacks, and when the set differs from that of the phase before.
        """
        if self._trainable and phase.trainable == self._trainable:
            return
        self._agree(hashlib.sha256("\n".join(phase.trainable).encode()).hexdigest(), "which tensors train")
        if self._trainable:
            raise UserError(_moving(phase, self._trainable))
        if not phase.trainable:
            raise UserError(
                "Nothing to train: every tensor is frozen. Lower freeze.fraction or name some in freeze.trainable."
            )
        names = self.anatomy.in_order(phase.trainable)
        set_trainable(self.module, names)
        self.groups = group_tensors(self.anatomy, names, self.recipe.train.weight_decay)
        self._modes = Modes(self.module, self.anatomy, names, self.recipe.train.gradient_checkpointing)
        self._modes.train()
        self.flats = self._build()
        self._trainable = phase.trainable
        self._before = self._checksums()

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

    # -- training ----------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Mapping[str, torch.Tensor], weight: float) -> float:
        assert self._modes is not None, "enter a phase first"
        self._check_flags()
        self._modes.train()
        outputs = self._forward(**self._move(batch), **self._forward_options)
        if weight == 0:
            # the mean loss of a filler is over no terms (0/0); this is zero, and reaches every gradient hook
            loss = outputs.logits.sum(dtype=torch.float32) * 0.0
        elif outputs.loss is None:
            raise UserError("The batch has no labels: the model computed no loss.")
        else:
            loss = outputs.loss.float() * weight
        self._backward(loss)
        return float(loss.detach())

    def step(self, learning_rate: float) -> float:
        self._check_flags()
        return self._update(learning_rate)

    # -- evaluation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def no_grad_forward(self, batch: Mapping[str, torch.Tensor]) -> Any:
        self.module.eval()
        return self.module(**self._move(batch), **self._forward_options)

    @torch.no_grad()
    def generate(self, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        self.module.eval()
        defaults = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        return self.module.generate(**self._move(batch), **{**defaults, **self._generate_options(), **options})

    def _generate_options(self) -> dict[str, Any]:
        return {}

    def _move(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # -- state -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export_state(self) -> dict[str, TensorState]:
        names = [slot.name for flat in self.flats for slot in flat.slots]
        state: dict[str, TensorState] = {n: {"weight": w} for n, w in self.export_weights(names).items()}
        for flat in self.flats:
            moments = self.optimizer.state.get(flat.tensor, {})
            shares = {} if self.dtype == torch.float32 else {"master": flat.tensor}
            shares |= {kind: moments[kind] for kind in MOMENTS if kind in moments}
            for kind, share in shares.items():
                gathered = self._collect(share.detach(), flat.world_size)
                for name, value in (flat.join(gathered) if gathered else {}).items():
                    state[name][kind] = value.clone()
            for slot in flat.slots if self.rank == 0 and moments else ():
                state[slot.name]["step"] = moments["step"].detach().float().cpu().clone()
        return {name: state[name] for name in self.anatomy.in_order(state)} if state else {}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, TensorState]) -> None:
        unknown = [name for name in state if name not in self._named]
        if unknown:
            raise UserError(
                f"The state holds '{unknown[0]}', which the model lacks.{did_you_mean(unknown[0], self._named)}"
            )
        self._write_weights({name: _precise(e, self.dtype) for name, e in state.items()})
        for flat in self.flats:
            missing = [slot.name for slot in flat.slots if slot.name not in state]
            if missing:
                raise UserError(f"The state does not hold '{missing[0]}', which the plan trains.")
            entries = {slot.name: state[slot.name] for slot in flat.slots}
            self._write(flat.tensor, flat, {n: _precise(e, torch.float32) for n, e in entries.items()})
            self._load_moments(flat, entries)
        self._before = self._checksums()

    def _load_moments(self, flat: Flat, entries: Mapping[str, TensorState]) -> None:
        steps = {float(e["step"]) if "step" in e else None for e in entries.values()}
        if len(steps) > 1:
            raise UserError(
                f"Tensors of one layer come with different Adam step counts ({', '.join(entries)}): "
                "they were not trained together. Resume with the plan they were trained with."
            )
        (step,) = steps
        if step is None:
            self.optimizer.state.pop(flat.tensor, None)
            return
        entry = self.optimizer.state[flat.tensor]
        # fused Adam keeps its step counts on the tensors' device
        entry["step"] = torch.tensor(step, dtype=torch.float32, device=flat.tensor.device)
        for kind in MOMENTS:
            entry[kind] = torch.zeros_like(flat.tensor, requires_grad=False)
            self._write(entry[kind], flat, {n: e[kind].float() for n, e in entries.items()})

    @staticmethod
    def _write(target: torch.Tensor, flat: Flat, full: Mapping[str, torch.Tensor]) -> None:
        target.copy_(flat.cut(full).view(target.shape))

    def export_weights(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        return {name: self._named[name].detach().to("cpu", copy=True) for name in names} if self.rank == 0 else {}

    def _write_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            self._named[name].data.copy_(value)

    # -- what moved, and bytes ---------------------------------------------------------------------------------

    def movement(self) -> Movement:
        assert self._trainable, "enter a phase first"
        differing = set(changed(self._before, self._checksums()))
        trained = set(self._trainable)
        found = self.gather((sorted(differing - trained), sorted(differing & trained)))
        order = [t.name for t in self.anatomy.tensors]
        return merge(order, [f for f, _ in found], [m for _, m in found], trained)

    def _checksums(self) -> Checksums:
        frozen = ((n, self._held(p)) for n, p in self._parameters if not p.requires_grad)
        trained = (pair for flat in self.flats for pair in flat.local())
        return {**checksums(frozen), **checksums(trained)}

    def memory(self, *, reset_peak: bool = False) -> Memory:
        """Bytes of this rank. Step counts (0-dim), communication and staging buffers are in `allocated` alone, as is
        what a gradient keeps alive beyond its own elements (at stage 1, the rest of a tensor that a shard's end cuts).
        """
        allocated, peak = self._meter.read(reset_peak=reset_peak)
        masters = [flat.tensor for flat in self.flats if not isinstance(flat.tensor, nn.Parameter)]
        moments = [flat_state.get(kind) for flat_state in self._optimizer_states() for kind in MOMENTS]
        return Memory(
            weights=nbytes(t for _, p in self._parameters for t in self._copies(p)),
            gradients=spanned_bytes([p.grad for _, p in self._parameters] + list(self._gradient_buffers())),
            masters=nbytes(masters),
            optimizer_state=nbytes(moments),
            allocated=allocated,
            peak=peak,
        )

    def _optimizer_states(self) -> Iterator[Mapping[str, torch.Tensor]]:
        yield from self.optimizer.state.values() if self._modes else ()

    def _held(self, parameter: nn.Parameter) -> torch.Tensor:
        """This rank's part of a parameter."""
        return parameter.data

    def _copies(self, parameter: nn.Parameter) -> Iterable[torch.Tensor]:
        """Every live tensor that holds (part of) a parameter in the model's dtype."""
        return (parameter.data,)

    def _gradient_buffers(self) -> Iterable[torch.Tensor]:
        """Gradients held elsewhere than in `.grad`."""
        return ()

    def close(self) -> None:
        if self._modes is not None:
            self._modes.close()

    # -- what engines differ in --------------------------------------------------------------------------------

    rank: int
    world_size: int
    config: Mapping[str, Any] | None
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def _build(self) -> list[Flat]:
        """Make `optimizer` over `groups`; the tensors it steps, with their layout (collective)."""

    @abstractmethod
    def _forward(self, **batch: Any) -> Any: ...

    @abstractmethod
    def _backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to the step's: summed over micro-steps and ranks by the time of `_update`."""

    @abstractmethod
    def _update(self, learning_rate: float) -> float: ...

    @abstractmethod
    def gather(self, value: Any) -> list[Any]: ...

    @abstractmethod
    def _agree(self, value: str, what: str) -> None: ...

    @abstractmethod
    def _collect(self, share: torch.Tensor, world_size: int) -> list[torch.Tensor]:
        """The ranks' shares as 1-D CPU tensors on rank 0, [] elsewhere; with world size 1 rank 0's own (collective)."""


def _precise(entry: TensorState, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's value in `dtype`: from the master where fp32 is wanted and there is one, else from the weight."""
    return (entry.get("master", entry["weight"]) if dtype == torch.float32 else entry["weight"]).to(dtype)


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _moving(phase: Phase, trained: tuple[str, ...]) -> str:
    joined, left = sorted(set(phase.trainable) - set(trained)), sorted(set(trained) - set(phase.trainable))
    return (
        f"The plan changes what trains at step {phase.first_step} (joins: {_some(joined) or 'nothing'}; leaves: "
        f"{_some(left) or 'nothing'}), and this version trains one set a run. Choose a static strategy: "
        f"{', '.join(get_args(Strategy))}."
    )
