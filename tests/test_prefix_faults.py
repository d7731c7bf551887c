"""What goes wrong around a prefix cache. Oracle: the run without one, and what the run says; nothing wrong is ever read."""

import errno
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_prefix_cache import EPOCHS, losses, run
from tiny_runs import llama_folder, t5_folder, tiny_recipe

from dsfreeze.data import Loader
from dsfreeze.errors import UserError
from dsfreeze.loop import train
from dsfreeze.prefix import cache as caches
from dsfreeze.prefix import store as stores
from dsfreeze.prefix.ahead import ReadAhead
from dsfreeze.recipe_reader import load_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def told_by(folder, tier="disk", **changes):
    """(losses, cache's summary, everything it said)."""
    found, summary = run(folder, tier, **changes)
    return found, summary["prefix_cache"], " ".join(summary["prefix_cache"]["told"])


def shards(root):
    return sorted(root.rglob("*.safetensors"))


@pytest.fixture
def plain(tmp_path):
    return run(tmp_path, "off")[0]


def test_no_room_is_an_error_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("dsfreeze.prefix.choice.free_disk", lambda *_: 1000)
    with pytest.raises(UserError, match=r"needs .* KiB .* 1000 B .* free.*prefix_cache: off"):
        run(tmp_path, "disk")
    assert not (tmp_path / "disk" / "steps.jsonl").exists() or not losses(tmp_path / "disk")


@pytest.mark.slow
def test_a_disk_that_the_cache_itself_filled_has_room_for_it(tmp_path, monkeypatch, plain):
    told_by(tmp_path)
    monkeypatch.setattr("dsfreeze.prefix.choice.free_disk", lambda *_: 100)
    found, cache, _ = told_by(tmp_path)
    assert cache["hits"] == cache["examples"]
    assert found == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_no_room_at_a_later_cut_is_said_and_the_run_goes_on(tmp_path, monkeypatch):
    freeze = {
        "strategy": "step_ranges",
        "fraction": None,
        "step_ranges": {"embed": [0, -1], "layers.0": [0, -1], "layers.1": [12, -1]},
    }
    wanted = run(tmp_path, "off", freeze=freeze)[0]
    room = iter([10**9, 10, 10, 10])
    monkeypatch.setattr("dsfreeze.prefix.choice.free_memory", lambda *_: next(room))
    found, cache, said = told_by(tmp_path, "memory", freeze=freeze)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert "off from here on" in said
    assert (cache["cut"], cache["hits"], cache["extended"]) == (1, 0, 90), "what is stored at the lower cut is read"


@pytest.mark.slow
def test_no_step_is_lost_when_auto_gives_up_in_a_later_phase(tmp_path, monkeypatch):
    """The read-ahead thread has drawn steps by then. Oracle: the run without a cache, step by step."""
    freeze = {"strategy": "step_ranges", "fraction": None, "step_ranges": {"embed": [0, -1], "layers.0": [12, -1]}}

    def refuse(*_):
        raise UserError("this model does not")

    monkeypatch.setattr(caches, "require_passable", refuse)
    found, cache, said = told_by(tmp_path, "auto", freeze=freeze)
    assert cache["tier"] == "off"
    assert "this model does not" in said
    assert found == run(tmp_path, "off", freeze=freeze)[0]
    with pytest.raises(UserError, match="this model does not"):
        run(tmp_path, "memory", freeze=freeze)


def test_auto_reads_no_weights_where_nothing_is_to_be_stored(tmp_path, monkeypatch):
    from dsfreeze.engine.local import LocalEngine

    read, names = LocalEngine.read_weight, []
    monkeypatch.setattr(LocalEngine, "read_weight", lambda self, name: names.append(name) or read(self, name))
    assert told_by(tmp_path, "auto", train={"num_train_epochs": 1, "export": False})[1]["tier"] == "off"
    assert names == []


