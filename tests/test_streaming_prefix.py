"""Filling a store group by group, and the digests read on the way. The oracle is the whole model: its own states and logits, its own
`base_hash`, its layers' own digests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evicted_kit import shelf, states_in
from test_parts import SINGLE_STACK, load, saved
from tiny_runs import llama_folder
from transformers import PreTrainedModel

from dsfreeze.anatomy import Anatomy
from dsfreeze.data.examples import Examples, TokenCollate
from dsfreeze.errors import UserError
from dsfreeze.model import base_hash, outline_of, read_anatomy
from dsfreeze.prefix.eviction import Eviction, _evictable, groups_of, prefix_layers, read_digests, without
from dsfreeze.prefix.keys import example_key, layer_digest
from dsfreeze.prefix.passage import Passage, Span, require_suffix
from dsfreeze.prefix.rows import Rows
from dsfreeze.prefix.store import MemoryStore
from dsfreeze.prefix.streaming import Work, everybody_has, fill, lacking
from dsfreeze.recipe import ModelOptions

CUT = 2
CPU = torch.device("cpu")
COLLATE = TokenCollate(0)


def rows_of(lengths: Sequence[int], seed: int = 0) -> Examples:
    draw = np.random.default_rng(seed)
    rows = [{"input_ids": draw.integers(2, 90, n).tolist(), "labels": [0] * n} for n in lengths]
    return Examples(rows, np.ones(len(rows), dtype=np.int64), np.asarray(lengths, dtype=np.int64))


def as_rows(*parts: Examples) -> list[Rows]:
    return [Rows(part) for part in parts]


def work(batch_size: int = 4, **more: Any) -> Work:
    given = {"dtype": torch.float32, "collate": COLLATE, "scratch": shelf, **more}
    return Work(CPU, batch_size=batch_size, **given)


class Suffix:
    """A model in a folder, whole, and everything that a run has that evicts its lowest layers."""

    def __init__(self, folder: Path, task: str = "classification") -> None:
        self.folder, self.task = folder, task
        self.whole = load(folder, task=task).eval()
        self.outline = outline_of(ModelOptions(name=str(folder)), task, 3)
        self.anatomy: Anatomy = read_anatomy(self.outline, "x")
        self.eviction = Eviction(CUT, _evictable(self.outline, self.anatomy, CUT))
        self.read: list[set[str]] = []

    def load(self, kept: Any) -> PreTrainedModel:
        self.read.append(set(kept))
        return load(self.folder, set(kept), task=self.task).eval()

    def module(self) -> PreTrainedModel:
        return self.load({t.name for t in self.anatomy.tensors} - self.eviction.names)

    @torch.no_grad()
    def states(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with Passage(self.whole, self.anatomy).over(Span(keep=CUT)) as kept:
            self.whole(**batch)
        assert kept.states is not None
        return kept.states


def batch_of(rows: Examples, indices: Sequence[int]) -> dict[str, torch.Tensor]:
    batch = COLLATE([rows[i] for i in indices])
    return {name: value for name, value in batch.items() if name != "labels"}


def stored(store: MemoryStore, rows: Examples, indices: Sequence[int], width: int) -> torch.Tensor:
    out = torch.zeros(len(indices), int(rows.num_tokens[list(indices)].max()), width)
    for at, index in enumerate(indices):
        assert store.read(example_key(rows[index]), out[at, : rows.num_tokens[index]])
    return out


TIED = ["gpt2", "gemma3", "opt", "bloom", "falcon"]


@pytest.mark.parametrize(
    ("name", "task"),
    [*((name, "classification") for name in SINGLE_STACK), *((name, "causal_lm") for name in ("llama", *TIED))],
)
def test_suffix_on_streamed_states_is_the_whole_model(tmp_path: Path, name: str, task: str) -> None:
    """One layer at a time, the same batches: states and logits are the whole model's to the last bit."""
    suffix = Suffix(saved(tmp_path, name), task)
    rows = rows_of([9] * 7)
    data, store = as_rows(rows), shelf()
    fill(suffix.load, data, suffix.anatomy, CUT, store, work())
    module, width = suffix.module(), suffix.anatomy.hidden_size
    passage = Passage(module, suffix.anatomy)
    for indices in ([0, 1, 2, 3], [4, 5, 6]):
        batch, states = batch_of(rows, indices), stored(store, rows, indices, width)
        assert torch.equal(states, suffix.states(batch))
        with torch.no_grad():
            require_suffix(passage, lambda inputs: module(**inputs), batch, states, CUT)
            with passage.over(Span(CUT, states)):
                found = module(**batch).logits
            assert torch.equal(found, suffix.whole(**batch).logits)
    held = {n for n, _ in module.named_parameters()}
    assert held == {t.name for t in suffix.anatomy.tensors} - suffix.eviction.names
    assert not any(t.name in held for layer in suffix.anatomy.blocks[:CUT] for t in layer.tensors)
    assert [t.name for t in without(suffix.anatomy, suffix.eviction.names).tensors] == [
        t.name for t in suffix.anatomy.tensors if t.name in held
    ]


