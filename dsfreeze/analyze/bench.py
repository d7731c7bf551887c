"""What the passes of an analysis work with: model, calibration data, ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from dsfreeze.anatomy import Anatomy
from dsfreeze.data import Batch, Examples, TaskData
from dsfreeze.engine import Engine
from dsfreeze.evaluation import over_all
from dsfreeze.progress import Watch
from dsfreeze.recipe import AnalyzeOptions, Recipe

T = TypeVar("T")
#: Weight change by tensor, on the CPU in the weights' dtype.
Delta = Mapping[str, torch.Tensor]
#: Examples of a micro-batch: so few are nearly of one length, and padding costs more than small products (ours).
MICRO_BATCH = 2


@dataclass(frozen=True)
class Bench:
    """`engine` holds the model that is analyzed; `watch` shows a pass's progress."""

    recipe: Recipe
    anatomy: Anatomy
    data: TaskData
    examples: Examples
    engine: Engine
    watch: Watch[Any] = iter

    @property
    def options(self) -> AnalyzeOptions:
        return self.recipe.analyze

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the layers' tensors: the columns of tables by tensor."""
        return tuple(t.name for t in self.anatomy.block_tensors)

    def first(self, number: int) -> Bench:
        """The same with the first so many examples."""
        few = self.examples
        few = Examples(few.rows[:number], few.num_items[:number], few.num_tokens[:number])
        return replace(self, examples=few)

    def collate(self, indices: Iterable[int]) -> Batch:
        return self.data.collate([self.examples[index] for index in indices])

    def over_examples(self, size: int, run: Callable[[np.ndarray], list[T]]) -> list[T]:
        """`run` on batches of indices of examples, dealt to the ranks; a result for each example, on every rank (collective)."""
        return over_all(self.engine, self.examples.num_tokens, size, run, self.watch)

    def over_batches(self, run: Callable[[np.ndarray], T]) -> list[T]:
        """`run` on consecutive batches of analyze.batch_size, smaller where there were but one, since stability compares halves
        of the batches; whole ones to a rank, a result for each (collective)."""
        number = len(self.examples)
        size = min(self.options.batch_size, -(-number // 2))
        batches = [np.arange(start, min(start + size, number)) for start in range(0, number, size)]
        lengths = np.asarray([len(batch) for batch in batches])
        return over_all(self.engine, lengths, 1, lambda chosen: [run(batches[int(chosen[0])])], self.watch)

    def rounds(self, half: np.ndarray, steps: int) -> Iterable[np.ndarray]:
        """Of `steps` steps the global batch, going round the indices of a half."""
        size = self.options.batch_size
        return self.watch(np.split(np.resize(half, steps * size), steps))

    def micro_batches(self, batch: np.ndarray) -> list[tuple[Batch, float]]:
        """This rank's part of a global batch, in micro-batches of like length, each with its weight: the share of the batch's
        items that it holds. Losses weighted by it add up to the batch's at every world size. There are as many on every rank,
        since at stage 3 every pass is collective; one without an example of its own is a filler of weight 0."""
        items, lengths = self.examples.num_items, self.examples.num_tokens
        mine = np.array_split(batch, self.engine.world_size)[self.engine.rank]
        mine = mine[np.argsort(lengths[mine], kind="stable")]
        parts = np.array_split(mine, self.num_micro_batches)
        whole = int(items[batch].sum())
        return [(self.collate(part if len(part) else batch[:1]), int(items[part].sum()) / whole) for part in parts]

    @property
    def num_micro_batches(self) -> int:
        """Of each rank for one global batch."""
        return -(-self.options.batch_size // (self.engine.world_size * MICRO_BATCH))


def halves_of(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the two halves; the sample is in random order already."""
    first, second = np.array_split(np.arange(number), 2)
    return first, second
