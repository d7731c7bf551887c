"""What a plan costs before anything runs: bytes per rank for model states, FLOPs per token against full tuning.

Bytes, for P elements of which P_t train, on W ranks, b bytes an element (counted from live tensors of DeepSpeed 0.19.8
on two ranks; masters m and the two moments are fp32):

    stage  weights  gradients      masters    moments
    0      b P      b P_t          4 P_t (0)  8 P_t      (0): in fp32 the weight is its own master
    1      b P      b P_t          4 P_t / W  8 P_t / W
    2      b P      b P_t / W      4 P_t / W  8 P_t / W
    3      b P / W  b P_t / W      4 P_t / W  8 P_t / W

With the optimizer offloaded (2, 3), masters, moments and (4 + b) P_t / W for gradients lie in host memory. Stage 1
holds whole gradients during backward and b P_t / W after it. A tensor that never trained has its weight and nothing
else. One that trained in an earlier phase has, by the plan's state rule, an element: moments (8) and, in bf16, its master
(4) with `keep` on the device and with `offload` in host memory; with `clear` in bf16 its master (4) in host memory, and
with `drop_master` nothing. Over W ranks where masters are sharded.
Left out: alignment padding, buckets and gathered layers, activations, the transient fp32 gradient of a step, and what
the framework itself takes.

FLOPs (two for a multiply-add), forward N for each matrix a token passes, then backward, tensor by tensor:

    its weight gradient   N  when the matrix trains
    its input gradient    N  when something trainable feeds its input

Below the lowest trainable tensor nothing is paid; above it every input gradient is, since the residual stream carries
everything. So full tuning costs 3 N, and a frozen prefix of b layers of L, embedding included, L + 2 (L - b). The
attention kernel (scores and their use) adds 4 s d forward, for s positions and d the width of the heads together, and
twice that backward when anything below it trains; a causal kernel that skips the masked half does half of it.
Left out: recomputation (checkpointing), element-wise work, look-ups, the optimizer, and DoRA's weight norm, which is
per step and not per token. Within the lowest trainable layer the order is input norm, q k v, o, second norm, up gate,
down: a layer with parallel or post-normed parts may differ there by its own input gradients, and its attention kernel
counts whole, though a frozen q or k spares an unfused one a quarter of its backward. In an encoder-decoder, a token is
one source position and one target position, and all encoder layers count as feeding all decoder layers.

Against `torch.utils.flop_counter` with eager attention, measured in tests/test_estimate.py: the error is 0 for full,
bottom, top, interval and norm plans of Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma3, Phi, Phi-3, GPT-2, GPT-NeoX, BLOOM,
Falcon and T5, and for LoRA and single matrices where attention and feed-forward follow one another. On BERT-like
models it is up to 5 % in a toy, since pooler and classifier run once a sequence and are counted once a token; a plan
inside the lowest layer of a parallel block (Phi, GPT-NeoX, Falcon) is counted up to one layer's input gradient too
dear. With DoRA it is -10 % at 64 tokens a step, and shrinks with their number; so does what DeBERTa spends on its table
of relative positions, which is per sequence and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dsfreeze.anatomy import ATTENTION, Anatomy, Layer, Tensor
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.setting import Setting

#: Where a tensor's product happens: (index of the layer, order within it).
Place = tuple[int, float]

_QKV, _INNER_NORM, _KERNEL, _OUT, _SECOND_NORM, _UP, _DOWN = 1, 2, 2.5, 3, 4, 5, 6
_STAGE = {
    "q": _QKV, "k": _QKV, "v": _QKV, "qkv": _QKV, "o": _OUT, "up": _UP, "gate": _UP, "gate_up": _UP, "down": _DOWN,
}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A plan's cost: bytes on one rank, elements, and FLOPs of one token through forward and backward."""

    weights: int
    gradients: int
    masters: int
    optimizer_state: int
    parked: int
    """State of tensors that trained in an earlier phase and do not in this one."""
    on_host: int
    """Of the bytes above, those in host memory (optimizer offload, parked state)."""
    trainable: int
    total: int
    forward_flops: int
    backward_flops: int
    full_forward_flops: int
    full_backward_flops: int

    @property
    def percent(self) -> float:
        """Trainable elements, in percent of all."""
        return 100 * self.trainable / self.total

    @property
    def flops_per_token(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def full_flops_per_token(self) -> int:
        """The same for tuning everything, without adapters."""
        return self.full_forward_flops + self.full_backward_flops

    @property
    def flops_ratio(self) -> float:
        return self.flops_per_token / self.full_flops_per_token


def estimate(
    anatomy: Anatomy, plan: FreezePlan, *, stage: int = 2, world_size: int = 1, dtype_bytes: int = 4,
    offload: bool = False, sequence_length: int = 512, phase: Phase | None = None, num_steps: int | None = None,
) -> Estimate:  # fmt: skip
    """Price a plan (formulas and what they leave out: above).

    Bytes and `trainable` are those of `phase`, by default the one that holds most on the device, among equals in host
    memory. FLOPs are those of the phase, or the mean over the plan's steps; an open last phase ends at `num_steps`, and counts alone without it.
    `anatomy` may have the plan's adapters in place or not; `dtype_bytes` is that of weights and gradients (2 or 4);
    `sequence_length` is in positions. UserError for a stage, a world size or an offload that does not exist.
    """
    _check(stage, world_size, offload)
    adapted = as_trained(anatomy, plan)
    numel = {t.name: t.numel for t in adapted.tensors}
    own = [t for t in adapted.tensors if t.category != "adapter"]
    full_forward, full_backward = flops(adapted, own, frozenset(t.name for t in own), sequence_length)

    def count(names: Iterable[str]) -> int:
        return sum(numel[name] for name in names)

    def bytes_of(priced: Phase, idle: int) -> dict[str, int]:
        trained = count(priced.trainable)
        held = _bytes(adapted.numel, trained, stage, world_size, dtype_bytes, offload)
        parked = _parked_bytes(plan, -(-idle // world_size) if stage else idle, dtype_bytes)
        held["on_host"] += parked if offload or plan.state != "keep" else 0
        return {**held, "parked": parked, "trainable": trained}

    chosen = _distinct(plan, count) if phase is None else [(phase, _idle(plan, phase, count))]
    held = max((bytes_of(*pair) for pair in chosen), key=lambda held: (_on_device(held), held["on_host"]))
    forward, backward = _mean_flops(adapted, plan if phase is None else _only(plan, phase), sequence_length, num_steps)
    return Estimate(
        **held,
        total=adapted.numel,
        forward_flops=forward,
        backward_flops=backward,
        full_forward_flops=full_forward,
        full_backward_flops=full_backward,
    )


def bytes_on_device(total: int, trained: int, setting: Setting) -> int:
    """Bytes of model states on one rank's device when `trained` of `total` elements train from the start."""
    held = _bytes(total, trained, setting.stage, setting.world_size, setting.dtype_bytes, setting.offload)
    return _on_device({**held, "parked": 0})


def _idle(plan: FreezePlan, phase: Phase, count: Callable[[Iterable[str]], int]) -> int:
    """Elements that trained before the phase and do not train in it."""
    before = {name for earlier in plan.phases if earlier.first_step < phase.first_step for name in earlier.trainable}
    return count(before.difference(phase.trainable))


def _distinct(plan: FreezePlan, count: Callable[[Iterable[str]], int]) -> list[tuple[Phase, int]]:
    """Phases that differ in what they hold, and the elements that each finds trained before and leaves idle."""
    found: dict[tuple[tuple[str, ...], int], Phase] = {}
    before: set[str] = set()
    for phase in plan.phases:
        idle = count(before.difference(phase.trainable))
        found.setdefault((phase.trainable, idle), phase)
        before.update(phase.trainable)
    return [(phase, idle) for (_, idle), phase in found.items()]


def _parked_bytes(plan: FreezePlan, idle: int, dtype_bytes: int) -> int:
    master = 4 if dtype_bytes < 4 and not plan.drop_master else 0
    return idle * (master + (0 if plan.state == "clear" else 8))


def _on_device(held: dict[str, int]) -> int:
    return sum(held[key] for key in ("weights", "gradients", "masters", "optimizer_state", "parked")) - held["on_host"]


def _only(plan: FreezePlan, phase: Phase) -> FreezePlan:
    return replace(plan, phases=(Phase(0, None, phase.trainable),), decide_at=None)


def _mean_flops(anatomy: Anatomy, plan: FreezePlan, sequence_length: int, num_steps: int | None) -> tuple[int, int]:
    """(forward, backward) FLOPs of a token, averaged over the plan's steps."""
    steps: Counter[tuple[str, ...]] = Counter()
    for phase in plan.phases:
        end = num_steps if phase.end is None else phase.end
        if end is None:
            steps = Counter({phase.trainable: 1})
        else:
            steps[phase.trainable] += max(0, end - phase.first_step)
    total = steps.total() or 1
    priced = {chosen: flops(anatomy, anatomy.tensors, frozenset(chosen), sequence_length) for chosen in steps}
    return (
        round(sum(steps[chosen] * pair[0] for chosen, pair in priced.items()) / total),
        round(sum(steps[chosen] * pair[1] for chosen, pair in priced.items()) / total),
    )


def as_trained(anatomy: Anatomy, plan: FreezePlan) -> Anatomy:
    """The anatomy with the plan's adapters, whether or not it came with them."""
    return anatomy if any(t.category == "adapter" for t in anatomy.tensors) else plan.adapted(anatomy)


def flops(
    anatomy: Anatomy, tensors: Iterable[Tensor], trainable: frozenset[str], sequence_length: int
) -> tuple[int, int]:
    """(forward, backward) FLOPs of a token through `tensors` when `trainable` train (derivation: above)."""
    places = places_of(anatomy)
    chosen = [t for t in anatomy.tensors if t.name in trainable]
    sources = [(0, 0.0) if _is_embedding(t, anatomy) else places[t.name] for t in chosen]
    lowest = min(sources, default=(len(anatomy.layers), 0.0))
    forward = backward = 0
    for tensor in tensors:
        passes = (tensor.name in trainable) + (places[tensor.name] > lowest)
        forward += tensor.flops_per_token
        backward += passes * tensor.flops_per_token
    for index, layer in enumerate(anatomy.layers):
        kernel = 4 * sequence_length * anatomy.attention_width * _kernels(layer)
        forward += kernel
        backward += 2 * kernel if (index, _KERNEL) > lowest else 0
    return forward, backward


def places_of(anatomy: Anatomy) -> dict[str, Place]:
    """Where each tensor's product happens; a tied embedding multiplies at the very end."""
    places: dict[str, Place] = {}
    for index, layer in enumerate(anatomy.layers):
        stages = _stages(layer)
        for tensor in layer.tensors:
            fed_by_a = 0.25 if tensor.category == "adapter" and ".lora_B." in tensor.name else 0.0
            places[tensor.name] = (index, stages[_home(tensor)] + fed_by_a)
            if tensor.aliases and tensor.flops_per_token and _is_embedding(tensor, anatomy):
                places[tensor.name] = (len(anatomy.layers), 0.0)
    return places


def _stages(layer: Layer) -> dict[str, float]:
    """The stage of each module of a layer: by category in a transformer layer, else by the order of registration."""
    attention = {_home(t).rpartition(".")[0] for t in layer.tensors if t.category in ATTENTION} - {layer.path}
    stages: dict[str, float] = {}
    for order, tensor in enumerate(layer.tensors):
        home = _home(tensor)
        if home in stages:  # a bias or an adapter shares the stage of its matrix
            continue
        if not layer.is_block:
            stages[home] = 0.0 if tensor.category == "embed" else order + 1.0
        elif tensor.category == "norm":
            stages[home] = _norm_stage(home, attention, met_input_norm=0.0 in stages.values())
        else:
            stages[home] = _STAGE.get(tensor.category, _UP + order / (len(layer.tensors) + 1))
    return stages


def _norm_stage(home: str, attention: set[str], *, met_input_norm: bool) -> float:
    """A norm among the projections (q_norm) is inner; the first other one feeds them unless named otherwise."""
    if home.rpartition(".")[0] in attention:
        return _INNER_NORM
    return _SECOND_NORM if met_input_norm or "post" in home or ".output." in home else 0.0


def _home(tensor: Tensor) -> str:
    """The module of the matrix that a tensor belongs to, adapters and wrapped weights included."""
    return tensor.module.partition(".lora_")[0].removesuffix(".base_layer")


def _is_embedding(tensor: Tensor, anatomy: Anatomy) -> bool:
    return tensor.category == "embed" and anatomy.layer_of[tensor.name].name == "embed"


def _kernels(layer: Layer) -> int:
    """Attention kernels of a layer: one for each output projection (a decoder with cross-attention has two)."""
    outputs = sum(t.category == "o" for t in layer.tensors)
    return max(outputs, int(any(t.category in ATTENTION for t in layer.tensors)))


def _bytes(total: int, trained: int, stage: int, world_size: int, dtype_bytes: int, offload: bool) -> dict[str, int]:
    """The table above, each rounded up to whole bytes a rank."""

    def shard(count: int) -> int:
        return -(-count // world_size)

    weights = dtype_bytes * (shard(total) if stage == 3 else total)
    gradients = dtype_bytes * (shard(trained) if stage >= 2 else trained)
    states = shard(trained) if stage else trained
    masters = 0 if stage == 0 and dtype_bytes == 4 else 4 * states
    if offload:
        gradients = (4 + dtype_bytes) * states
    on_host = masters + 8 * states + gradients if offload else 0
    return {
        "weights": weights,
        "gradients": gradients,
        "masters": masters,
        "optimizer_state": 8 * states,
        "on_host": on_host,
    }


def _check(stage: int, world_size: int, offload: bool) -> None:
    if stage not in (0, 1, 2, 3):
        raise UserError(f"There is no ZeRO stage {stage}. Valid: 0, 1, 2, 3.")
    if world_size < 1:
        raise UserError(f"A world size of {world_size} has no ranks. Write 1 or more.")
    if offload and stage < 2:
        raise UserError(f"The optimizer can be offloaded at ZeRO stages 2 and 3, not at {stage}.")
