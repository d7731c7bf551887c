"""How states are stored: fp32, bf16, fp16, or int8 with one scale for each token.

A codec never clips in silence: an example that it cannot hold (a NaN, an infinity, a value beyond fp16's 65504) is refused
whole, and the caller computes it afresh each time. Values too small for fp16 or bf16 round towards zero, as any cast does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """`dtype` is what states are stored in, `tag` safetensors' name for it, `scaled` whether each token has a scale."""

    name: str
    dtype: torch.dtype
    tag: str
    scaled: bool = False

    def bytes_per_token(self, width: int) -> int:
        """What a token of `width` values takes, its scale included."""
        return width * self.dtype.itemsize + 4 * self.scaled

    def encode(self, states: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """The payload (T, d) in `dtype` and the scales (T,) in fp32, or None in their place; copies, on the CPU.

        `states` is (T, d) in any float dtype. Returns None for an example that cannot be stored: see the module's head.

        int8 is symmetric: a token's scale is max|x| / 127, so a value errs by at most half a scale, max|x| / 254, give or
        take fp32's rounding (2^-23 of max|x|; below 2^-119 the scale itself is a rounded subnormal, worth another 2^-143).
        """
        states = states.detach()
        if self.scaled:
            return _quantise(states)
        payload = torch.empty(states.shape, dtype=self.dtype).copy_(states)
        return (payload, None) if _finite(payload) else None

    def decode(self, payload: Tensor, scales: Tensor | None, out: Tensor) -> None:
        """Write the states into `out` (T, d), any float dtype; bit-exact where that is the dtype they were stored in."""
        if scales is None:
            out.copy_(payload)
        else:
            out.copy_(payload.float().mul_(scales[:, None]))


CODECS = {
    codec.name: codec
    for codec in (
        Codec("fp32", torch.float32, "F32"),
        Codec("bf16", torch.bfloat16, "BF16"),
        Codec("fp16", torch.float16, "F16"),
        Codec("int8", torch.int8, "I8", scaled=True),
    )
}


def _quantise(states: Tensor) -> tuple[Tensor, Tensor] | None:
    values = torch.empty(states.shape, dtype=torch.float32).copy_(states)
    scales = values.abs().amax(dim=1) / 127
    # a NaN or an infinity spreads to its token's scale; and 127 scales, the largest value read back, may not overflow
    if not _finite(scales * 127):
        return None
    divisor = scales.where(scales > 0, 1.0)  # a row of zeros: a NaN has no integer
    payload = values.div_(divisor[:, None]).round_().clamp_(-127, 127)
    return payload.to(torch.int8), scales


def _finite(values: Tensor) -> bool:
    # both pass a NaN on; eight times as fast as isfinite over all of them, which every example added would pay
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())