@pytest.mark.slow
def test_a_disk_that_fills_up_in_the_middle_is_said_and_the_run_goes_on(tmp_path, monkeypatch, plain):
    monkeypatch.setattr(
        stores, "write_shard", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    )
    monkeypatch.setattr(stores.DiskStore.__init__, "__kwdefaults__", {"may_write": None, "shard_bytes": 2000})
    found, cache, said = told_by(tmp_path)
    assert found == pytest.approx(plain, rel=1e-6)
    assert "No space left on device" in said
    assert cache["hits"] == 0


@pytest.mark.parametrize(
    "damage", ["flipped", *(pytest.param(damage, marks=pytest.mark.slow) for damage in ("cut", "garbage"))]
)
def test_a_damaged_file_is_never_used_and_made_again(tmp_path, own_cache, plain, damage):
    told_by(tmp_path)
    (path,) = shards(own_cache)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-300] ^= 4
    path.write_bytes(content[:-100] if damage == "cut" else content if damage == "flipped" else b"no safetensors")
    found, cache, said = told_by(tmp_path)
    assert found == pytest.approx(plain, rel=1e-6)
    assert path.name in said
    assert cache["hits"] < cache["examples"]
    again, cache, _ = told_by(tmp_path)
    assert cache["hits"] == cache["examples"], "what was missing is there again"
    assert again == pytest.approx(plain, rel=1e-6)


@pytest.mark.slow
def test_a_cache_of_something_else_is_passed_over_with_the_reason(tmp_path, own_cache):
    told_by(tmp_path)
    _, cache, said = told_by(tmp_path, data={"max_length": 32})
    assert cache["hits"] == 90
    assert "max_length 64" in said
    assert "this run has 32" in said
    model = llama_folder(tmp_path / "other", seed=1)
    _, cache, _ = told_by(tmp_path, model=str(model))
    assert cache["hits"] == 90
    # the same weights with another tokenizer
    shutil.copytree(tmp_path / "model", tmp_path / "retold")
    file = tmp_path / "retold" / "tokenizer.json"
    vocabulary = json.loads(file.read_text())
    a, b = (vocabulary["model"]["vocab"][letter] for letter in "ab")
    vocabulary["model"]["vocab"] |= {"a": b, "b": a}
    file.write_text(json.dumps(vocabulary))
    _, cache, said = told_by(tmp_path, model=str(tmp_path / "retold"))
    assert cache["hits"] == 90
    assert "tokenizer" in said
    assert len(list(own_cache.iterdir())) == 4


@pytest.mark.slow
def test_what_does_not_bear_on_the_states_shares_a_cache(tmp_path):
    """Seed, rate, batch, adapter, other labels: every example is there from the first step on."""
    told_by(tmp_path)
    for changes in (
        {"train": {"seed": 3, "learning_rate": 5e-4, "per_device_train_batch_size": 5}},
        {"freeze": {"strategy": "lora", "fraction": 0.5, "adapter": {"r": 2}}},
        {"model": {"name": str(tmp_path / "model"), "dropout": 0.1}},
    ):
        _, cache, _ = told_by(tmp_path, **changes)
        assert cache["hits"] == cache["examples"], changes


@pytest.mark.slow
def test_auto_reads_what_another_run_has_stored_even_for_one_epoch(tmp_path):
    one = {"train": {"num_train_epochs": 1}}
    _, cache, said = told_by(tmp_path, "auto", **one)
    assert cache["tier"] == "off"
    assert "second time" in said
    told_by(tmp_path, "disk")
    _, cache, said = told_by(tmp_path, "auto", **one)
    assert (cache["tier"], cache["hits"], cache["examples"]) == ("disk", 45, 45)


