"""What every engine does alike: phases, weighted losses, evaluation, state by tensor name, bytes, movement.

An engine adds how the optimizer is built (`_build`), how a loss goes backward (`_backward`), how a step is taken
(`_update`), where the flats and shards lie, and how ranks talk.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import Memory, MicroBatches, Movement, Piece, TensorState
from dsfreeze.engine.flats import Flat, whole
from dsfreeze.engine.gradients import view_of
from dsfreeze.engine.groups import Group, by_name, group_tensors, set_learning_rate
from dsfreeze.engine.holding import Holding
from dsfreeze.engine.masks import Bits
from dsfreeze.engine.memory import Meter, nbytes, spanned_bytes
from dsfreeze.engine.modes import Modes, set_trainable, takes
from dsfreeze.engine.movement import Checksums, changed, checksums, merge
from dsfreeze.engine.parcels import Parcel
from dsfreeze.engine.streaming import Take, streamed_gradients
from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.objectives import Objective
from dsfreeze.plan import Phase, StateRule
from dsfreeze.recipe import Recipe

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

    # -- phases ------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """See the protocol. Raises UserError, on every rank, when ranks name different sets, when a set is empty or names
        what the model lacks, and when flags were flipped behind the plan's back."""
        if self._trainable and phase.trainable == self._trainable:
            return
        self._agree(hashlib.sha256("\n".join(phase.trainable).encode()).hexdigest(), "which tensors train")
        if not phase.trainable:
            raise UserError(
                "Nothing to train: every tensor is frozen. Lower freeze.fraction or name some in freeze.trainable."
            )
        names = self.anatomy.in_order(phase.trainable)
        self.groups = group_tensors(self.anatomy, names, self.recipe.train.weight_decay)
        if self._modes is None:
            set_trainable(self.module, names)
            self._set_modes(names)
            self.flats = self._build()
            self._frozen = self._frozen_checksums(set(self._named))
        else:
            self._check_flags()
            self._change(names)
        self._trained = self._trained_checksums()
        self._trainable = names
        self._hold_back()
        self._ever_trained.update(names)

    def _change(self, names: tuple[str, ...]) -> None:
        """Another set: the state moves by the rule, prefix and checkpointing follow the new lowest trainable layer."""
        concerned = set(names) | set(self._trainable)
        thawed = self.gather(changed(self._frozen, self._frozen_checksums(concerned)))
        assert not any(thawed), f"frozen tensors changed: {thawed}"
        self._refreeze(names)
        self._set_modes(names)
        kept = {name: sums for name, sums in self._frozen.items() if name not in concerned}
        self._frozen = {**kept, **self._frozen_checksums(concerned)}

    def _hold_back(self) -> None:
        """Hold elements back in what trains now; whenever the optimizer or its flats are new."""
        self.holding.follow({n: self._named[n] for n in self._trainable}, self.optimizer, self.flats)

    def _set_modes(self, names: tuple[str, ...]) -> None:
        if self._modes is not None:
            self._modes.close()
            self.module.eval()  # what left the prefix is switched to training with everything else
        self._modes = Modes(self.module, self.anatomy, names, self.recipe.train.gradient_checkpointing)
        self._modes.train()

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
        return self._pass(batch, weight, self.objective)

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

    def step(self, learning_rate: float, own_rates: Mapping[str, float] | None = None) -> float:
        self._check_flags()
        if self._watches_gradients:
            self._gradients = self._measure_gradients()
        set_learning_rate(self.optimizer, learning_rate, own_rates or {})
        return self._update()

    # -- pieces ------------------------------------------------------------------------------------------------

    def pieces(self) -> list[Piece]:
        return [
            Piece(part.slot.name, part.first, part.last, part.of(flat.tensor.detach().reshape(-1)))
            for flat in self.flats
            for part in flat.parts()
        ]

    @contextmanager
    def edited_gradients(self) -> Iterator[list[Piece]]:
        with torch.no_grad():
            parts = [
                (part, view_of(held, part.at, part.last - part.first))
                for flat, held in zip(self.flats, self._gradient_views(), strict=True)
                for part in flat.parts()
            ]
            yield [replace(piece, gradient=gradient) for piece, (_, gradient) in zip(self.pieces(), parts, strict=True)]
            for part, gradient in parts:  # an edit knows of no masks, and norms are of what trains
                self.holding.zero(part.slot.name, gradient, part.first)
            self._renew_norms()

    def scratch_gradients(
        self,
        micro_batches: MicroBatches,
        take: Callable[[list[Piece]], None],
        *,
        objective: Objective | None = None,
        squared: bool = False,
    ) -> float:
        assert self._modes is not None, "enter a phase first"
        self._check_flags()
        if squared:
            self._modes.evaluate()
        else:
            self._modes.train()
        hooks = [self._named[name].register_hook(self._square) for name in self._trainable if squared]
        try:
            loss = sum(self._pass(batch, weight, objective or self.objective) for batch, weight in micro_batches)
        finally:
            for hook in hooks:
                hook.remove()
        with self.edited_gradients() as pieces:
            take(pieces)
            self._drop(pieces)
        return loss

    def _square(self, gradient: torch.Tensor) -> torch.Tensor:
        """Of a gradient that is `world_size` times one batch's, and will be averaged over the ranks: what sums up to squares."""
        return gradient.square() / self.world_size

    def _drop(self, pieces: list[Piece]) -> None:
        """Give a step up: one whose gradient is not finite is not taken at any stage, and leaves every count in order."""
        for piece in pieces[:1]:
            assert piece.gradient is not None
            piece.gradient[:1] = torch.inf
        self._renew_norms()
        norm = self._update()
        assert not math.isfinite(norm), "the step was given up"
        for piece in pieces:  # some of the buffers are used again
            assert piece.gradient is not None
            piece.gradient.zero_()

    def _renew_norms(self) -> None:  # noqa: B027 (nothing is known of them but themselves)
        """Make what is known of gradients follow an edit."""

    def sum_over_pieces(self, values: list[float]) -> list[float]:
        return self.sum(values) if any(flat.world_size > 1 for flat in self.flats) else values

    def join(self, name: str, first: int, mine: torch.Tensor | None) -> torch.Tensor:
        assert mine is not None, "what is not sharded is held by every rank"
        return mine.float()

    # -- measuring ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def watch(self, *, gradients: bool = False, changes: bool = False) -> None:
        self._watches_gradients = gradients
        shares = (pair for flat in self.flats for pair in flat.local()) if changes else ()
        # a copy in host memory, of this rank's shares alone
        self._start = {name: value.to("cpu", copy=True) for name, value in shares}

    def host_bytes(self) -> int:
        return sum(t.nbytes for t in self._start.values())

    def gradients(self) -> dict[str, tuple[float, float]]:
        return self._gradients

    @torch.no_grad()
    def changes(self) -> dict[str, tuple[float, float]]:
        pairs = {}
        for flat in self.flats:
            for name, value in flat.local():
                start = self._start[name].to(value.device)
                pairs[name] = (_squared(value - start), _squared(start))
        return self._over_ranks(pairs)

    @torch.no_grad()
    def _measure_gradients(self) -> dict[str, tuple[float, float]]:
        pairs = {}
        for flat, share in zip(self.flats, self._gradient_shares(), strict=True):
            for name, value in flat.local(share):
                pairs[name] = (value.abs().sum(dtype=torch.float64), _squared(value))
        return self._over_ranks(pairs)

    def _over_ranks(self, pairs: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, tuple[float, float]]:
        """Of every trained tensor two numbers, summed over the ranks' shares; where every rank holds the whole, its own."""
        nothing = torch.zeros(2, dtype=torch.float64, device=self.device)
        held = [torch.stack(pairs[name]).to(self.device) if name in pairs else nothing for name in self._trainable]
        totals = self.sum_over_pieces(torch.cat(held).tolist())  # one transfer for all of them
        return dict(zip(self._trainable, zip(totals[::2], totals[1::2], strict=True), strict=True))

    # -- evaluation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def no_grad_forward(self, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
        self.module.eval()
        return self.module(**self._move(self.objective.inputs(batch)), **self._forward_options, **options)

    def scan_gradients(self, batch: Mapping[str, torch.Tensor], names: Iterable[str], take: Take) -> float:
        assert self._modes is None, "scan before a phase is entered"
        with streamed_gradients(self.module, self.anatomy, names, take):
            batch = self._move(batch)
            loss = self.objective.loss(self.module(**self.objective.inputs(batch), **self._forward_options), batch)
            assert loss is not None, "the batch has labels"
            loss.backward()
        return float(loss.detach())

    def read_weight(self, name: str) -> torch.Tensor:
        return self.whole_weight(name).to("cpu", copy=True)

    def whole_weight(self, name: str) -> torch.Tensor:
        return self._named[name].detach()

    @torch.no_grad()
    def generate(self, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        self.module.eval()
        defaults = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        model: Any = self.module
        options = {**defaults, **self._generate_options(), **options}
        generated: torch.Tensor = model.generate(**self._move(batch), **options)
        return generated

    def _generate_options(self) -> dict[str, Any]:
        return {}

    def _move(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}

    # -- state -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def export_state(self) -> dict[str, TensorState]:
        names = self.anatomy.in_order(self._ever_trained) if self._ever_trained else ()
        state: dict[str, TensorState] = {n: {"weight": w} for n, w in self.export_weights(names).items()}
        for parcel in (*self._live(), *self._parked()):
            for kind, share in parcel.shares().items():
                gathered = self._collect(share, parcel.flat.world_size)
                for name, value in (parcel.flat.join(gathered) if gathered else {}).items():
                    state[name][kind] = value.clone()
            for name in parcel.flat.names if self.rank == 0 and parcel.step is not None else ():
                state[name]["step"] = torch.tensor(parcel.step, dtype=torch.float32)
        return state

    def _live(self) -> list[Parcel]:
        rounded = self.dtype != torch.float32
        return [
            Parcel(f, dict(self.optimizer.state.get(f.tensor, {})), has_master=rounded, live=True) for f in self.flats
        ]

    @torch.no_grad()
    def load_state(self, state: Mapping[str, TensorState]) -> None:
        unknown = [name for name in state if name not in self._named]
        if unknown:
            raise UserError(
                f"The state holds '{unknown[0]}', which the model lacks.{did_you_mean(unknown[0], self._named)}"
            )
        missing = [name for name in self._trainable if name not in state]
        if missing:
            raise UserError(f"The state does not hold '{missing[0]}', which the plan trains.")
        self.write_weights({name: _precise(e, self.dtype) for name, e in state.items()})
        self._prepare_groups({name: float(e["step"]) if "step" in e else None for name, e in state.items()})
        self._hold_back()
        for flat in self.flats:
            entries = {slot.name: state[slot.name] for slot in flat.slots}
            self._write(flat.tensor, flat, {n: _precise(e, torch.float32) for n, e in entries.items()})
            self._load_moments(flat, entries)
        self._ever_trained.update(state)
        self._park({name: entry for name, entry in state.items() if name not in self._trainable})
        self._frozen, self._trained = self._frozen_checksums(set(self._named)), self._trained_checksums()

    def _place(self, name: str) -> tuple[torch.device, tuple[int, ...]]:
        """Where the parked state of a tensor lies, and the tensor's shape."""
        return self.device if self.rule == "keep" else torch.device("cpu"), tuple(self.anatomy.by_name[name].shape)

    def _parcel_of(self, flat: Flat, state: Mapping[str, TensorState]) -> Parcel:
        """This rank's share of the parked state of the tensors that `flat`, new and zero, has room for."""
        entries = {name: state[name] for name in flat.names}
        first = entries[flat.names[0]]
        shares = {kind: torch.zeros_like(flat.tensor) for kind in MOMENTS if kind in first}
        for kind, share in shares.items():
            self._write(share, flat, {n: e[kind].float() for n, e in entries.items()})
        has_master = "master" in first
        if has_master:
            self._write(flat.tensor, flat, {n: e["master"].float() for n, e in entries.items()})
        else:
            flat = replace(flat, tensor=torch.empty_like(flat.tensor, device="meta"))
        step = {"step": first["step"].to(self.device, copy=True)} if "step" in first else {}
        return Parcel(flat, {**shares, **step}, has_master)

    def _whole_parcels(self, state: Mapping[str, TensorState]) -> list[Parcel]:
        """Parcels of tensors that no rank shares with another."""
        parked = {name: self._place(name) for name, entry in state.items() if set(entry) - {"weight"}}
        return [
            self._parcel_of(whole(name, torch.zeros(shape, device=device)), state)
            for name, (device, shape) in parked.items()
        ]

    def _load_moments(self, flat: Flat, entries: Mapping[str, TensorState]) -> None:
        (step,) = {float(e["step"]) if "step" in e else None for e in entries.values()}
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
        return {name: self.read_weight(name) for name in names} if self.rank == 0 else {}

    def write_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        for name, value in weights.items():
            self._named[name].data.copy_(value)

    # -- what moved, and bytes ---------------------------------------------------------------------------------

    def movement(self, *, frozen: bool = True) -> Movement:
        assert self._trainable, "enter a phase first"
        thawed = changed(self._frozen, self._frozen_checksums(set(self._named))) if frozen else []
        found = self.gather((thawed, changed(self._trained, self._trained_checksums())))
        order = [t.name for t in self.anatomy.tensors]
        return merge(order, [f for f, _ in found], [m for _, m in found], set(self._trainable))

    def _frozen_checksums(self, names: set[str]) -> Checksums:
        """Of what is frozen of the named tensors: the whole, or of a masked one that trains the elements held back."""
        return checksums((n, value) for n, p in self._parameters if n in names for value in self._frozen_of(n, p))

    def _frozen_of(self, name: str, parameter: nn.Parameter) -> Iterator[torch.Tensor]:
        if not parameter.requires_grad:
            yield self._held(parameter)
        elif name in self.holding.masks:
            yield self.holding.held(name, self._held(parameter), self._first_held(parameter))

    def _trained_checksums(self) -> Checksums:
        return checksums(pair for flat in self.flats for pair in self.holding.without_held(flat))

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
            parked=nbytes(t for parcel in self._parked() for t in parcel.shares().values()),
            allocated=allocated,
            peak=peak,
        )

    def _optimizer_states(self) -> Iterator[Mapping[str, torch.Tensor]]:
        yield from self.optimizer.state.values() if self._modes else ()

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

    def close(self) -> None:
        self.holding.close()
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


def _precise(entry: TensorState, dtype: torch.dtype) -> torch.Tensor:
    """A tensor's value in `dtype`: from the master where fp32 is wanted and there is one, else from the weight."""
    return (entry.get("master", entry["weight"]) if dtype == torch.float32 else entry["weight"]).to(dtype)


def _squared(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double().square().sum()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
