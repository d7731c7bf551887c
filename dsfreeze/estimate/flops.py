"""FLOPs of a token through forward and backward under a set that trains.

FLOPs (two for a multiply-add), forward N for each matrix a token passes, then backward, tensor by tensor:

    its weight gradient   N  when the matrix trains, in whole or, under a mask, in part: the product is made whole
    its input gradient    N  when something trainable feeds its input

Below the lowest trainable tensor nothing is paid; above it every input gradient is, since the residual stream carries
everything. So full tuning costs 3 N, and a frozen prefix of b layers of L, embedding included, L + 2 (L - b). The
attention kernel (scores and their use) adds 4 s d forward, for s positions and d the width of the heads together, and
twice that backward when anything below it trains; a causal kernel that skips the masked half does half of it. These
are the model's FLOPs, those of eager attention; a flash kernel stores no scores, and runs their product once more in its
backward pass: 2 s d on top, 5 products against 4.
Recomputation (checkpointing) is apart, in `recomputed_flops`. Left out: element-wise work, look-ups, the optimizer, and DoRA's weight norm, which is
per step and not per token. Within the lowest trainable layer the order is input norm, q k v, o, second norm, up gate,
down: a layer with parallel or post-normed parts may differ there by its own input gradients, and its attention kernel
counts whole, though a frozen q or k spares an unfused one a quarter of its backward. In an encoder-decoder, a token is
one source position and one target position, and all encoder layers count as feeding all decoder layers.

Against `torch.utils.flop_counter` with eager attention, measured in tests/test_estimate.py: the error is 0 for full,
bottom, top, interval and norm plans of Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma3, Phi, Phi-3, GPT-2, GPT-NeoX, BLOOM,
Falcon and T5, and for LoRA and single matrices where attention and feed-forward follow one another. On BERT-like
models it is up to 7 % in a toy, since pooler and classifier run once a sequence and are counted once a token; a plan
inside the lowest layer of a parallel block (Phi, GPT-NeoX, Falcon) is counted up to one layer's input gradient too
dear. With DoRA it is -10 % at 64 tokens a step, and shrinks with their number; so does what DeBERTa spends on its table
of relative positions, which is per sequence and left out. What checkpointing runs again is exact for Llama, Mistral,
Qwen2, Qwen3, Gemma3, GPT-2, Phi and BERT.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsfreeze.anatomy import ATTENTION, Anatomy, Layer, Tensor

#: Where a tensor's product happens: (index of the layer, order within it).
Place = tuple[int, float]

_QKV, _INNER_NORM, _KERNEL, _OUT, _SECOND_NORM, _UP, _DOWN = 1, 2, 2.5, 3, 4, 5, 6
_STAGE = {
    "q": _QKV, "k": _QKV, "v": _QKV, "qkv": _QKV, "o": _OUT, "up": _UP, "gate": _UP, "gate_up": _UP, "down": _DOWN,
}  # fmt: skip


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


def recomputed_flops(
    anatomy: Anatomy, trainable: frozenset[str], sequence_length: int, unrepeated: frozenset[str] = frozenset()
) -> int:
    """FLOPs of a token that gradient checkpointing runs once more: every transformer layer from the lowest trainable one up, its
    attention kernel included, without the matrices `unrepeated`, after which a layer stores nothing (torch's non-reentrant checkpoint
    stops there: a Llama layer's down projection)."""
    again = 0
    for layer in anatomy.layers[anatomy.lowest_trainable(trainable) :]:
        if layer.is_block:
            again += sum(t.flops_per_token for t in layer.tensors if t.name not in unrepeated)
            again += 4 * sequence_length * anatomy.attention_width * _kernels(layer)
    return again


def prefix_flops(anatomy: Anatomy, trainable: frozenset[str], sequence_length: int) -> int:
    """FLOPs of a token's forward pass through the layers below the lowest trainable one, which a prefix cache spares."""
    return sum(
        layer.flops_per_token + 4 * sequence_length * anatomy.attention_width * _kernels(layer)
        for layer in anatomy.prefix(trainable)
        if layer.is_block
    )


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
