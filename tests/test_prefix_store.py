"""The prefix cache's storage. Oracles: what was put in, to the last bit or within the codec's stated error; safetensors' own
reader for the files; the kernel for locks, killed processes and resident memory. Damage may lose states, never change them."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from dsfreeze.prefix import folder as folder_module
from dsfreeze.prefix import shards
from dsfreeze.prefix.codec import CODECS
from dsfreeze.prefix.folder import CacheFolder, free_bytes, others
from dsfreeze.prefix.shards import DamagedShard, ForeignShard, open_shard, write_shard
from dsfreeze.prefix.store import DiskStore, MemoryStore

WIDTH = 16
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def key_of(number: int) -> bytes:
    return number.to_bytes(16, "big")


def states_of(number: int, dtype: torch.dtype = torch.float32, width: int = WIDTH) -> torch.Tensor:
    """The states of example `number`: 1 to 9 tokens, told by the number alone, also in another process."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(1 + number % 9, width, generator=generator).to(dtype)


def disk_store(folder: Path, codec: str = "fp32", writer: str = "w", width: int = WIDTH, **options) -> DiskStore:
    return DiskStore(folder, width, CODECS[codec], writer, **{"may_write": True, **options})


def filled(folder: Path, numbers, codec: str = "fp32", **options) -> DiskStore:
    store = disk_store(folder, codec, **options)
    for number in numbers:
        store.add(key_of(number), states_of(number))
    store.flush()
    return store


