"""Filling a store group by group, and the digests read on the way. The oracle is the whole model: its own states and logits, its own
`base_hash`, its layers' own digests."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evicted_kit import shelf, states_in
from marks import some_fast
from test_parts import SINGLE_STACK, load, saved
from tiny_runs import llama_folder
from transformers import PreTrainedModel

from dsfreeze.anatomy import Anatomy
from dsfreeze.data.examples import Examples, TokenCollate
from dsfreeze.data.packing import PackedCollate, pack
from dsfreeze.errors import UserError
from dsfreeze.model import base_hash, outline_of, read_anatomy
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.eviction import (
    CACHE,
    EVICT,
    Asked,
    Eviction,
    _evictable,
    groups_of,
    prefix_layers,
    read_digests,
    without,
)
from dsfreeze.prefix.keys import example_key, layer_digest
from dsfreeze.prefix.passage import Passage, Span, require_suffix
from dsfreeze.prefix.rows import Rows
from dsfreeze.prefix.store import DiskStore, MemoryStore, Store
from dsfreeze.prefix.streaming import Work, everybody_has, fill, lacking, scratch_bytes
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


@pytest.mark.parametrize("name", some_fast(SINGLE_STACK, 5))
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


# -- what a fill cannot do -----------------------------------------------------------------------------------------


def disk(folder: Path, **options: Any) -> DiskStore:
    return DiskStore(folder, 32, CODECS["fp32"], "w", **{"may_write": True, **options})


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dsfreeze.prefix.store.write_shard", refuse)


class Changed(Suffix):
    """A Llama on whose parts something is done as they are read."""

    def __init__(self, folder: Path, change: Callable[[Any], Any]) -> None:
        super().__init__(llama_folder(folder))
        self.change = change

    def load(self, kept: Any) -> PreTrainedModel:
        module = super().load(kept)
        with torch.no_grad():
            self.change(module)
        return module

    def fill(self, store: Store | None = None, cut: int = CUT, **more: Any) -> Any:
        rows = as_rows(rows_of([6, 9, 4, 9]))
        return fill(self.load, rows, self.anatomy, cut, shelf() if store is None else store, work(2, **more))


def nothing(_: Any) -> None:
    pass


@pytest.mark.usefixtures("full_disk")
def test_a_disk_that_is_full_where_states_wait(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"No space left on device.*Free space there.*freeze\.prefix_cache_dir elsewhere"
    ):
        Changed(tmp_path / "m", nothing).fill(scratch=lambda: disk(tmp_path / "waiting"))


def test_a_place_to_wait_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no place where states could wait.*nowhere.*freeze\.prefix_cache_dir"):
        Changed(tmp_path / "m", nothing).fill(scratch=lambda: tempfile.mkdtemp(dir=tmp_path / "nowhere"))


def test_waiting_states_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiskStore, "read", lambda *_: False)
    with pytest.raises(UserError, match=r"waited for the next layers cannot be read again .*they are gone"):
        Changed(tmp_path / "m", nothing).fill(scratch=lambda: disk(tmp_path / "waiting"))


@pytest.mark.parametrize("cut", [1, 2])  # refused by the store itself, and where they wait
@pytest.mark.parametrize(
    ("dtype", "mend"), [(torch.bfloat16, r"bfloat16.*train\.bf16: false"), (torch.float32, "float32.*files are whole")]
)
def test_states_that_are_not_finite(tmp_path: Path, cut: int, dtype: torch.dtype, mend: str) -> None:
    def spoil(module: Any) -> None:
        if (weight := module.model.layers[0].mlp.down_proj.weight) is not None:
            weight[0, 0] = torch.nan

    with pytest.raises(UserError, match=rf"leave layers\.0 are not finite: .*{mend}"):
        Changed(tmp_path, spoil).fill(cut=cut, dtype=dtype)


def test_states_too_large_for_the_stores_precision(tmp_path: Path) -> None:
    def enlarge(module: Any) -> None:
        if (weight := module.model.embed_tokens.weight) is not None:
            weight.mul_(1e8)

    with pytest.raises(UserError, match=r"too large for freeze\.prefix_cache_dtype.*prefix_cache_dtype: auto"):
        Changed(tmp_path, enlarge).fill(MemoryStore(32, CODECS["fp16"]))


@pytest.mark.usefixtures("full_disk")
def test_a_fill_stops_when_its_store_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsfreeze.prefix.streaming.FLUSH_EVERY", 2)
    suffix, begun = Suffix(llama_folder(tmp_path / "m")), []

    def counting(rounds: Sequence[Any]) -> Any:
        for one in rounds:
            begun.append(one)
            yield one

    rows = as_rows(rows_of([5, 6, 7, 8, 9, 10]))
    with pytest.raises(UserError, match=r"cannot be filled: .*No space left on device"):
        fill(suffix.load, rows, suffix.anatomy, 1, disk(tmp_path / "store"), work(1), counting)
    assert len(begun) == 2


def test_a_layer_that_gives_another_precision(tmp_path: Path) -> None:
    def widen(module: Any) -> None:
        module.model.layers[0].register_forward_hook(lambda _, __, states: states.float())

    with pytest.raises(UserError, match=r"gives states in float32 in a run in bfloat16.*train\.bf16: false, or write"):
        Changed(tmp_path, widen).fill(cut=1, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("asked", "mend"),
    [(EVICT, r"Write freeze\.evict_prefix: false\."), (CACHE, r"Train with freeze\.prefix_cache=disk, which fills")],
)
def test_a_layer_that_lacks_something(tmp_path: Path, asked: Asked, mend: str) -> None:
    def take(module: Any) -> None:
        module.model.layers[1].mlp.up_proj._parameters["weight"] = None

    with pytest.raises(
        UserError, match=rf"LlamaForSequenceCl\w+ cannot .*\(layers\.1\): .*TypeError: .*NoneType.*{mend}"
    ):
        Changed(tmp_path, take).fill(asked=asked)


def test_too_little_memory_is_no_fault_of_the_model(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Changed(tmp_path, lambda module: module.model.layers[0].register_forward_hook(fail)).fill()


def test_a_layer_that_reads_the_embedding_too(tmp_path: Path) -> None:
    """It does not fail: it would compute with what stands for the embedding."""

    def join(module: Any) -> None:
        seen: list[torch.Tensor] = []
        module.model.embed_tokens.register_forward_hook(lambda _, __, out: seen.append(out))
        module.model.layers[1].register_forward_hook(lambda _, __, out: out + seen[-1])

    with pytest.raises(UserError, match=r"\(layers\.1\): they read the embedding beside the states"):
        Changed(tmp_path, join).fill()
    Changed(tmp_path, join).fill(room=2**30)  # in one group it is there


def test_each_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bytes] = []
    monkeypatch.setattr("dsfreeze.prefix.rows.example_key", lambda row: made.append(example_key(row)) or made[-1])
    suffix, rows, store = Suffix(llama_folder(tmp_path)), as_rows(rows_of([6, 9, 4]), rows_of([5], seed=1)), shelf()
    fill(suffix.load, rows, suffix.anatomy, CUT, store, work())
    everybody_has(rows, store)
    assert len(made) == len(set(made)) == len(store) == 4


@pytest.mark.parametrize(("cut", "stores"), [(1, 0), (2, 1), (3, 2), (4, 2)])
def test_what_waits_takes_what_is_said(tmp_path: Path, cut: int, stores: int) -> None:
    """One layer a group; 28 tokens of 32 values."""
    suffix, shelves, peaks = Suffix(llama_folder(tmp_path)), [], []

    def scratch() -> MemoryStore:
        shelves.append(shelf())
        return shelves[-1]

    def looking(rounds: Sequence[Any]) -> Any:
        for one in rounds:
            yield one
            peaks.append(sum(each.nbytes for each in shelves))

    rows = as_rows(rows_of([6, 9, 4, 9]))
    fill(suffix.load, rows, suffix.anatomy, cut, shelf(), work(2, scratch=scratch), looking)
    assert max(peaks) == scratch_bytes(28, 32, torch.float32, cut) == stores * 28 * 32 * 4
    assert scratch_bytes(28, 32, torch.bfloat16, cut) == stores * 28 * 32 * 2


def test_packed_examples_are_filled_as_the_whole_model_sees_them(tmp_path: Path) -> None:
    suffix = Suffix(llama_folder(tmp_path), "causal_lm")
    packed, store = pack(rows_of([6, 9, 4, 3, 5]), 13), shelf()
    collate = PackedCollate(COLLATE)
    fill(suffix.load, as_rows(packed), suffix.anatomy, CUT, store, work(1, collate=collate))
    for index in range(len(packed)):
        batch = {name: value for name, value in collate([packed[index]]).items() if name != "labels"}
        assert torch.equal(stored(store, packed, [index], 32), suffix.states(batch))