@pytest.mark.slow
def test_a_second_run_at_the_same_time_reads_and_does_not_write(tmp_path, own_cache, plain, monkeypatch):
    """The first holds the folder's lock while the second runs from start to end."""
    reached, go_on, said = threading.Event(), threading.Event(), {}
    enter = caches.PrefixCache.enter

    def held(self, *args):
        enter(self, *args)
        if threading.current_thread().name == "first":
            reached.set()
            go_on.wait(60)

    monkeypatch.setattr(caches.PrefixCache, "enter", held)
    recipe = tiny_recipe(
        tmp_path, freeze={"prefix_cache": "disk"}, train={**EPOCHS, "output_dir": str(tmp_path / "first")}
    )
    first = threading.Thread(name="first", target=lambda: said.update(train(recipe)))
    monkeypatch.setattr("dsfreeze.interrupt.Interrupt.__enter__", lambda self: self)  # signals are the main thread's
    monkeypatch.setattr("dsfreeze.interrupt.Interrupt.__exit__", lambda *_: None)
    first.start()
    assert reached.wait(60)
    found, cache, told = told_by(tmp_path)
    go_on.set()
    first.join(60)
    assert "nother process writes" in told
    assert cache["hits"] == 0
    assert found == pytest.approx(plain, rel=1e-6)
    assert losses(tmp_path / "first") == pytest.approx(plain, rel=1e-6)
    assert len(shards(own_cache)) == 1


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from dsfreeze.loop import train
from dsfreeze.prefix import store
from tiny_runs import tiny_recipe
from pathlib import Path
write, count = store.write_shard, [0]
def killing(*args):
    write(*args)
    count[0] += 1
    if count[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
store.write_shard = killing
store.DiskStore.__init__.__kwdefaults__["shard_bytes"] = 2000
train(tiny_recipe(Path({folder!r}), freeze={{"prefix_cache": "disk"}}, train={{"max_steps": 30, "output_dir": {out!r}}}))
"""


@pytest.mark.slow
def test_a_killed_fill_is_gone_on_with(tmp_path, own_cache, plain):
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), out=str(tmp_path / "killed"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr.decode()[-500:]
    assert len(shards(own_cache)) == 2
    found, cache, _ = told_by(tmp_path)
    assert found == pytest.approx(plain, rel=1e-6)
    assert cache["hits"] > 90, "whole shards of the killed run are read in the first epoch"


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_resuming_in_the_middle_of_an_epoch(tmp_path, tier):
    """The loader reads ahead, and the checkpoint says where the training stood. Oracle: the uninterrupted run."""
    options = {
        "save_strategy": "steps",
        "save_steps": 17,
        "num_train_epochs": 3,
        "max_steps": -1,
        "learning_rate": 1e-3,
    }
    (wanted, _) = run(tmp_path, tier, train=options)
    again = {
        **options,
        "resume_from_checkpoint": str(tmp_path / tier / "checkpoint-17"),
        "output_dir": str(tmp_path / "resumed"),
    }
    found, summary = run(tmp_path, tier, train=again)
    assert found == pytest.approx(wanted[17:], rel=1e-6)
    told = summary["prefix_cache"]
    assert told["examples"] == 135 - 12 * 4 + 3 - 5 * 4
    # on disk all is there; in memory the rest of the second epoch is stored, and that much of the third is read
    assert told["hits"] == told["examples"] if tier == "disk" else 0 < told["hits"] < 45


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_prefix_cache(tmp_path, plain):
    """The key is no part of the plan: an adaptive strategy's rule is the same too."""
    options = {"save_strategy": "steps", "save_steps": 17}
    run(tmp_path, "off", train=options)
    again = {
        **options,
        "resume_from_checkpoint": str(tmp_path / "off" / "checkpoint-17"),
        "output_dir": str(tmp_path / "again"),
    }
    found, _ = run(tmp_path, "memory", train=again)
    assert found == pytest.approx(plain[17:], rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3), ("int8", 5e-2)])
def test_narrow_states_change_losses_a_little(tmp_path, plain, stored, tolerance):
    found, cache, _ = told_by(tmp_path, "memory", freeze={"prefix_cache_dtype": stored})
    assert found == pytest.approx(plain, rel=tolerance)
    assert found != pytest.approx(plain, rel=1e-7)
    full = told_by(tmp_path, "memory")[1]["bytes"]
    assert cache["bytes"] * (4 if stored == "int8" else 2) == pytest.approx(full, rel=0.2)


@pytest.mark.slow
def test_bf16_runs_store_their_own_precision(tmp_path):
    (wanted, _), (found, summary) = (run(tmp_path, tier, train={"bf16": True}) for tier in ("off", "memory"))
    assert found == pytest.approx(wanted, rel=2e-2)
    assert 2 * summary["prefix_cache"]["bytes"] == run(tmp_path, "memory")[1]["prefix_cache"]["bytes"]