def holds(store, number: int, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the store gives example `number`; fails when it gives anything else."""
    expected = states_of(number, dtype)
    out = torch.full_like(expected, 7)
    found = store.read(key_of(number), out)
    assert not found or torch.equal(out, expected), f"example {number} came back with other states"
    return found


def shards_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.safetensors"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# -- codecs


@pytest.mark.parametrize("name", FLOATS)
def test_states_come_back_to_the_last_bit_in_the_dtype_they_were_stored_in(name):
    dtype = FLOATS[name]
    tiny = torch.finfo(dtype).smallest_normal
    odd = torch.tensor([0.0, -0.0, tiny, tiny / 4, -tiny / 4, torch.finfo(dtype).max, -torch.finfo(dtype).max, 1 / 3])
    states = torch.stack([odd, torch.randn(8)]).to(dtype)
    payload, scales = CODECS[name].encode(states)
    out = torch.empty_like(states)
    CODECS[name].decode(payload, scales, out)
    assert scales is None
    assert payload.dtype == dtype
    assert same_bits(out, states)


@pytest.mark.parametrize("dtype", [*FLOATS.values(), torch.float64])
def test_fp32_holds_every_narrower_dtype_exactly(dtype):
    states = torch.randn(5, 8).to(dtype)
    payload, _ = CODECS["fp32"].encode(states)
    out = torch.empty_like(states)
    CODECS["fp32"].decode(payload, None, out)
    assert same_bits(out, states)


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_copies(name):
    states = torch.ones(2, 4)
    payload, scales = CODECS[name].encode(states)
    states.zero_()
    out = torch.empty(2, 4)
    CODECS[name].decode(payload, scales, out)
    assert torch.equal(out, torch.ones(2, 4))


def int8_error_bound(states: torch.Tensor) -> torch.Tensor:
    """The docstring's: half a scale, fp32's rounding, and that of a subnormal scale; computed in fp64."""
    largest = states.double().abs().amax(dim=1, keepdim=True)
    return largest / 254 + largest * 2.0**-23 + (largest < 2.0**-119) * 2.0**-143


finite = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(lambda x: abs(x) < 1e38)


@settings(max_examples=300, deadline=None)
@example([[190 * 2.0**-149, -(2.0**-149), 0.0]])  # 1.5 steps of the smallest subnormal, so the scale is one
@example([[2.0**-144, -(2.0**-149), 0.0]])  # the scale rounds to zero
@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=4))
def test_int8_errs_by_half_a_scale_at_most(rows):
    states = torch.tensor(rows)
    payload, scales = CODECS["int8"].encode(states)
    out = torch.empty_like(states)
    CODECS["int8"].decode(payload, scales, out)
    assert payload.dtype == torch.int8
    assert scales.shape == (len(rows),)
    assert ((out.double() - states.double()).abs() <= int8_error_bound(states)).all()


def test_int8_of_a_typical_row_nearly_reaches_its_bound_and_zero_rows_are_zero():
    states = torch.randn(50, 4096)
    states[7] = 0
    payload, scales = CODECS["int8"].encode(states)
    out = torch.empty_like(states)
    CODECS["int8"].decode(payload, scales, out)
    error = (out - states).abs().amax(dim=1)
    half = states.abs().amax(dim=1) / 254
    assert torch.equal(out[7], torch.zeros(4096))
    assert (error <= half * (1 + 1e-4)).all()
    assert error.sum() > 0.95 * half.sum()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(name, bad):
    states = torch.randn(3, 4)
    states[1, 2] = bad
    assert CODECS[name].encode(states) is None


@pytest.mark.parametrize(
    ("name", "value", "fits"),
    [
        ("fp16", 65504.0, True), ("fp16", 65520.0, False), ("fp16", -1e6, False), ("bf16", 1e6, True),
        ("bf16", torch.finfo(torch.float32).max, False), ("fp32", 1e300, False), ("int8", 1e300, False), ("int8", 1e38, True),
    ],
)  # fmt: skip
def test_what_overflows_is_refused_not_clipped(name, value, fits):
    states = torch.full((2, 4), value, dtype=torch.float64)
    assert (CODECS[name].encode(states) is not None) == fits


@pytest.mark.parametrize("codec", CODECS)
def test_an_example_without_tokens_is_an_example(tmp_path, codec):
    for store in (MemoryStore(WIDTH, CODECS[codec]), disk_store(tmp_path, codec)):
        store.add(key_of(0), torch.empty(0, WIDTH))
        store.flush()
        assert store.read(key_of(0), torch.empty(0, WIDTH))
        assert not store.read(key_of(0), torch.empty(1, WIDTH))
        assert len(store) == 1


def test_bytes_per_token():
    assert [codec.bytes_per_token(384) for codec in CODECS.values()] == [1536, 768, 768, 388]


# -- both stores


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["memory", "disk buffer", "disk"])
@pytest.mark.parametrize("dtype", FLOATS.values())
def test_what_was_added_is_read_as_the_codec_gives_it(tmp_path, codec, kind, dtype):
    store = MemoryStore(WIDTH, CODECS[codec]) if kind == "memory" else disk_store(tmp_path, codec)
    for number in range(30):
        store.add(key_of(number), states_of(number, dtype))
    if kind == "disk":
        store.close()
        store = disk_store(tmp_path, codec, may_write=False)
    for number in range(30):
        states = states_of(number, dtype)
        expected, out = torch.empty_like(states), torch.empty_like(states)
        CODECS[codec].decode(*CODECS[codec].encode(states), expected)
        assert store.read(key_of(number), out)
        assert same_bits(out, expected)
        if codec != "int8" and dtype == FLOATS[codec]:
            assert same_bits(out, states)
    assert len(store) == 30
    assert store.nbytes == sum(1 + n % 9 for n in range(30)) * CODECS[codec].bytes_per_token(WIDTH)
    assert store.failure is None


@pytest.mark.parametrize("kind", ["memory", "disk buffer", "disk"])
def test_absent_keys_other_lengths_and_second_adds(tmp_path, kind):
    store = MemoryStore(WIDTH, CODECS["fp32"]) if kind == "memory" else disk_store(tmp_path)
    states = states_of(3)
    store.add(key_of(3), states)
    store.add(key_of(3), states + 1)
    states += 1  # it was copied
    if kind == "disk":
        store.flush()
        store.add(key_of(3), states + 1)
    assert holds(store, 3)
    assert len(store) == 1
    assert key_of(3) in store
    assert key_of(4) not in store
    assert not store.read(key_of(4), torch.empty(5, WIDTH))
    assert not store.read(key_of(3), torch.empty(3, WIDTH))
    assert not store.read(key_of(3), torch.empty(5, WIDTH))
    assert not store.read(key_of(3), torch.empty(4, WIDTH - 1))


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_an_example_that_cannot_be_held_is_counted_and_absent(tmp_path, kind):
    store = MemoryStore(WIDTH, CODECS["fp16"]) if kind == "memory" else disk_store(tmp_path, "fp16")
    store.add(key_of(0), torch.full((2, WIDTH), 1e6))
    store.flush()
    assert key_of(0) not in store
    assert (store.refused, len(store), store.nbytes, shards_in(tmp_path)) == (1, 0, 0, [])


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_rows_of_a_batch_are_filled_in_place_and_nothing_beside_them(tmp_path, kind):
    store = MemoryStore(WIDTH, CODECS["fp32"]) if kind == "memory" else disk_store(tmp_path)
    for number in (3, 5):
        store.add(key_of(number), states_of(number))
    store.flush()
    batch = torch.full((2, 8, WIDTH + 1), 7.0)
    assert store.read(key_of(3), batch[0, :4, :WIDTH])  # not contiguous
    whole = torch.full((2, 8, WIDTH), 7.0, requires_grad=True)
    assert store.read(key_of(5), whole.detach()[1, :6])
    assert torch.equal(batch[0, :4, :WIDTH], states_of(3))
    assert torch.equal(whole[1, :6], states_of(5))
    assert (batch[0, 4:] == 7).all()
    assert (batch[..., WIDTH] == 7).all()
    assert (batch[1] == 7).all()
    assert (whole[0] == 7).all()
    assert (whole[1, 6:] == 7).all()


def test_a_memory_store_neither_grows_nor_fails_at_the_end():
    store = MemoryStore(WIDTH, CODECS["fp32"])
    store.add(key_of(1), states_of(1))
    assert store.refresh() == 0
    store.close()
    assert len(store) == store.nbytes == 0


def test_a_memory_store_takes_no_more_than_its_limit_and_says_so():
    store = MemoryStore(WIDTH, CODECS["fp32"], limit=12 * WIDTH * 4)
    for number in (8, 1):  # 9 and 2 tokens
        store.add(key_of(number), states_of(number))
    assert store.failure is None
    store.add(key_of(2), states_of(2))  # 3 tokens
    assert "more than" in store.failure
    assert "memory" in store.failure
    store.add(key_of(0), states_of(0))  # it would fit, but nothing is stored any more
    assert [holds(store, number) for number in (8, 1, 2, 0)] == [True, True, False, False]
    assert store.nbytes == 11 * WIDTH * 4


def test_a_memory_store_may_be_filled_to_its_limit():
    store = MemoryStore(WIDTH, CODECS["fp32"], limit=4 * WIDTH * 4)
    store.add(key_of(3), states_of(3))
    store.add(key_of(3), states_of(3))
    assert holds(store, 3)
    assert store.failure is None


# -- shards


@pytest.mark.parametrize("codec", CODECS)
def test_a_shard_is_a_safetensors_file_that_says_what_it_holds(tmp_path, codec):
    filled(tmp_path, [3, 1, 9], codec)
    (path,) = tmp_path.iterdir()
    assert path.name == "w-000000.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata().items() >= {"codec": codec, "width": str(WIDTH), "version": "1"}.items()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    parts = [CODECS[codec].encode(states_of(number)) for number in (3, 1, 9)]
    assert torch.equal(tensors["keys"], torch.tensor([list(key_of(n)) for n in (3, 1, 9)], dtype=torch.uint8))
    assert tensors["lengths"].tolist() == [4, 2, 1]
    assert torch.equal(tensors["states"], torch.cat([payload for payload, _ in parts]))
    assert ("scales" in tensors) == (codec == "int8")
    if codec == "int8":
        assert torch.equal(tensors["scales"], torch.cat([scales for _, scales in parts]))


def test_a_full_buffer_becomes_a_shard(tmp_path):
    store = disk_store(tmp_path, shard_bytes=10 * WIDTH * 4)
    for number in (8, 0):  # 9 tokens, 1 token
        assert shards_in(tmp_path) == []
        store.add(key_of(number), states_of(number))
    assert shards_in(tmp_path) == ["w-000000.safetensors"]
    store.add(key_of(1), states_of(1))
    store.close()
    store.close()
    assert shards_in(tmp_path) == ["w-000000.safetensors", "w-000001.safetensors"]
    assert all(holds(store, number) for number in (8, 0, 1))


def test_shards_of_another_codec_width_or_format_are_passed_over_and_left(tmp_path):
    filled(tmp_path, [1], writer="a")
    filled(tmp_path, [2], "bf16", writer="b")
    wide = disk_store(tmp_path, writer="c", width=8)
    wide.add(key_of(3), states_of(3, width=8))
    wide.close()
    text = (tmp_path / "a-000000.safetensors").read_bytes()
    (tmp_path / "d.safetensors").write_bytes(text.replace(b'"version": "1"', b'"version": "9"'))
    (tmp_path / "e.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    names = shards_in(tmp_path)
    store = disk_store(tmp_path)
    assert [key_of(number) in store for number in (1, 2, 3)] == [True, False, False]
    assert holds(store, 1)
    assert shards_in(tmp_path) == names
    assert store.damaged == []
    with pytest.raises(ForeignShard):
        open_shard(tmp_path / "d.safetensors")


def test_no_shard_is_ever_overwritten(tmp_path):
    filled(tmp_path, [1])
    path = tmp_path / "w-000000.safetensors"
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        write_shard(path, CODECS["fp32"], WIDTH, [])
    (tmp_path / "w-000007.safetensors").write_bytes(before)
    filled(tmp_path, [2])
    assert shards_in(tmp_path) == [f"w-00000{n}.safetensors" for n in (0, 7, 8)]
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_disk_without_hard_links_is_written_all_the_same(tmp_path, monkeypatch):
    def refuses(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuses)
    filled(tmp_path, [1])
    filled(tmp_path, [2])
    assert all(holds(disk_store(tmp_path), number) for number in (1, 2))
    assert not list(tmp_path.glob(".*"))


# -- damage: examples may be lost, never changed

MANY, FEW = range(20), range(100, 105)


@pytest.fixture(scope="module", params=["fp32", "int8"])
def sound(request, tmp_path_factory):
    """A folder with two shards: w-000000, which is damaged in the tests, and another's."""
    folder = tmp_path_factory.mktemp("sound")
    filled(folder, MANY, request.param)
    filled(folder, FEW, request.param, writer="other")
    return folder, request.param


def found_after(sound, folder: Path, damaged: bytes) -> set[int]:
    """Which examples of the damaged shard are still read, each held against what was stored."""
    source, codec = sound
    shutil.copytree(source, folder)
    (folder / "w-000000.safetensors").write_bytes(damaged)
    store = disk_store(folder, codec)
    found = {number for number in MANY if holds_as_stored(store, number)}
    assert all(holds_as_stored(store, number) for number in FEW)
    assert not any(key_of(number) in store for number in MANY if number not in found)
    shutil.rmtree(folder)
    return found


def holds_as_stored(store, number: int) -> bool:
    states = states_of(number)
    expected, out = torch.empty_like(states), torch.empty_like(states)
    store.codec.decode(*store.codec.encode(states), expected)
    found = store.read(key_of(number), out)
    assert not found or same_bits(out, expected), f"example {number} came back with other states"
    return found


def test_a_flipped_bit_anywhere_gives_absent_examples(sound, tmp_path):
    whole = (sound[0] / "w-000000.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    index = header + 20 * (8 + 16 + 4)
    dice = random.Random(0)
    places = [*range(0, index, 3), *dice.sample(range(index, len(whole)), 60)]
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << dice.randrange(8)
        found = found_after(sound, tmp_path / "copy", bytes(flipped))
        # a space of the header's padding may turn into other white space; all else costs the shard, from its finding on
        assert place < header or len(found) < len(MANY), place


def test_a_truncated_or_lengthened_shard_gives_absent_examples(sound, tmp_path):
    whole = (sound[0] / "w-000000.safetensors").read_bytes()
    for size in [0, 1, 7, 8, 9, 100, 600, 1000, len(whole) // 2, len(whole) - 1]:
        assert found_after(sound, tmp_path / "copy", whole[:size]) == set(), size
    assert found_after(sound, tmp_path / "copy", whole + b"\0") == set()


@pytest.mark.parametrize(
    "header",
    [b"[]", b"[" * 50_000, b"\xff\xfe", b'{"__metadata__": 3}', b'{"__metadata__": {"format": "dsfreeze-prefix", "version": "1", "codec": ["fp32"]}}'],
)  # fmt: skip
def test_strange_headers_are_no_crash(tmp_path, header):
    path = tmp_path / "x-0.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises((DamagedShard, ForeignShard)):
        open_shard(path)
    assert len(disk_store(tmp_path)) == 0


@pytest.mark.parametrize("number", ["1e30", "true", "-1", "9" * 4000, '"4"', "null"])
def test_strange_shapes_are_damage(tmp_path, number):
    filled(tmp_path, [3])
    path = tmp_path / "w-000000.safetensors"
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + size].replace(b'"shape": [4, 16]', b'"shape": [%s, 16]' % number.encode())
    path.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
    with pytest.raises(DamagedShard):
        open_shard(path)


@pytest.mark.parametrize("may_write", [True, False])
def test_damage_is_told_once_removed_where_we_may_and_mended_by_adding_again(tmp_path, may_write):
    filled(tmp_path, [1, 2])
    filled(tmp_path, [2, 3], writer="other")  # 2 is there already
    path = tmp_path / "w-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    store = disk_store(tmp_path, may_write=may_write)
    assert len(store) == 3
    assert [holds(store, number) for number in (1, 2, 3)] == [True, False, True]
    assert [holds(store, number) for number in (1, 2, 3)] == [False, False, True]
    assert store.refresh() == 0
    assert len(store) == 1
    assert len(store.damaged) == 1
    assert str(path) in store.damaged[0]
    assert "checksum" in store.damaged[0]
    assert path.exists() != may_write
    if may_write:
        for number in (1, 2):
            store.add(key_of(number), states_of(number))
        store.flush()
        assert all(holds(disk_store(tmp_path), number) for number in (1, 2, 3))


def test_what_a_damaged_shard_held_is_read_from_another_that_has_it(tmp_path):
    filled(tmp_path, [1, 2], writer="a")
    (tmp_path / "b").mkdir()
    filled(tmp_path / "b", [2, 3])
    shutil.move(tmp_path / "b" / "w-000000.safetensors", tmp_path / "w-000000.safetensors")
    path = tmp_path / "a-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    store = disk_store(tmp_path)
    assert not holds(store, 2)
    assert holds(store, 2)
    assert store.nbytes == (3 + 4) * WIDTH * 4


@pytest.mark.parametrize("seed", range(8))
def test_shards_are_forgotten_in_any_order_and_no_example_that_is_left(tmp_path, seed):
    """Oracle: the sets of numbers that the shards hold."""
    dice = random.Random(seed)
    held = {f"w{n}-000000.safetensors": dice.sample(range(20), 8) for n in range(6)}
    for n, numbers in enumerate(held.values()):
        filled(tmp_path / str(n), numbers, writer=f"w{n}")
        shutil.move(tmp_path / str(n) / f"w{n}-000000.safetensors", tmp_path)
    store = disk_store(tmp_path)
    for name in dice.sample(sorted(held), 6):
        (shard,) = [shard for shard in store._shards if shard.path.name == name]
        store._forget(shard, DamagedShard("as the test wants it"))
        del held[name]
        left = set().union(*held.values())
        assert {number for number in range(20) if key_of(number) in store} == left
        assert all(holds(store, number) for number in left)
        assert store.nbytes == sum(1 + number % 9 for number in left) * WIDTH * 4
    assert store._index == store._copies == {}


def test_forgetting_many_shards_takes_no_longer_for_each_the_more_there_are(tmp_path):
    for number in range(150):
        write_shard(tmp_path / f"w-{number:06d}.safetensors", CODECS["fp32"], 1, [
            shards.Example(key_of(100 * number + k), torch.zeros(1, 1), None) for k in range(100)
        ])  # fmt: skip
    store = disk_store(tmp_path, width=1, may_write=False)
    looked_at = 0
    take, drop = store._take, store._drop

    def counting(inner):
        def count(shard):
            nonlocal looked_at
            looked_at += len(shard.keys)
            inner(shard)

        return count

    store._take, store._drop = counting(take), counting(drop)
    for shard in list(store._shards):
        store._forget(shard, DamagedShard("as the test wants it"))
    assert len(store) == store.nbytes == 0
    assert looked_at == 150 * 100


@pytest.mark.parametrize("how", ["gone", "shorter", "another"])
def test_a_file_that_changes_under_an_open_store_is_noticed_after_it_was_verified(tmp_path, how):
    store = filled(tmp_path, [1, 10, 19])  # 2 tokens each
    assert holds(store, 1)
    path = tmp_path / "w-000000.safetensors"
    if how == "gone":
        path.unlink()
    elif how == "shorter":
        os.truncate(path, 500)
    else:  # of the same size, under the same name, perhaps with the same inode
        path.unlink()
        filled(tmp_path, [10, 19, 28])
    assert not holds(store, 1)
    assert len(store) == 0
    assert len(store.damaged) == 1
    assert path.exists() == (how != "gone")
    assert store.refresh() == (3 if how == "another" else 0)
    assert holds(store, 28) == (how == "another")


def test_a_file_that_was_only_touched_is_verified_again_and_read(tmp_path):
    store = filled(tmp_path, [1])
    assert holds(store, 1)
    os.utime(tmp_path / "w-000000.safetensors", (1, 1))
    assert holds(store, 1)
    assert store.damaged == []


# -- several processes

CHILD = """
import sys
from pathlib import Path
from tests.test_prefix_store import *
"""


def start(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + code, *map(str, arguments)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_shards_and_the_next_one_goes_on(tmp_path):
    child = start(
        """
store = disk_store(Path(sys.argv[1]), shard_bytes=5000)
for number in range(10**6):
    store.add(key_of(number), states_of(number))
    if number == 100: print("go", flush=True)
""",
        tmp_path,
    )
    assert child.stdout.readline() == "go\n"
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (tmp_path / f".w-999999.{shards._host()}.{child.pid}.0123abcd.tmp").write_bytes(b"half a shard")
    names = shards_in(tmp_path)
    store = disk_store(tmp_path)
    done = len(store)
    assert store.damaged == []
    assert not list(tmp_path.glob(".*.tmp"))
    assert done >= 80
    assert all(holds(store, number) for number in range(done))
    for number in range(done + 50):
        store.add(key_of(number), states_of(number))
    store.close()
    assert set(names) < set(shards_in(tmp_path))
    assert all(holds(disk_store(tmp_path), number) for number in range(done + 50))


def test_temporary_files_of_the_living_stay_and_strangers_go_after_a_day(tmp_path):
    host = shards._host()
    names = [f".w-1.{host}.{os.getpid()}.01.tmp", ".w-1.elsewhere.1.01.tmp", ".w-2.elsewhere.1.01.tmp", ".note.tmp"]
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / names[2], (1, 1))
    disk_store(tmp_path, may_write=False)
    assert len(list(tmp_path.iterdir())) == 4
    disk_store(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[0], names[1], names[3]])


@pytest.mark.slow
@pytest.mark.parametrize("writers", [("a", "b"), ("w", "w")])
def test_two_processes_fill_one_folder(tmp_path, writers):
    code = """
first, writer = int(sys.argv[2]), sys.argv[3]
store = disk_store(Path(sys.argv[1]), writer=writer, shard_bytes=2000)
print("ready", flush=True)
while not (Path(sys.argv[1]) / "go").exists(): time.sleep(0.001)
for number in range(first, first + 300):
    store.add(key_of(number), states_of(number))
store.close()
assert store.failure is None, store.failure
"""
    children = [start(code, tmp_path, first, writer) for first, writer in zip((0, 200), writers, strict=True)]
    assert all(child.stdout.readline() == "ready\n" for child in children)
    watcher = disk_store(tmp_path, may_write=False)
    (tmp_path / "go").touch()
    while any(child.poll() is None for child in children):
        watcher.refresh()
        assert watcher.damaged == []
    assert [child.returncode for child in children] == [0, 0]
    watcher.refresh()
    assert len(watcher) == 500
    assert all(holds(watcher, number) for number in range(500))
    assert not list(tmp_path.glob(".*.tmp"))


def test_refresh_takes_in_what_others_wrote(tmp_path):
    mine, theirs = disk_store(tmp_path, writer="a"), disk_store(tmp_path, writer="b")
    mine.add(key_of(2), states_of(2))
    for number in (1, 2, 3):
        theirs.add(key_of(number), states_of(number))
    assert mine.refresh() == 0  # they have not flushed
    theirs.flush()
    assert key_of(1) not in mine
    assert mine.refresh() == 2
    assert mine.refresh() == 0
    assert len(mine) == 3
    assert all(holds(mine, number) for number in (1, 2, 3))
    mine.close()
    assert shards_in(tmp_path) == ["b-000000.safetensors"]  # what was waiting is there already


# -- threads


def test_a_thread_reads_while_another_adds(tmp_path):
    store = disk_store(tmp_path, shard_bytes=3000)
    wrong, done = [], threading.Event()

    def read() -> None:
        dice, seen = random.Random(0), 0
        while not done.is_set() or seen < 200:
            number = dice.randrange(600)
            try:
                there = key_of(number) in store
                if holds(store, number):
                    seen += 1
                elif there:
                    wrong.append(f"{number} was there and could not be read")
            except BaseException as error:  # noqa: BLE001 -- told in the main thread
                wrong.append(repr(error))
                return

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(600):
        store.add(key_of(number), states_of(number))
    store.flush()
    done.set()
    thread.join(60)
    assert wrong == []
    assert len(shards_in(tmp_path)) > 20


def test_reading_does_not_wait_for_a_shard_that_is_written(tmp_path, monkeypatch):
    store = filled(tmp_path, [1])
    store.add(key_of(2), states_of(2))
    inside, go_on = threading.Event(), threading.Event()

    def waits(*arguments):
        inside.set()
        assert go_on.wait(30)
        return write_shard(*arguments)

    monkeypatch.setattr("dsfreeze.prefix.store.write_shard", waits)
    thread = threading.Thread(target=store.flush)
    thread.start()
    assert inside.wait(30)
    assert holds(store, 1)
    assert holds(store, 2)
    assert len(store) == 2
    go_on.set()
    thread.join(30)
    assert holds(store, 2)
    assert len(store) == 2


# -- a disk that refuses


def test_a_full_disk_stops_the_writing_and_nothing_else(tmp_path, monkeypatch):
    store = filled(tmp_path, [1, 2])
    pieces = shards._pieces

    def runs_full(*arguments):
        yield next(iter(pieces(*arguments)))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards, "_pieces", runs_full)
    store.add(key_of(3), states_of(3))
    store.flush()
    assert "No space left on device" in store.failure
    assert str(tmp_path) in store.failure
    assert [path.name for path in tmp_path.iterdir()] == ["w-000000.safetensors"]
    monkeypatch.undo()
    store.add(key_of(4), states_of(4))
    store.close()
    assert [holds(store, number) for number in (1, 2, 3, 4)] == [True, True, False, False]
    assert len(store) == 2
    assert store.nbytes == (2 + 3) * WIDTH * 4
    assert store._buffered_tokens == 0


