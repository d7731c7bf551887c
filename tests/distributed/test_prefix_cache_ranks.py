"""The prefix cache on two ranks. Oracle: the local engine without a cache, with the same global batch; what each rank says of hits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forks import outcomes_of, run_ranks
from test_train import STAGES, losses, train, values
from tiny_runs import tiny_recipe

EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "learning_rate": 1e-3, "eval_strategy": "epoch"}


def cached(folder: Path, tier: str, **freeze):
    freeze = {"prefix_cache": tier, "prefix_cache_dir": str(folder / "cache"), **freeze}
    return tiny_recipe(folder, freeze=freeze, train=EPOCHS)


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "stages"), [("memory", STAGES), ("disk", ["zero1", "zero3"])])
def test_every_stage_has_the_losses_of_a_run_without_a_cache(tmp_path, tier, stages):
    """45 examples in batches of 4, so that the ranks meet other examples in each epoch, and a filler at its end."""
    plain = train(values(cached(tmp_path, "off"), "local", tmp_path / "local", ranks=1))
    expected = losses(tmp_path / "local")
    for zero in stages:
        recipe = cached(tmp_path / zero, tier) if tier == "disk" else cached(tmp_path, tier)
        summaries = run_ranks(train, values(recipe, zero, tmp_path / zero / "run", ranks=2), timeout=120)
        assert losses(tmp_path / zero / "run") == pytest.approx(expected, rel=1e-5), zero
        assert summaries[0]["metrics"]["after"] == pytest.approx(plain["metrics"]["after"], abs=1e-5)
        told = summaries[0]["prefix_cache"]
        assert (told["tier"], told["cut"], told["hits"], told["examples"]) == (tier, 2, 90, 135), zero
        assert told["evaluation_hits"] == told["evaluation_examples"] * 3 // 4
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("dsfreeze-")], "shared memory is given back"


@pytest.mark.slow
def test_a_second_run_reads_what_the_first_one_stored(tmp_path):
    """Other seed, other learning rate, another stage and world size: every example is there from the first step on."""
    first = values(cached(tmp_path, "disk"), "zero2", tmp_path / "first", ranks=2)
    run_ranks(train, first, timeout=120)
    recipe = cached(tmp_path, "disk")
    again = values(recipe, "zero3", tmp_path / "second", ranks=2, seed=7, learning_rate=3e-3)
    told = run_ranks(train, again, timeout=120)[0]["prefix_cache"]
    assert told["hits"] == told["examples"] == 135
    plain = train(values(cached(tmp_path, "off"), "local", tmp_path / "plain", ranks=1, seed=7, learning_rate=3e-3))
    assert losses(tmp_path / "second") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert plain["prefix_cache"] is None


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "stages"), [("memory", STAGES), ("disk", ["zero3"])])
def test_every_stage_trains_without_the_prefix(tmp_path, tier, stages):
    """Two ranks fill one cache, and none holds the prefix."""
    train(values(cached(tmp_path, "off"), "local", tmp_path / "local", ranks=1))
    for zero in stages:
        recipe = cached(tmp_path, tier, evict_prefix=True, prefix_cache_dir=str(tmp_path / zero))
        found = run_ranks(train, values(recipe, zero, tmp_path / zero / "run", ranks=2), timeout=120)[0]
        assert losses(tmp_path / zero / "run") == pytest.approx(losses(tmp_path / "local"), rel=1e-5), zero
        assert found["prefix_cache"]["hits"] == 135
        # of 182,016 bytes; at stage 3 small tensors are held whole beside the rank's share
        assert found["memory"]["weights"] == 74_752 * (1.5 if zero == "zero3" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", STAGES)
def test_a_moving_cut_on_two_ranks(tmp_path, zero):
    """layers.1 trains in the first epoch alone. Ranks meet each other's examples at both cuts."""
    ranges = {"embed": [0, -1], "layers.0": [0, -1], "layers.1": [12, -1]}
    freeze = {"strategy": "step_ranges", "fraction": None, "step_ranges": ranges}
    train(values(cached(tmp_path, "off", **freeze), "local", tmp_path / "local", ranks=1))
    told = run_ranks(train, values(cached(tmp_path, "disk", **freeze), zero, tmp_path / "run", ranks=2), timeout=120)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    counts = [told[0]["prefix_cache"][name] for name in ("hits", "extended", "examples")]
    assert counts == [45, 45, 135]


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_ranks_that_share_no_folder_compute_what_they_lack(tmp_path, zero):
    """As on machines whose disks are their own. At stage 3 a batch is read only where every rank can."""
    train(values(cached(tmp_path, "off"), "local", tmp_path / "local", ranks=1))
    raw = values(cached(tmp_path, "disk"), zero, tmp_path / "run", ranks=2)
    found = run_ranks(apart, raw, str(tmp_path), timeout=120)[0]["prefix_cache"]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)
    assert found["hits"] < 90
    assert found["hits"] > 0 or zero == "zero3"


def apart(raw: dict, folder: str) -> dict:
    """A run whose ranks keep their states in folders of their own, under names of their own machine."""
    from dsfreeze.prefix import levels

    rank = os.environ["RANK"]
    levels._machine = lambda: rank
    levels.disk_root = lambda _: Path(folder) / f"disk-{rank}"
    os.environ["LOCAL_RANK"] = "0"
    return train(raw)


