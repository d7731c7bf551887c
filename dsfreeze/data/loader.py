"""From examples to optimizer steps, the same steps at every world size.

The order of an epoch depends on the seed and the epoch alone. Every per_device x accumulation x world examples of it
are one global batch, dealt to the micro-steps and ranks in that order; the last, short one is spread evenly, so that
every example is seen exactly once an epoch. A rank that is left with nothing gets a filler of weight 0, for ZeRO's
collectives need every rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsfreeze.data.examples import Batch, Collate, Examples
from dsfreeze.errors import UserError
from dsfreeze.recipe import TrainOptions

#: The example of a batch that must not count.
FILLER = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class Step:
    """One rank's share of an optimizer step."""

    micro_batches: list[tuple[Batch, int]]
    """(batch, items) for each micro-step: items over `global_items` is the weight of the batch's mean loss. Items are 0
    for a filler, a batch of real examples that must not count."""
    chosen: list[np.ndarray]
    """The examples of each micro-batch, by index."""
    global_items: int
    """Items of all ranks' micro-batches together."""
    tokens: int
    """Tokens of this rank's micro-batches, without padding and fillers."""
    epoch: int
    """Counted from 0."""
    last_of_epoch: bool


def num_steps_of(options: TrainOptions, num_examples: int, world_size: int) -> int:
    """Optimizer steps of a run: train.max_steps, or so many as its epochs have."""
    if options.max_steps > 0:
        return options.max_steps
    batch = options.per_device_train_batch_size * options.gradient_accumulation_steps * world_size
    return math.ceil(options.num_train_epochs * -(-num_examples // batch))


class Loader(Iterator[Step]):
    """Steps without end, one epoch after another; where it stands is four numbers (`state_dict`).

    `world_size` and `rank` decide which part of a global batch this loader reads, nothing else.
    """

    def __init__(
        self,
        examples: Examples | None,
        collate: Collate,
        num_items: Callable[[Batch], int],
        *,
        per_device_batch_size: int,
        gradient_accumulation_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 42,
    ) -> None:
        if examples is None:
            raise UserError("There is nothing to train on: data.train is empty.")
        self.examples = examples
        self.collate = collate
        self.num_items = num_items
        self.per_device_batch_size = per_device_batch_size
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self._epoch = 0
        self._seen = 0  # examples of this epoch that lie behind
        self._order = self._permutation()

    @property
    def global_batch_size(self) -> int:
        return self.per_device_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.examples) // self.global_batch_size)

    def __next__(self) -> Step:
        epoch, start = self._epoch, self._seen
        chosen = self._order[start : start + self.global_batch_size]
        self._seen += len(chosen)
        last = self._seen >= len(self.examples)
        if last:
            self._epoch, self._seen = epoch + 1, 0
            self._order = self._permutation()
        shares = self._deal(chosen)
        return Step(
            micro_batches=[self._micro_batch(share) for share in shares],
            chosen=[share if len(share) else FILLER for share in shares],
            global_items=int(self.examples.num_items[chosen].sum()),
            tokens=int(self.examples.num_tokens[np.concatenate(shares)].sum()),
            epoch=epoch,
            last_of_epoch=last,
        )

    def _permutation(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self._epoch]).permutation(len(self.examples))

    def _deal(self, chosen: np.ndarray) -> list[np.ndarray]:
        """This rank's share of a global batch, by micro-step; equal shares, the first ones larger by one if need be (np.array_split's, of
        which a rank needs its own alone)."""
        number = self.gradient_accumulation_steps * self.world_size
        size, larger = divmod(len(chosen), number)

        def start(share: int) -> int:
            return size * share + min(share, larger)

        return [chosen[start(share) : start(share + 1)] for share in range(self.rank, number, self.world_size)]

    def _micro_batch(self, share: np.ndarray) -> tuple[Batch, int]:
        if len(share) == 0:  # real labels, for a mean over none is NaN and 0 x NaN is no filler
            return self.collate([self.examples[index] for index in FILLER]), 0
        batch = self.collate([self.examples[index] for index in share])
        return batch, self.num_items(batch)

    def state_dict(self) -> dict[str, Any]:
        """Where the next step starts, in plain numbers; the same on every rank and at every world size."""
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "examples_seen": self._seen,
            "num_examples": len(self.examples),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there, also with another global batch size: the rest of the epoch is then cut anew."""
        if state["num_examples"] != len(self.examples):
            raise UserError(
                f"The checkpoint's training data had {state['num_examples']} examples, this has "
                f"{len(self.examples)}: resume with the same data section, or start a new run."
            )
        self.seed, self._epoch, self._seen = state["seed"], state["epoch"], state["examples_seen"]
        self._order = self._permutation()