def mounted(folder: Path, size: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return (
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], capture_output=True).returncode
        == 0
    )


def test_a_disk_that_is_really_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if not mounted(folder, "256k"):
        pytest.skip("mounting a small disk needs root")
    try:
        store = disk_store(folder, shard_bytes=64_000)
        for number in range(2000):
            store.add(key_of(number), states_of(number))
        store.close()
        assert "No space left on device" in store.failure
        assert not list(folder.glob(".*"))
        assert 300 < len(store) < 1000
        assert all(holds(store, number) for number in range(len(store)))
        again = disk_store(folder)
        assert len(again) == len(store)
        assert again.damaged == []
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_made_is_told_not_raised(tmp_path):
    (tmp_path / "file").touch()
    store = disk_store(tmp_path / "file" / "cache")
    assert store.failure
    store.add(key_of(1), states_of(1))
    store.close()
    assert len(store) == 0
    assert not holds(store, 1)


def test_who_may_not_write_touches_nothing(tmp_path):
    store = disk_store(tmp_path / "none", may_write=False)
    store.add(key_of(1), states_of(1))
    store.close()
    assert len(store) == 0
    assert store.failure is None
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO])
def test_a_read_that_the_system_refuses_costs_no_file(tmp_path, monkeypatch, error):
    store = filled(tmp_path, [1])

    def refuses(*_):
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuses)
        assert not holds(store, 1)
    assert shards_in(tmp_path) == ["w-000000.safetensors"]
    assert os.strerror(error) in store.damaged[0]
    assert store.refresh() == 1
    assert holds(store, 1)