@pytest.mark.parametrize("name", SINGLE_STACK)
def test_digests_are_those_of_the_whole_model(tmp_path: Path, name: str) -> None:
    suffix = Suffix(saved(tmp_path, name))
    args = (suffix.load, suffix.module(), suffix.outline, suffix.anatomy, suffix.eviction)
    hashed, layers = read_digests(*args, room=0, dtype=torch.float32)
    assert hashed == base_hash(suffix.whole)
    weights = dict(suffix.whole.named_parameters())
    assert layers == [layer_digest(layer, weights) for layer in prefix_layers(suffix.anatomy, CUT)]
    assert len(layers) == CUT + 1
    assert sum(map(len, suffix.read[1:])) == len(suffix.eviction.names)  # each read once
    assert not set.union(*suffix.read[1:]) - suffix.eviction.names
    assert read_digests(*args, room=2**30, dtype=torch.float32) == (hashed, layers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bloom", "modernbert", "deberta-v2"])
def test_other_batches_give_the_same_states_but_for_rounding(tmp_path: Path, name: str) -> None:
    suffix = Suffix(saved(tmp_path, name))
    rows, evaluation = rows_of([3, 11, 5, 8, 2, 11, 7]), rows_of([4, 13], seed=1)
    data, store = as_rows(rows, evaluation), shelf()
    filled = fill(suffix.load, data, suffix.anatomy, CUT, store, work(3))
    assert (filled.examples, filled.tokens) == (9, 64)
    for part in (rows, evaluation):
        for index in range(len(part)):
            wanted = suffix.states(batch_of(part, [index]))
            found = stored(store, part, [index], suffix.anatomy.hidden_size)
            assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_groups_take_the_room_they_are_given(tmp_path: Path) -> None:
    suffix = Suffix(llama_folder(tmp_path))
    layers = suffix.anatomy.blocks
    one = layers[0].numel * 4
    assert [len(g) for g in groups_of(layers, 0, torch.float32)] == [1, 1, 1, 1]
    assert [len(g) for g in groups_of(layers, 3 * one, torch.float32)] == [3, 1]
    assert [len(g) for g in groups_of(layers, one, torch.bfloat16)] == [2, 2]


def test_groups_make_no_difference(tmp_path: Path) -> None:
    """Nor does it matter that states wait elsewhere; only one group's weights are ever asked for."""
    suffix, rows = Suffix(llama_folder(tmp_path)), rows_of([6, 9, 4, 9])
    stores = [shelf(), shelf()]
    shelves: list[MemoryStore] = []
    for store, room in zip(stores, (0, 2**30), strict=True):
        suffix.read.clear()
        scratch = lambda: shelves.append(shelf()) or shelves[-1]  # noqa: E731
        fill(suffix.load, as_rows(rows), suffix.anatomy, 3, store, work(2, room=room, scratch=scratch))
        blocks = [{n.split(".")[2] for n in part if ".layers." in n} for part in suffix.read]
        assert blocks == ([{"0"}, {"1"}, {"2"}] if room == 0 else [{"0", "1", "2"}])
        assert ["model.embed_tokens.weight" in part for part in suffix.read] == [True, False, False][: len(suffix.read)]
        assert not any(name in ("score.weight", "model.norm.weight") for part in suffix.read for name in part)
    assert len(shelves) == 2  # between three groups
    assert not any(map(len, shelves))
    assert all(torch.equal(a, states_in(stores[1])[key]) for key, a in states_in(stores[0]).items())
    assert len(stores[0]) == 4


def test_a_stopped_fill_goes_on_with_what_is_lacking(tmp_path: Path) -> None:
    suffix, rows = Suffix(llama_folder(tmp_path)), rows_of([6, 9, 4, 9, 5, 5])
    data, store = as_rows(rows), shelf()

    def stopping(rounds: Sequence[Any]) -> Any:
        yield from rounds[: len(rounds) - 1]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(suffix.load, data, suffix.anatomy, CUT, store, work(2), stopping)
    assert len(store) == 4
    before = dict(states_in(store))
    with pytest.raises(UserError, match="lacks 2 examples"):
        everybody_has(data, store)
    assert fill(suffix.load, data, suffix.anatomy, CUT, store, work(2)).examples == 2
    everybody_has(data, store)
    assert all(states_in(store)[key] is states for key, states in before.items())
    suffix.read.clear()
    assert fill(suffix.load, data, suffix.anatomy, CUT, store, work(2)).examples == 0
    assert suffix.read == []


def test_ranks_share_the_examples(tmp_path: Path) -> None:
    suffix, rows = Suffix(llama_folder(tmp_path)), rows_of([6, 9, 4, 9, 5, 5, 7])
    data, whole, parts = as_rows(rows), shelf(), [shelf(), shelf()]
    fill(suffix.load, data, suffix.anatomy, CUT, whole, work(2))
    for rank, part in enumerate(parts):
        fill(suffix.load, data, suffix.anatomy, CUT, part, work(2, share=(rank, 2)))
    assert sorted(map(len, parts)) == [3, 4]
    both = states_in(parts[0]) | states_in(parts[1])
    assert both.keys() == states_in(whole).keys()
    assert all(torch.equal(states, states_in(whole)[key]) for key, states in both.items())


def test_the_same_example_is_computed_once() -> None:
    rows = rows_of([5, 6])
    twice = Examples([*rows.rows, {**rows.rows[0], "labels": [1] * 5}], np.ones(3), np.asarray([5, 6, 5]))
    assert [w.index for w in lacking(as_rows(twice, rows), shelf())] == [0, 1]
