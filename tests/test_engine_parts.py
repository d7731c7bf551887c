"""The engines' small parts: layouts, checksums, bytes, ranks, locks."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from dsfreeze.engine.flats import Pieces, Range, Slot
from dsfreeze.engine.memory import Meter, nbytes, spanned_bytes
from dsfreeze.engine.movement import checksum
from dsfreeze.engine.process import process_group, warn_of_locks
from dsfreeze.engine.ranks import device_of, read_ranks
from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe

LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
FULL = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7.0), "c": torch.arange(10.0, 21.0)}


def ranges(world_size):
    """a, c, b flattened in that order, as round-robin reorders, 18 elements padded to a multiple of the ranks."""
    size = -(-18 // world_size)
    slots = (Slot("a", (2, 3), 0), Slot("c", (11,), 6), Slot("b", (), 17))
    return [Range(torch.zeros(size), slots, rank, world_size) for rank in range(world_size)]


def pieces(world_size):
    slots, at = [], 0
    for name, value in FULL.items():
        slots.append(Slot(name, tuple(value.shape), at))
        at += -(-value.numel() // world_size)
    return [Pieces(torch.zeros(at), tuple(slots), rank, world_size) for rank in range(world_size)]


@pytest.mark.parametrize("layout", [ranges, pieces])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 32])
def test_cut_and_join_are_inverse(layout, world_size):
    """Oracle: the tensors themselves, at world sizes that divide nothing and that exceed the elements."""
    flats = layout(world_size)
    shares = [flat.cut(FULL) for flat in flats]
    for name, value in flats[0].join(shares).items():
        assert torch.equal(value, FULL[name])
    for flat, share in zip(flats, shares, strict=True):
        flat.tensor.copy_(share)
    held = [(name, part) for flat in flats for name, part in flat.local()]
    for name, value in FULL.items():
        assert torch.equal(torch.cat([part for n, part in held if n == name]), value.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_one_bit_and_an_exchange(dtype):
    """Oracle: equality of the bits; positions beyond the first chunk included."""
    torch.manual_seed(0)
    value = torch.randn(600_000).to(dtype)
    first = checksum(value)
    assert checksum(value.clone()) == first
    for index in (0, 262_144, 599_999):
        other = value.clone()
        other[index] = torch.nextafter(other[index], torch.tensor(9.0, dtype=dtype))
        assert checksum(other) != first
    other = value.clone()
    other[5], other[262_149] = value[262_149], value[5]
    assert checksum(other) != first
    assert checksum(torch.zeros(0)) == 0


def test_bytes_count_each_byte_once():
    """Oracle: arithmetic."""
    flat = torch.zeros(100)
    assert spanned_bytes([flat[:60], None, flat[40:80], torch.zeros(0)]) == 320
    assert nbytes([flat, flat, None, torch.zeros(3, dtype=torch.bfloat16)]) == 406


def test_peak_is_that_since_the_last_reset():
    """Oracle: 200 MB mapped afresh that came and went (an allocator might hand out pages that are resident already)."""
    meter = Meter(torch.device("cpu"))
    meter.read(reset_peak=True)
    with mmap.mmap(-1, 200_000_000) as big:
        for page in range(0, len(big), mmap.PAGESIZE):
            big[page] = 1
        assert meter.read()[0] > 150e6
    now, peak = meter.read()
    assert peak - now > 150e6
    meter.read(reset_peak=True)
    assert meter.read()[1] - meter.read()[0] < 50e6


class TestRanks:
    @pytest.fixture(autouse=True)
    def _alone(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)

    def test_alone_without_a_launcher(self):
        ranks = read_ranks()
        assert (ranks.rank, ranks.world_size, ranks.local_rank) == (0, 1, 0)

    def test_absurd_numbers(self, monkeypatch):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="RANK=2 is not below WORLD_SIZE=2"):
            read_ranks()
        monkeypatch.setenv("RANK", "first")
        with pytest.raises(UserError, match="RANK is 'first', not a number"):
            read_ranks()

    def test_more_ranks_than_gpus(self, monkeypatch):
        monkeypatch.setenv("DS_ACCELERATOR", "cuda")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
        assert device_of(0) == torch.device("cuda", 0)
        with pytest.raises(UserError, match="shows 1 GPUs"):
            device_of(1)

    @pytest.mark.parametrize("before", [None, "7"])
    def test_a_group_of_one_leaves_the_environment_as_it_was(self, before, monkeypatch):
        """Accelerate takes LOCAL_RANK for a launcher's, and a Trainer made later in the notebook would use DDP."""
        if before is not None:
            monkeypatch.setenv("MASTER_PORT", before)
        environment = {name: os.environ.get(name) for name in LAUNCHERS}
        for fails in (False, True):
            with suppress(KeyError), process_group(Recipe.model_validate({"model": "tiny", "zero": "zero1"})):
                assert (os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
                if fails:
                    raise KeyError
            assert {name: os.environ.get(name) for name in LAUNCHERS} == environment
            assert not torch.distributed.is_initialized()

    def test_a_local_recipe_makes_no_group(self):
        with process_group(Recipe.model_validate({"model": "tiny", "zero": "local"})) as ranks:
            assert ranks.world_size == 1
            assert not torch.distributed.is_initialized()

    @pytest.mark.slow
    def test_a_rank_that_meets_nobody_says_where_it_waited(self):
        """At a port where nobody listens; in a process of its own, where no other test has met anybody."""
        second = {
            "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
        }  # fmt: skip
        code = (
            "from dsfreeze.engine.process import process_group\nfrom dsfreeze.recipe import Recipe\n"
            'recipe = Recipe.model_validate({"model": "tiny", "zero": "zero1", "train": {"ddp_timeout": 1}})\n'
            "with process_group(recipe): print('met')"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **second}, capture_output=True, text=True, timeout=100
        )
        assert (done.returncode, done.stdout.partition("met")[1]) == (1, "")
        assert re.search(r"UserError: .*did not meet at 127.0.0.1:1 .*within 1 s; this is rank 1 of 2 on", done.stderr)


def test_a_stale_lock_is_reported_by_path(tmp_path, monkeypatch):
    """Oracle: a file called lock, as a killed build leaves it."""
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    with pytest.warns(UserWarning, match=str(lock)):
        assert warn_of_locks() == [lock]
    lock.unlink()
    assert warn_of_locks() == []