# -- resident memory


@pytest.mark.slow
def test_reading_a_large_store_does_not_grow_the_process(tmp_path):
    width, tokens, examples = 1024, 256, 200  # 1 MiB each
    store = disk_store(tmp_path, width=width, shard_bytes=32 * 2**20)
    for number in range(examples):
        store.add(key_of(number), torch.full((tokens, width), float(number)))
    store.close()
    out = torch.empty(tokens, width)
    assert store.read(key_of(0), out)
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    largest = before
    for number in range(examples):
        assert store.read(key_of(number), out)
        assert out[0, 0] == out[-1, -1] == number
        largest = max(largest, process.memory_info().rss)
    assert store.nbytes == examples * 2**20
    assert largest - before < 16 * 2**20
    assert len(os.listdir("/proc/self/fd")) < 100


# -- the folder

MANIFEST = {"fingerprint": "0123456789abcdef" + "0" * 48, "model": "tiny", "max_length": 256, "dtype": "fp32", "cut": 3}


def test_the_folder_has_the_fingerprints_name_and_says_what_it_holds(tmp_path):
    cache = CacheFolder(tmp_path, MANIFEST)
    assert cache.path == tmp_path / "0123456789abcdef"
    assert not cache.path.exists()
    assert cache.lock()
    assert cache.lock()
    assert json.loads((cache.path / "manifest.json").read_text()) == MANIFEST
    assert cache.note is None
    cache.release()
    cache.release()


