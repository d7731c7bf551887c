"""Packing: several examples in one sequence, each attending to itself alone.

Nothing but `position_ids` says where an example starts: they count from 0 again. With these, no
attention mask and no cache (`use_cache=False`), transformers builds block-diagonal attention (masking_utils.py). Not
every model and attention implementation obeys, and one that does not would train on wrong contexts in silence:
`check_packing` tries it out.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from dsfreeze.data.examples import IGNORED, Batch, Collate, Example, Examples, pad
from dsfreeze.errors import UserError


@dataclass(frozen=True)
class Packed(Sequence[Example]):
    """One row per bin: its examples end to end, with `position_ids` that start anew at each."""

    examples: Examples
    bins: tuple[tuple[int, ...], ...]

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: Any) -> Any:
        parts = [self.examples[i] for i in self.bins[index]]
        return {
            "input_ids": list(chain.from_iterable(part["input_ids"] for part in parts)),
            # an example's first token is predicted by nothing; here it would be by its neighbour's last
            "labels": list(chain.from_iterable([IGNORED, *part["labels"][1:]] for part in parts)),
            "position_ids": list(chain.from_iterable(range(len(part["input_ids"])) for part in parts)),
        }


def pack(examples: Examples, max_length: int) -> Examples:
    """The same examples in sequences of at most `max_length` tokens; items and tokens stay what they were."""
    bins = fill_bins(examples.num_tokens.tolist(), max_length)

    def sums(counts: np.ndarray) -> np.ndarray:
        return np.asarray([counts[list(members)].sum() for members in bins], dtype=np.int64)

    return Examples(Packed(examples, bins), sums(examples.num_items), sums(examples.num_tokens))


def fill_bins(lengths: Sequence[int], capacity: int) -> tuple[tuple[int, ...], ...]:
    """Best fit, longest first: each length's index goes to the fullest bin that still has room (at most 11/9 of the
    fewest possible bins, plus one). No length may exceed `capacity`."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, (lengths[index], -1))
        room, number = rooms.pop(at) if at < len(rooms) else (capacity, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(index)
        insort(rooms, (room - lengths[index], number))
    return tuple(tuple(members) for members in bins)


@dataclass(frozen=True)
class PackedCollate:
    """Pads packed rows without an attention mask: the padding is one more example, without labels. Rows that are not
    packed (those of the evaluation) go to `plain`."""

    plain: Collate

    def __call__(self, examples: Sequence[Example]) -> Batch:
        if "position_ids" not in examples[0]:
            return self.plain(examples)
        batch = self.plain([{key: example[key] for key in ("input_ids", "labels")} for example in examples])
        width = batch.pop("attention_mask").shape[1]
        positions = [[*row["position_ids"], *range(width - len(row["position_ids"]))] for row in examples]
        return {**batch, "position_ids": pad(positions, 0)}


def check_packing(forward: Callable[[Batch], Any], vocab_size: int, *, tolerance: float = 1e-4) -> None:
    """Refuses a model whose packed examples see each other.

    `forward` is `Engine.no_grad_forward` (collective at ZeRO-3: every rank calls this). Two short examples are run
    packed, and the second one by itself; its logits must agree within `tolerance` of their largest, and 300 times that
    in 16 bits.
    """
    first, second = ([(7 * i + start) % vocab_size for i in range(6)] for start in (3, 5))
    packed = {"input_ids": pad([first + second, second + first], 0)}
    packed["position_ids"] = pad([[*range(6), *range(6)]] * 2, 0)
    alone = {"input_ids": pad([second, first], 0), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    try:
        together, apart = forward(packed).logits[:, 6:], forward(alone).logits
    except TypeError as error:
        if "position_ids" not in str(error):
            raise
        raise UserError("data.packing: this model takes no position_ids; write data.packing: false.") from error
    scale = 300 if apart.dtype in (torch.float16, torch.bfloat16) else 1
    distance = (together.float() - apart.float()).abs().max() / apart.float().abs().max()
    if not distance <= tolerance * scale:
        raise UserError(
            "data.packing: this model, with this attention implementation, lets packed examples see each other "
            f"(logits differ by {float(distance):.1e} of their size). "
            "Write model.attn_implementation: sdpa, or data.packing: false."
        )
