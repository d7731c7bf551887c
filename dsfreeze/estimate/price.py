"""The whole price of a plan: bytes item by item, peaks of each part of a step, FLOPs, bytes sent, seconds.

`PlanCost` works out once what does not depend on stage, ranks or device, so that a table over all of them takes no longer than
a row. Peaks are sums of what is alive at once, on one rank's device:

    forward    states (without gradients, unless stage 3 holds them for ever or micro-steps accumulate) + permanent buffers
               + gathered weights + the fullest moment of the forward pass
    backward   states + buffers of backward + the fullest of: what is stored up to a layer, that layer's working set, gradients of
               the layers above it
    step       states with gradients + the step's buffers

Where a plan moves, memory is that of its fullest phase: the one that trains most, and the one that reaches lowest.

With a prefix cache the price is that of a step that reads it, T h b bytes of states on the device in place of the prefix's passes; the
first epoch, which fills it, costs what it would without. An evicted prefix (what lies below all that ever trains) has no weights there.

Left out: what the framework, CUDA and the communication library take (0.5 to 1.5 GB on a GPU), the allocator's fragments, padding of batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from dsfreeze.activations import Passes, TaskActivations
from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate import Estimate, as_trained, estimate, held_bytes
from dsfreeze.estimate.buffers import Buffers, buffers
from dsfreeze.estimate.caching import bytes_a_token, cached_layers, evicted_tensors
from dsfreeze.estimate.communication import Communication, Elements, communication, elements
from dsfreeze.estimate.flops import prefix_flops, recomputed_flops
from dsfreeze.estimate.seconds import REDUCED, Seconds, Work, reading_seconds, seconds
from dsfreeze.estimate.states import check_setting
from dsfreeze.hardware import Device
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.setting import Setting, Workload


@dataclass(frozen=True)
class Peaks:
    """The most bytes on the device in each part of a step."""

    forward: int
    backward: int
    step: int

    @property
    def most(self) -> int:
        return max(self.forward, self.backward, self.step)


@dataclass(frozen=True)
class Price:
    """A plan at one setting. `items`: bytes on the device by name, not all alive at once. `tokens`: of one rank's optimizer step."""

    setting: Setting
    states: Estimate
    items: dict[str, int]
    peaks: Peaks
    host: int
    tokens: int
    recomputed_flops: int
    spared_flops: int
    sent: Communication
    work: Work

    @property
    def flops_per_token(self) -> int:
        """Executed: recomputation counts, what a prefix cache spares does not."""
        return self.states.flops_per_token + self.recomputed_flops - self.spared_flops

    @property
    def flops_per_step(self) -> int:
        """Of one rank."""
        return self.tokens * self.flops_per_token

    def on(self, device: Device, scale: float = 1.0) -> Seconds:
        """Seconds of a step on a device; `scale` is a calibration's factor."""
        setting = self.setting
        return seconds(
            device, self.work, self.sent, stage=setting.stage, world_size=setting.world_size,
            dtype_bytes=setting.dtype_bytes, scale=scale,
        )  # fmt: skip

    def cache_bandwidth(self, device: Device, scale: float = 1.0) -> float | None:
        """Bytes a second at which a rank must read the prefix cache so that reading, done ahead, is not what a step waits for; None
        without one."""
        work, ranks = self.work, self.setting.world_size
        reading = reading_seconds(device, work.cache_bytes, ranks, in_memory=work.cache_in_memory)
        return work.cache_bytes / (self.on(device, scale).total - reading) if work.cache_bytes else None


class PlanCost:
    """A plan's price as far as it is the same at every stage and world size."""

    def __init__(
        self, anatomy: Anatomy, plan: FreezePlan, activations: TaskActivations, work: Workload,
        *, dtype_bytes: int = 2, sequence_length: int = 512, num_steps: int | None = None,
    ) -> None:  # fmt: skip
        assert work.prefix_cache or not work.evict_prefix, "what is evicted is read from a cache"
        self.anatomy, self.plan, self.activations, self.work = as_trained(anatomy, plan), plan, activations, work
        self.dtype_bytes, self.length, self.num_steps = dtype_bytes, sequence_length, num_steps
        self.phases = tuple(_PhaseCost(self, phase) for phase in self._fullest())

    def _fullest(self) -> list[Phase]:
        numel = {t.name: t.numel for t in self.anatomy.tensors}
        most = max(self.plan.phases, key=lambda phase: sum(numel[name] for name in phase.trainable))
        lowest = min(self.plan.phases, key=lambda phase: self.anatomy.lowest_trainable(phase.trainable))
        return list({phase.trainable: phase for phase in (most, lowest)}.values())

    @cached_property
    def _alone(self) -> Estimate:
        """At stage 0 on one rank; FLOPs are the same everywhere."""
        return estimate(
            self.anatomy, self.plan, stage=0, dtype_bytes=self.dtype_bytes, sequence_length=self.length, num_steps=self.num_steps
        )  # fmt: skip

    def _states(self, setting: Setting) -> Estimate:
        check_setting(setting.stage, setting.world_size, setting.offload)
        held = held_bytes(
            self.anatomy, self.plan, stage=setting.stage, world_size=setting.world_size,
            dtype_bytes=setting.dtype_bytes, offload=setting.offload, evict_prefix=self.work.evict_prefix,
        )  # fmt: skip
        return replace(self._alone, **held)

    def at(self, stage: int, world_size: int, *, offload: bool = False) -> Price:
        """The price at a ZeRO stage on so many ranks; of a plan that moves, with its fullest phase's memory."""
        setting = Setting(stage, world_size, self.dtype_bytes, offload, self.length)
        states = self._states(setting)
        return max((phase.price(setting, states) for phase in self.phases), key=lambda price: price.peaks.most)