def test_the_second_process_may_not_write_while_the_first_lives(tmp_path):
    child = start(
        "cache = CacheFolder(Path(sys.argv[1]), MANIFEST)\nprint(cache.lock(), flush=True)\ntime.sleep(60)", tmp_path
    )
    assert child.stdout.readline() == "True\n"
    mine = CacheFolder(tmp_path, MANIFEST)
    assert not mine.lock()
    assert "only reads it" in mine.note
    child.kill()
    child.wait()
    (mine.path / "manifest.json").unlink()
    assert mine.lock()
    assert mine.note is None
    assert (mine.path / "manifest.json").exists()
    (mine.path / "manifest.json").unlink()
    assert not CacheFolder(tmp_path, MANIFEST).lock()
    assert not (mine.path / "manifest.json").exists(), "who may not write touches nothing"
    mine.release()
    assert CacheFolder(tmp_path, MANIFEST).lock()


@pytest.mark.parametrize(
    ("error", "may", "says"),
    [
        (OSError(errno.ENOLCK, "No locks available"), True, "no locks"),
        (NotImplementedError(), True, "no locks"),
        (PermissionError(errno.EACCES, "Permission denied"), False, "Permission denied"),
        (OSError(errno.EROFS, "Read-only file system"), False, "Read-only"),
    ],
)
def test_where_locks_do_not_work_all_may_write_and_where_writing_does_not_none(tmp_path, monkeypatch, error, may, says):
    class Refuses:
        def __init__(self, *_, **__): ...

        def acquire(self):
            raise error

    monkeypatch.setattr(folder_module, "FileLock", Refuses)
    cache = CacheFolder(tmp_path, MANIFEST)
    assert cache.lock() == may
    assert says in cache.note
    assert (cache.path / "manifest.json").exists() == may
    cache.release()


