"""What moved? Checksums, taken when a phase begins, that show a frozen tensor changed or a trained one stood still."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dsfreeze.engine import Movement

CHUNK = 1 << 18


def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit linear hash of the tensor's bits; any change of one element shows, as does an exchange of two.

    sum_i bits_i * c_i modulo 2^64 with fixed random odd c_i, repeated every 2^18 elements; 2 MB of temporary memory.
    """
    words = tensor.detach().reshape(-1).view(_WORD[tensor.element_size()])
    factors = _factors(words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for number, chunk in enumerate(torch.split(words, CHUNK)):
        total += (chunk.to(torch.int64) * factors[: len(chunk)]).sum() * (2 * number + 1)
    return int(total)


_WORD = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FACTORS: dict[torch.device, torch.Tensor] = {}


def _factors(device: torch.device) -> torch.Tensor:
    if device not in _FACTORS:
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randint(-(2**62), 2**62, (CHUNK,), dtype=torch.int64, generator=generator)
        _FACTORS[device] = (drawn | 1).to(device)
    return _FACTORS[device]


Checksums = dict[str, tuple[int, ...]]


def checksums(tensors: Iterable[tuple[str, torch.Tensor]]) -> Checksums:
    """Checksums by name; a name that comes twice (a tensor cut into two flats) gets two."""
    sums: Checksums = {}
    for name, tensor in tensors:
        sums[name] = (*sums.get(name, ()), checksum(tensor))
    return sums


def changed(before: Checksums, after: Checksums) -> list[str]:
    """Names whose checksums differ."""
    return [name for name, value in after.items() if before.get(name) != value]


def merge(
    order: Iterable[str], frozen: Iterable[Iterable[str]], moved: Iterable[Iterable[str]], trained: set[str]
) -> Movement:
    """Every rank's findings as one: a tensor changed if it changed on any rank."""
    thawed = {name for rank in frozen for name in rank}
    alive = {name for rank in moved for name in rank}
    order = list(order)
    return Movement(
        frozen_changed=tuple(n for n in order if n in thawed),
        never_moved=tuple(n for n in order if n in trained and n not in alive),
    )
