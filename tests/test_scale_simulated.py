"""What ranks must agree on, up to 4,096 of them, without processes: the loader's and the evaluation's dealing, the layout of shards, draws.

Oracles: sets and sums. Every example once, every element owned once, no rank's bytes above the estimate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsfreeze.anatomy import Anatomy
from dsfreeze.data.examples import Examples
from dsfreeze.data.loader import Loader
from dsfreeze.engine.flats import Flat, Pieces, Range, Slot, lay_out
from dsfreeze.estimate.states import aligned
from dsfreeze.evaluation import deal
from dsfreeze.recipe import FreezeOptions
from dsfreeze.shapes import known_anatomy
from dsfreeze.strategies import make_plan

RANKS = st.one_of(st.integers(1, 64), st.sampled_from([128, 1000, 1024, 4096]))
META = torch.device("meta")


def shares_of(loader: Loader, world_size: int) -> Iterator[list[np.ndarray]]:
    """Every rank's share of the next global batch, by micro-step: one loader stands in for all, as `rank` decides the share alone."""
    start = loader._seen
    chosen = loader._order[start : start + loader.global_batch_size]
    for rank in range(world_size):
        loader.rank = rank
        yield loader._deal(chosen)
    loader._seen += len(chosen)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 3000), per_device=st.integers(1, 4), accumulation=st.integers(1, 3), world_size=RANKS)
@example(size=10_000, per_device=1, accumulation=1, world_size=4096)
@example(size=3, per_device=4, accumulation=3, world_size=4096)
def test_every_example_is_dealt_once_an_epoch(size: int, per_device: int, accumulation: int, world_size: int) -> None:
    examples = Examples(rows=range(size), num_items=np.ones(size, int), num_tokens=np.ones(size, int))
    loader = Loader(
        examples, lambda rows: {}, lambda batch: 0, per_device_batch_size=per_device, gradient_accumulation_steps=accumulation,
        world_size=world_size,
    )  # fmt: skip
    seen: Counter[int] = Counter()
    for _ in range(loader.steps_per_epoch):
        for share in shares_of(loader, world_size):
            assert len(share) == accumulation, "every rank takes every micro-step, with a filler where it has nothing"
            assert all(len(each) <= per_device for each in share)
            seen.update(int(index) for each in share for index in each)
    assert seen == Counter(range(size))


@settings(deadline=None, max_examples=40)
@given(batches=st.integers(1, 500), world_size=RANKS)
@example(batches=1, world_size=4096)
def test_every_evaluation_batch_counts_once(batches: int, world_size: int) -> None:
    made = [np.array([number]) for number in range(batches)]
    rounds, seen = set(), Counter()
    for rank in range(world_size):
        dealt = list(deal(made, rank, world_size))
        rounds.add(len(dealt))
        seen.update(int(batch[0]) for batch, counts in dealt if counts)
    assert len(rounds) == 1, "or a rank would wait for the others for ever"
    assert seen == Counter(range(batches))


SHAPES = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(shapes=SHAPES, world_size=RANKS, kind=st.sampled_from([Range, Pieces]))
@example(shapes=[(1,)], world_size=4096, kind=Pieces)
@example(shapes=[(3, 5), (7,), (40, 40)], world_size=4096, kind=Range)
def test_every_element_has_one_owner(shapes: list[tuple[int, ...]], world_size: int, kind: type[Flat]) -> None:
    """Ranges that lie end to end from 0 to the tensor's size, in rank order; what a rank holds of different tensors does not overlap."""
    slots = [Slot(str(number), shape, 0) for number, shape in enumerate(shapes)]
    reached: Counter[str] = Counter()
    for rank in range(world_size):
        share, taken = lay_out(kind, slots, rank, world_size, META), 0
        for part in sorted(share.parts(), key=lambda part: part.at):
            assert part.first == reached[part.slot.name]
            assert part.at >= taken
            reached[part.slot.name], taken = part.last, part.at + part.last - part.first
        assert taken <= share.tensor.numel()
    assert reached == {slot.name: slot.numel for slot in slots}


def groups_of(anatomy: Anatomy, trainable: frozenset[str]) -> list[list[Slot]]:
    """One group a layer, as the engine makes them without weight decay."""
    layers = [[t for t in layer.tensors if t.name in trainable] for layer in anatomy.layers]
    return [[Slot(t.name, tuple(t.shape), 0) for t in tensors] for tensors in layers if tensors]


@pytest.mark.parametrize("world_size", [1, 3, 8, 512, 4096])
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "options", [{"fraction": 0.5}, {"strategy": "interval", "fraction": 0.5}, {"strategy": "bitfit"}]
)
def test_no_rank_holds_more_than_the_estimate(options: dict, stage: int, world_size: int) -> None:
    """Elements of masters and moments on the fullest rank, of a 6-layer encoder: what `aligned` says for every rank, to the element."""
    anatomy = known_anatomy("minilm-l6", "classification", 2)
    assert anatomy is not None
    trainable = make_plan(anatomy, FreezeOptions(**options)).ever_trained
    groups = groups_of(anatomy, trainable)
    if world_size == 4096:  # one layer stands for all: the arithmetic is by group
        groups, trainable = groups[-2:-1], frozenset(slot.name for slot in groups[-2])
    kind = Pieces if stage == 3 else Range
    _, expected = aligned(anatomy, trainable, stage, world_size)
    fullest = 0
    for rank in range(0, world_size, max(1, world_size // 64)):
        shares = [lay_out(kind, slots, rank, world_size, META) for slots in groups]
        fullest = max(fullest, sum(share.tensor.numel() for share in shares))
    assert fullest * world_size == expected


@pytest.mark.parametrize("options", [
    {"strategy": "random", "fraction": 0.5, "seed": 3}, {"strategy": "half", "seed": 3, "round": 2}, {"strategy": "half", "level": "element", "seed": 3},
    {"strategy": "lisa", "seed": 3}, {"strategy": "badam"},
])  # fmt: skip
def test_draws_know_nothing_of_the_rank(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan's digest, masks included, whatever the launcher's variables and Python's own generators say."""
    anatomy = known_anatomy("llama-3-8b", "causal_lm", None)
    assert anatomy is not None
    digests = set()
    for rank, world_size in ((0, 1), (7, 8), (4095, 4096)):
        for name, value in {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % 8}.items():
            monkeypatch.setenv(name, str(value))
        np.random.seed(rank)
        torch.manual_seed(rank)
        digests.add(make_plan(anatomy, FreezeOptions(**options), 100).digest)
    assert len(digests) == 1