MANIFEST = {"fingerprint": "0123456789abcdef" + "0" * 48, "model": "tiny", "stored": "fp32", "cut": 1}


def opened(roots: list[str], machines: list[int], tier: str = "disk", shared_memory: str = "/dev/shm") -> dict:
    """What each rank may do in a level of its root; equal numbers in `machines` are ranks of one machine."""
    import torch
    import torch.distributed as dist

    from dsfreeze.engine.ranks import Ranks
    from dsfreeze.prefix import levels

    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    levels._machine = lambda: f"machine-{machines[rank]}"
    levels.SHARED_MEMORY = Path(shared_memory)
    ranks = Ranks(rank, world_size, machines[:rank].count(machines[rank]), torch.device("cpu"))
    level = levels.open_level(tier, 1, ("digest",), MANIFEST, 4, ranks, Path(roots[rank]))
    key = bytes([rank] * 16)
    level.store.add(key, torch.full((2, 4), float(rank)))
    level.store.flush()
    dist.barrier()
    level.store.refresh()
    found = {
        "may_write": level.store.may_write, "share": level.share, "notes": level.notes, "examples": len(level.store),
        "where": str(level.store.folder),
    }  # fmt: skip
    dist.barrier()
    level.close()
    dist.destroy_process_group()
    return found


def test_machines_that_share_a_folder_all_write_it(tmp_path):
    found = run_ranks(opened, [str(tmp_path)] * 2, [0, 1])
    assert [one["may_write"] for one in found] == [True, True]
    assert [one["share"] for one in found] == [(0, 2), (1, 2)]
    assert [one["examples"] for one in found] == [2, 2]
    assert [one["notes"] for one in found] == [[], []]


def test_machines_with_folders_of_their_own_all_write_theirs(tmp_path):
    found = run_ranks(opened, [str(tmp_path / "a"), str(tmp_path / "b")], [0, 1])
    assert [one["may_write"] for one in found] == [True, True]
    assert [one["share"] for one in found] == [(0, 1), (0, 1)]
    assert [one["examples"] for one in found] == [1, 1]


def test_a_folder_that_two_of_three_machines_share(tmp_path):
    roots = [str(tmp_path / name) for name in ("own", "shared", "shared", "shared")]
    found = run_ranks(opened, roots, [0, 1, 1, 2], world_size=4)
    assert all(one["may_write"] for one in found)
    assert [one["share"] for one in found] == [(0, 1), (0, 3), (1, 3), (2, 3)]
    assert [one["examples"] for one in found] == [1, 3, 3, 3]


def test_no_machine_writes_what_another_run_writes(tmp_path):
    from dsfreeze.prefix.folder import CacheFolder

    other = CacheFolder(tmp_path / "theirs", MANIFEST)
    assert other.lock()
    assert other.sign("another run's")
    found = run_ranks(opened, [str(tmp_path / "theirs"), str(tmp_path / "ours")], [0, 1])
    other.release()
    assert [one["may_write"] for one in found] == [False, True]
    assert [one["share"] for one in found] == [(0, 1), (0, 1)]
    assert ["only reads it" in " ".join(one["notes"]) for one in found] == [True, False]


def test_ranks_share_the_memory_of_their_machine(tmp_path):
    """Each machine's folder is named by a process of its own, that a later run there can find dead."""
    found = run_ranks(opened, [str(tmp_path)] * 3, [0, 1, 1], "memory", str(tmp_path), world_size=3)
    assert [one["share"] for one in found] == [(0, 1), (0, 2), (1, 2)]
    assert [one["examples"] for one in found] == [1, 2, 2]
    assert len({one["where"] for one in found}) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "zero"), [("auto", "zero3"), ("disk", "zero2")])
def test_ranks_that_find_otherwise_go_on_alike(tmp_path, tier, zero):
    """One rank's check refuses the model: with `auto` both train without a cache, else both say why."""
    raw = values(cached(tmp_path, tier), zero, tmp_path / "run", ranks=2)
    found = outcomes_of(refused_on_one_rank, raw, timeout=120)
    if tier == "disk":
        assert [(o.kind, o.error) for o in found] == [("error", "UserError")] * 2
        assert all("rank 1 rounds otherwise" in o.text for o in found)
        return
    assert [o.value["prefix_cache"]["tier"] for o in found] == ["off", "off"]
    train(values(cached(tmp_path, "off"), "local", tmp_path / "local", ranks=1))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "local"), rel=1e-5)


def refused_on_one_rank(raw: dict) -> dict:
    from dsfreeze.errors import UserError
    from dsfreeze.prefix import cache as caches

    check = caches.require_passable

    def checked(*args):
        check(*args)
        if os.environ["RANK"] == "1":
            raise UserError("rank 1 rounds otherwise")

    caches.require_passable = checked
    return train(raw)


@pytest.mark.slow
def test_a_fill_that_fails_leaves_no_shared_memory(tmp_path):
    raw = values(cached(tmp_path, "memory", evict_prefix=True), "zero2", tmp_path / "run", ranks=2)
    found = outcomes_of(failing_fill, raw, timeout=120)
    assert [o.kind for o in found] == ["error", "error"]
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("dsfreeze-")]


def failing_fill(raw: dict) -> dict:
    from dsfreeze.errors import UserError
    from dsfreeze.prefix import streaming

    def fail(*_, **__):
        raise UserError("the fill has failed")

    streaming.everybody_has = fail
    return train(raw)