# -- reading ahead -------------------------------------------------------------------------------------------------


class Nothing:
    """A cache that stages nothing."""

    wanted = True

    def __init__(self, loader):
        self.train = loader.examples

    def read(self, *_):
        return None


def loader_of(tmp_path):
    from dsfreeze.job import load_task

    _, data, _ = load_task(tiny_recipe(tmp_path))
    return Loader(data.train, data.collate, data.num_items, per_device_batch_size=4)


def test_reading_ahead_gives_the_same_steps_and_knows_where_the_training_stands(tmp_path):
    plainly, ahead = loader_of(tmp_path), loader_of(tmp_path)
    steps = ReadAhead(ahead, Nothing(ahead))
    for _ in range(15):
        wanted, found = next(plainly), next(steps).step
        assert all(
            torch.equal(a["input_ids"], b["input_ids"])
            for (a, _), (b, _) in zip(wanted.micro_batches, found.micro_batches, strict=True)
        )
        assert all(np.array_equal(a, b) for a, b in zip(wanted.chosen, found.chosen, strict=True))
        assert steps.state_dict() == plainly.state_dict()
    time.sleep(0.1)
    assert ahead.state_dict() != plainly.state_dict(), "it has read further"
    steps.close()
    assert not any(t.name == "read-ahead" and t.is_alive() for t in threading.enumerate())


def test_an_error_while_reading_ahead_is_raised_where_the_step_is_asked_for(tmp_path):
    loader = loader_of(tmp_path)
    steps = ReadAhead(loader, Nothing(loader))
    next(steps)
    loader.collate = lambda _: (_ for _ in ()).throw(UserError("row 7 is odd"))
    with pytest.raises(UserError, match="row 7 is odd"):
        list(zip(range(5), steps, strict=False))
    steps.close()


# -- words ---------------------------------------------------------------------------------------------------------


def test_off_is_a_word(tmp_path):
    """YAML 1.1 would make it false."""
    file = tmp_path / "recipe.yaml"
    file.write_text("model: smollm2-135m\nfreeze: {prefix_cache: off}\n")
    assert load_recipe(file, []).freeze.prefix_cache == "off"
    assert load_recipe(file, ["freeze.prefix_cache=auto"]).freeze.prefix_cache == "auto"
    with pytest.raises(UserError, match=r"prefix_cache"):
        load_recipe(file, ["freeze.prefix_cache=ram"])


@pytest.mark.slow
def test_an_encoder_decoder_is_refused_by_name_and_auto_trains_without(tmp_path):
    rows = "".join(json.dumps({"source": "ab" * (i % 4 + 1), "target": "ba"}) + "\n" for i in range(12))
    (tmp_path / "pairs.jsonl").write_text(rows)
    data = {
        **dict.fromkeys(("label", "num_labels", "eval")),
        "train": str(tmp_path / "pairs.jsonl"),
        "text": ["source", "target"],
    }
    changes = {"model": str(t5_folder(tmp_path / "t5")), "task": "seq2seq", "data": data}
    with pytest.raises(UserError, match=r"passes through one stack of layers, and .* has two"):
        run(tmp_path, "memory", **changes)
    found, cache, said = told_by(tmp_path, "auto", **changes)
    assert found == run(tmp_path, "off", **changes)[0]
    assert cache["tier"] == "off"
    assert "has two" in said


@pytest.mark.slow
def test_a_plan_without_a_prefix_says_so_and_trains(tmp_path):
    found, cache, said = told_by(tmp_path, "memory", freeze={"strategy": "full", "fraction": None})
    assert cache["tier"] == "off"
    assert "no transformer layer" in said
    assert found == pytest.approx(run(tmp_path, "off", freeze={"strategy": "full", "fraction": None})[0], rel=1e-7)


@pytest.mark.slow
def test_the_final_table_tells_hits_and_saving(tmp_path):
    from dsfreeze.tables import summary_table

    _, summary = run(tmp_path, "memory")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table(summary))
    text = console.export_text()
    assert "67 % of 135 examples read above layer 2" in text
    assert "times as fast" in text