def test_a_disk_that_has_no_room_for_the_manifest_is_only_read_and_left_to_others(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = CacheFolder(tmp_path, MANIFEST)
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "write_whole", refuses)
        assert not cache.lock()
    assert "No space left" in cache.note
    assert CacheFolder(tmp_path, MANIFEST).lock()


def test_a_token_is_read_by_all_who_see_the_folder(tmp_path):
    cache, other = CacheFolder(tmp_path, MANIFEST), CacheFolder(tmp_path, MANIFEST)
    assert cache.signed() is None
    assert cache.lock()
    assert cache.sign("one")
    assert other.signed() == "one"
    assert cache.sign("two")
    assert other.signed() == "two"
    (cache.path / ".writer").unlink()
    (cache.path / ".writer").mkdir()
    assert not cache.sign("three")
    assert "only read" in cache.note
    assert cache.signed() is None
    assert other.lock()


def test_a_root_that_cannot_be_made_is_only_read(tmp_path):
    (tmp_path / "file").touch()
    cache = CacheFolder(tmp_path / "file", MANIFEST)
    assert not cache.lock()
    assert "only read" in cache.note
    assert others(tmp_path / "file", MANIFEST) == []


@pytest.mark.parametrize("garbled", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_garbled_manifest_of_ours_is_written_anew_and_a_siblings_passed_over(tmp_path, garbled):
    for name in ("0123456789abcdef", "sibling"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_bytes(garbled)
    cache = CacheFolder(tmp_path, MANIFEST)
    assert cache.lock()
    assert json.loads((cache.path / "manifest.json").read_text()) == MANIFEST
    assert others(tmp_path, MANIFEST) == []
    cache.release()


def test_a_folder_of_another_fingerprint_under_our_name_is_not_ours(tmp_path):
    theirs = {**MANIFEST, "fingerprint": "0123456789abcdef" + "1" * 48}
    first = CacheFolder(tmp_path, theirs)
    assert first.lock()
    ours = CacheFolder(tmp_path, MANIFEST)
    assert ours.lock()
    assert ours.path.name == MANIFEST["fingerprint"]
    assert CacheFolder(tmp_path, theirs).path == first.path
    first.release()
    ours.release()


def test_others_names_what_differs_nearest_first(tmp_path):
    def sibling(name: str, **changes) -> None:
        (tmp_path / name).mkdir()
        manifest = {**MANIFEST, "fingerprint": name, **changes}
        (tmp_path / name / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))

    sibling("b", max_length=128, dtype="bf16", cut=None)
    sibling("a", max_length=128)
    sibling("c", model="another")
    sibling("d", dtype="bf16", max_length=64, cut=2, device="cuda")
    sibling("e", cut=2, max_length=64)
    sibling("ours", fingerprint=MANIFEST["fingerprint"])
    (tmp_path / "stray").touch()
    assert others(tmp_path, MANIFEST) == [
        f"{tmp_path}/a was made with max_length 128; this run has 256.",
        f"{tmp_path}/e was made with max_length 64 and with cut 2; this run has 256 and 3.",
        f"{tmp_path}/b was made with max_length 128, with dtype bf16 and without cut; this run has 256, fp32 and 3.",
    ]
    assert others(tmp_path / "none", MANIFEST) == []


def test_free_bytes_asks_the_nearest_folder_that_is_there(tmp_path):
    assert 0 < free_bytes(tmp_path / "not" / "yet") <= shutil.disk_usage(tmp_path).total


def test_others_does_not_name_a_runs_own_other_cuts_and_shortens_digests(tmp_path):
    ours = {**MANIFEST, "weights": "a1" * 32, "config": "b2" * 32}

    def sibling(name: str, **changes) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(json.dumps({**ours, "fingerprint": name, **changes}))

    sibling("a", cut=2, weights="c3" * 32)
    sibling("b", cut=1, weights="d4" * 32)
    assert others(tmp_path, ours) == []
    sibling("c", weights="e5" * 32, config="f6" * 32)
    sibling("d", cut=1, weights="d4" * 32, dtype="bf16")
    assert others(tmp_path, ours) == [
        f"{tmp_path}/c was made with weights e5e5e5e5e5e5 and with config f6f6f6f6f6f6; this run has a1a1a1a1a1a1 and b2b2b2b2b2b2.",
        f"{tmp_path}/d was made with dtype bf16, with cut 1 and with weights d4d4d4d4d4d4; this run has fp32, 3 and a1a1a1a1a1a1.",
    ]