class _PhaseCost:
    """One phase of a plan."""

    def __init__(self, cost: PlanCost, phase: Phase) -> None:
        self.cost, self.chosen = cost, frozenset(phase.trainable)
        work, anatomy, length = cost.work, cost.anatomy, cost.length
        checkpointing = work.gradient_checkpointing
        self.tokens = work.micro_batch_size * length
        self.reads = work.prefix_cache and cached_layers(anatomy, self.chosen) > 0
        evicted = evicted_tensors(anatomy, cost.plan.ever_trained) if work.evict_prefix else frozenset()
        self.sizes: Elements = elements(
            anatomy, self.chosen, checkpointing=checkpointing, cached=self.reads, evicted=evicted
        )
        self.passes: Passes = cost.activations.passes(
            anatomy, self.chosen, work.micro_batch_size, length, checkpointing=checkpointing,
            dropout=cost.plan.adapter.dropout if cost.plan.adapter else 0.0,
        )  # fmt: skip
        last = cost.activations.unrepeated(anatomy)
        self.recomputed = recomputed_flops(anatomy, self.chosen, length, last) if checkpointing else 0
        self.spared = prefix_flops(anatomy, self.chosen, length) if self.reads else 0
        self.cached = self.tokens * anatomy.hidden_size * cost.dtype_bytes if self.reads else 0

    def price(self, setting: Setting, states: Estimate) -> Price:
        cost, work = self.cost, self.cost.work
        held = buffers(
            cost.anatomy, self.chosen, self.sizes, stage=setting.stage, world_size=setting.world_size,
            dtype_bytes=setting.dtype_bytes, offload=setting.offload, cached=self.reads,
        )  # fmt: skip
        sent = communication(
            self.sizes, stage=setting.stage, world_size=setting.world_size, dtype_bytes=setting.dtype_bytes,
            accumulation=work.gradient_accumulation_steps, offload=setting.offload,
        )  # fmt: skip
        return Price(
            setting=setting,
            states=states,
            items=self._items(setting, states, held),
            peaks=self._peaks(setting, states, held),
            host=states.on_host + held.on_host,
            tokens=self.tokens * work.gradient_accumulation_steps,
            recomputed_flops=self.recomputed,
            spared_flops=self.spared,
            sent=sent,
            work=self._work(setting, states),
        )

    def _items(self, setting: Setting, states: Estimate, held: Buffers) -> dict[str, int]:
        trained = min(
            states.weights,
            setting.dtype_bytes * self.sizes.trainable // (setting.world_size if setting.stage == 3 else 1),
        )
        on_device = 0 if setting.offload else 1
        return {
            "frozen weights": states.weights - trained,
            "trainable weights": trained,
            "gradients": on_device * states.gradients,
            "masters": on_device * states.masters,
            "moments": on_device * states.optimizer_state,
            "parked state": on_device * states.parked if self.cost.plan.state == "keep" else 0,
            "reduce bucket": held.reduce_bucket + held.reduce_copy,
            "gathered weights": held.gathered_weights + held.persistent_weights + held.gather_copy,
            "offload staging": held.offload_staging,
            "step gradient": held.step_gradient,
            "activations": self.passes.total - self.passes.stored[-1],
            "logits and loss": max(self.passes.backward[-1], self.passes.forward[-1]) - self._below_end(),
            "prefix cache": self.cached,
        }

    def _below_end(self) -> int:
        return self.passes.total - self.passes.stored[-1]

    def _peaks(self, setting: Setting, states: Estimate, held: Buffers) -> Peaks:
        on_device = states.weights + (0 if setting.offload else states.masters + states.optimizer_state)
        on_device += states.parked if self.cost.plan.state == "keep" and not setting.offload else 0
        gradients = 0 if setting.offload else states.gradients
        waits = gradients if setting.stage == 3 or self.cost.work.gradient_accumulation_steps > 1 else 0
        resident = on_device + held.permanent + self.cached
        gathered = held.gathered_weights + held.gather_copy
        return Peaks(
            forward=resident + waits + gathered + max(self._forward()),
            backward=on_device + self.cached + held.in_backward + self._fullest_backward(gradients, waits),
            step=resident + (gradients // setting.world_size if setting.stage == 1 else gradients) + held.step_gradient,
        )

    def _forward(self) -> tuple[int, ...]:
        """The fullest moment of each part's forward pass; a cached prefix is not run."""
        skipped = self.cost.anatomy.lowest_trainable(self.chosen) if self.reads else 0
        return self.passes.forward[min(skipped, len(self.passes.forward) - 1) :]

    def _fullest_backward(self, gradients: int, waiting: int) -> int:
        """Activations up to a part with the gradients of the parts above it, at the fullest."""
        numel = self._trained_of_parts()
        whole, above, most = sum(numel), 0, gradients
        for count, size in zip(reversed(numel), reversed(self.passes.backward), strict=True):
            most = max(most, size + max(waiting, gradients * above // whole))
            above += count
        return most

    def _trained_of_parts(self) -> list[int]:
        """Elements that train before the layers, in each, and after them."""
        return [
            sum(t.numel for name in layers for t in self._layers[name] if t.name in self.chosen)
            for layers in self._parts()
        ]

    @cached_property
    def _layers(self) -> dict[str, tuple]:
        tensors = {layer.name: layer.tensors for layer in self.cost.anatomy.layers}
        return {"embed": (), "norm": (), "head": (), **tensors}

    def _work(self, setting: Setting, states: Estimate) -> Work:
        work = self.cost.work
        tokens = self.tokens * work.gradient_accumulation_steps
        stepped = -(-states.held // setting.world_size) if setting.stage else states.held
        return Work(
            forward_flops=tokens * (states.forward_flops + self.recomputed - self.spared),
            backward_flops=tokens * states.backward_flops,
            pass_bytes=work.gradient_accumulation_steps * self._pass_bytes + self._reduced_bytes(setting),
            stepped=stepped,
            on_host=setting.offload,
            cache_bytes=tokens * self._stored() if self.reads else 0,
            cache_in_memory=work.cache_in_memory,
        )

    def _stored(self) -> int:
        """Bytes of a token as the cache holds it."""
        cost = self.cost
        return bytes_a_token(cost.anatomy.hidden_size, cost.work.prefix_cache_dtype, cost.dtype_bytes)

    def _reduced_bytes(self, setting: Setting) -> int:
        """Bytes that gradients move on their way through the bucket: at each micro-step, at stages 0 and 1 once, and at 0 only
        where there is somebody to send to."""
        once = int(setting.stage == 1 or setting.world_size > 1)
        times = self.cost.work.gradient_accumulation_steps if setting.stage >= 2 else once
        return times * REDUCED * self.cost.dtype_bytes * self.sizes.trainable

    @cached_property
    def _pass_bytes(self) -> int:
        """Bytes that one micro-batch's passes move through the device's memory."""
        cost = self.cost
        busy = cost.activations.busy(cost.work.micro_batch_size, cost.length)
        adapters = self._adapter_bytes()
        forward = [2 * size + more for size, (more, _) in zip(busy, adapters, strict=True)]
        backward = [3 * size + more for size, (_, more) in zip(busy, adapters, strict=True)]
        lowest = next(i for i, size in enumerate(self.passes.backward) if size)
        first = lowest if self.reads else 0
        read = [layer.numel for layer in cost.anatomy.layers if layer.name != "embed"]
        cut = max(0, cost.anatomy.lowest_trainable(self.chosen) - 1)
        moved = sum(forward[first:]) + sum(backward[lowest:])
        moved += sum(forward[lowest:-1]) if cost.work.gradient_checkpointing else 0
        forward_weights = sum(read[cut:] if self.reads else read)
        backward_weights = sum(read[cut:]) * (2 if cost.work.gradient_checkpointing else 1)
        return moved + cost.dtype_bytes * (forward_weights + backward_weights + self.sizes.trainable)

    def _adapter_bytes(self) -> list[tuple[int, int]]:
        """(forward, backward) bytes that each part's adapters move, operation by operation: thin products do little else.

        Of A's input a forward pass reads 1, a backward one reads 1 for A's gradient, writes that of the input and adds it
        to the matrix's (3): 5. Of B's output a forward pass writes 1, scales it (2) and adds it to the matrix's (3): 6; a
        backward one scales its gradient (2) and reads it for B's and for A's output's: 4.
        """
        ways = {".lora_A.": (1, (1, 5)), ".lora_B.": (0, (6, 4))}

        def moved(layers: Iterable[str]) -> tuple[int, int]:
            sides = [
                (tensor.shape[side], times)
                for name in layers for tensor in self._layers[name] for key, (side, times) in ways.items()
                if tensor.category == "adapter" and key in tensor.name
            ]  # fmt: skip
            forward, backward = (sum(size * times[way] for size, times in sides) for way in (0, 1))
            return self.tokens * self.cost.dtype_bytes * forward, self.tokens * self.cost.dtype_bytes * backward

        return [moved(layers) for layers in self._parts()]

    def _parts(self) -> list[list[str]]:
        """Names of the layers before the transformer layers, of each of these, and of those after them."""
        return [["embed"], *([layer.name] for layer in self.cost.anatomy.blocks), ["norm", "head"]]
