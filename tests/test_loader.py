"""The loader: the same steps at every world size, every example once an epoch, and resuming anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from dsfreeze.data import Loader, Step
from dsfreeze.data.examples import Examples
from dsfreeze.errors import UserError


def examples(size: int) -> Examples:
    """Example i holds the number i, counts i % 3 + 1 items and i + 1 tokens."""
    numbers = np.arange(size)
    return Examples([{"number": i, "items": i % 3 + 1} for i in range(size)], numbers % 3 + 1, numbers + 1)


def collate(rows: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("number", "items")}


def loader(size: int, per_device: int, accumulation: int, rank: int = 0, world_size: int = 1, seed: int = 7) -> Loader:
    return Loader(
        examples(size), collate, lambda batch: int(batch["items"].sum()), per_device_batch_size=per_device,
        gradient_accumulation_steps=accumulation, rank=rank, world_size=world_size, seed=seed,
    )  # fmt: skip


def numbers(step: Step) -> list[int]:
    """What counts in a rank's share, in order."""
    return [n for batch, items in step.micro_batches if items for n in batch["number"].tolist()]


LAYOUTS = [(6, 2, 1), (12, 1, 1), (3, 2, 2), (6, 1, 2), (2, 2, 3), (4, 1, 3), (1, 4, 3)]


@pytest.mark.parametrize("size", [48, 53, 37, 5])
@pytest.mark.parametrize(("per_device", "accumulation", "world_size"), LAYOUTS)
def test_global_batches_do_not_depend_on_the_ranks(
    size: int, per_device: int, accumulation: int, world_size: int
) -> None:
    """Oracle: one rank with the whole global batch of 12; and every example once an epoch, counted."""
    whole = loader(size, 12, 1)
    ranks = [loader(size, per_device, accumulation, rank, world_size) for rank in range(world_size)]
    assert {r.steps_per_epoch for r in ranks} == {whole.steps_per_epoch}
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for number in range(whole.steps_per_epoch):
            expected, steps = next(whole), [next(rank) for rank in ranks]
            dealt = [n for step in steps for n in numbers(step)]
            assert Counter(dealt) == Counter(numbers(expected))
            assert {step.global_items for step in steps} == {expected.global_items}
            assert sum(items for step in steps for _, items in step.micro_batches) == expected.global_items
            assert sum(step.tokens for step in steps) == expected.tokens == sum(n + 1 for n in dealt)
            assert {len(step.micro_batches) for step in steps} == {accumulation}
            assert {step.epoch for step in steps} == {epoch}
            assert {step.last_of_epoch for step in steps} == {number == whole.steps_per_epoch - 1}
            seen.update(dealt)
        assert seen == Counter(range(size))


def test_the_short_batch_is_spread_evenly_and_fillers_are_real_examples() -> None:
    """Oracle: 5 examples over 4 ranks are 2 + 1 + 1 + 1; 2 are 1 + 1 + 0 + 0 and the rest fillers of weight 0."""
    for size, shares in ((5, [2, 1, 1, 1]), (2, [1, 1, 0, 0])):
        steps = [next(loader(size, 4, 1, rank, 4)) for rank in range(4)]
        assert [len(numbers(step)) for step in steps] == shares
        assert all(len(batch["number"]) for step in steps for batch, _ in step.micro_batches)


def test_epochs_and_seeds_give_other_orders() -> None:
    first = loader(40, 40, 1)
    orders = [numbers(next(first)), numbers(next(first)), numbers(next(loader(40, 40, 1, seed=8)))]
    assert len({tuple(order) for order in orders}) == 3
    assert numbers(next(loader(40, 40, 1))) == orders[0]


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resuming_goes_on_where_it_stopped(stop: int, world_size: int) -> None:
    """Oracle: the uninterrupted loader, at an epoch's start, middle and end, and at another world size."""
    whole, stopped = loader(45, 12, 1), loader(45, 12, 1)
    for _ in range(stop):
        next(whole)
        next(stopped)
    ranks = [loader(45, 12 // world_size, 1, rank, world_size, seed=99) for rank in range(world_size)]
    for rank in ranks:
        rank.load_state_dict(stopped.state_dict())
    for _ in range(6):
        expected, steps = next(whole), [next(rank) for rank in ranks]
        assert sorted(n for step in steps for n in numbers(step)) == sorted(numbers(expected))
        assert steps[0].epoch == expected.epoch
        assert ranks[0].state_dict() == whole.state_dict()


def test_another_batch_size_still_sees_every_example_once() -> None:
    """Oracle: counting over the epoch in which the batch size changed."""
    before, after = loader(50, 8, 1), loader(50, 5, 2)
    seen = numbers(next(before)) + numbers(next(before))
    after.load_state_dict(before.state_dict())
    while True:
        step = next(after)
        seen += numbers(step)
        if step.last_of_epoch:
            break
    assert Counter(seen) == Counter(range(50))


def test_no_data_and_other_data_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.train is empty"):
        Loader(None, collate, len, per_device_batch_size=1)
    with pytest.raises(UserError, match="had 50 examples, this has 49"):
        loader(49, 4, 1).load_state_dict(loader(50, 4, 1).state_dict())
