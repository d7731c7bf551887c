"""`dsfreeze cache`, and runs without their prefix. Oracle: the run without a cache; the base's own files, byte for byte."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_prefix_cache import EPOCHS, losses, run
from tiny_runs import classification_data, llama_folder, tiny_recipe

from dsfreeze.cli import run as command
from dsfreeze.commands import export_folder
from dsfreeze.errors import UserError
from dsfreeze.loop import train


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


def words(folder, *more):
    """A recipe on the command line."""
    data = classification_data(folder / "data")
    model = folder / "model"
    if not model.exists():
        llama_folder(model)
    given = {
        "model": model, "zero": "local", "freeze.fraction": 0.5, "train.num_train_epochs": 2, "train.output_dir": folder / "run",
        **{f"data.{key}": value for key, value in data.items()},
    }  # fmt: skip
    return [*(f"{key}={value}" for key, value in given.items()), *more]


def test_cache_fills_once_and_training_reads_from_the_first_step(tmp_path, capsys, own_cache):
    given = words(tmp_path)
    capsys.readouterr()  # saving the model, transformers imported deepspeed
    assert command(["cache", *given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    # of 45 and 18 examples one is in both
    assert (told["layers"], told["examples"], told["computed_examples"]) == (2, 62, 62)
    assert told["bytes"] == told["computed_tokens"] * 32 * 4
    assert list(own_cache.iterdir()) == [own_cache / told["where"].rpartition("/")[2]]
    assert command(["cache", *words(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed_examples"] == 0
    assert command(["train", *words(tmp_path), "freeze.prefix_cache=auto", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["prefix_cache"]
    assert (found["tier"], found["hits"], found["examples"]) == ("disk", 90, 90)
    assert found["evaluation_hits"] == found["evaluation_examples"]


@pytest.mark.slow
def test_cache_says_what_it_did(tmp_path, capsys):
    assert command(["cache", *words(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "what leaves layer 2" in out
    assert "62, of which 0 were there already" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["freeze.fraction=0.0"], "leaves no layer frozen below all that trains"),
        (["freeze.strategy=top"], "leaves no layer frozen below all that trains"),
        (["model=nowhere/at-all/x"], "does not exist"),
        (["model.trust_remote_code=true"], "`dsfreeze cache` computes the prefix in parts"),
    ],
)
def test_cache_refuses_what_has_no_prefix(tmp_path, capsys, more, message):
    assert command(["cache", *words(tmp_path), *more]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert message in told
    assert "evict_prefix" not in told


@pytest.mark.slow
@pytest.mark.parametrize("tier", ["memory", "disk", "auto"])
def test_an_evicted_run_is_the_run_with_its_prefix(tmp_path, tier):
    (wanted, plain) = run(tmp_path, "off")
    (found, evicted) = run(tmp_path, tier, freeze={"evict_prefix": True})
    assert found == pytest.approx(wanted, rel=1e-6)
    told = evicted["prefix_cache"]
    assert told["hits"] == told["examples"] == 135
    base = load_file(tmp_path / "model" / "model.safetensors")
    gone = {
        name: t for name, t in base.items() if "embed_tokens" in name or ".layers.0." in name or ".layers.1." in name
    }
    assert told["evicted_bytes"] == sum(t.nbytes for t in gone.values())
    assert plain["memory"]["weights"] - evicted["memory"]["weights"] == told["evicted_bytes"]
    model, whole = (load_file(tmp_path / name / "model" / "model.safetensors") for name in (tier, "off"))
    assert model.keys() == whole.keys()
    for name, tensor in model.items():
        assert torch.equal(tensor, base[name]) if name in gone else torch.allclose(tensor, whole[name], atol=1e-6), name


@pytest.mark.slow
def test_an_evicted_run_resumes_and_exports_from_its_checkpoint(tmp_path):
    options = {**EPOCHS, "save_strategy": "steps", "save_steps": 17}
    freeze = {"evict_prefix": True}
    (wanted, _) = run(tmp_path, "memory", freeze=freeze, train=options)
    again = {
        **options,
        "resume_from_checkpoint": str(tmp_path / "memory" / "checkpoint-17"),
        "output_dir": str(tmp_path / "resumed"),
    }
    found, _ = run(tmp_path, "memory", freeze=freeze, train=again)
    assert found == wanted[17:]
    export_folder(tmp_path / "memory", tmp_path / "exported", delta=False, base=None)
    ends = [
        load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", tmp_path / "memory" / "model")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    # an evicted run's checkpoint is any run's: the base is the same
    third = {**again, "output_dir": str(tmp_path / "whole")}
    assert run(tmp_path, "off", train=third)[0] == pytest.approx(wanted[17:], rel=1e-6)


@pytest.mark.slow
def test_a_state_that_is_gone_ends_an_evicted_run_with_the_reason(tmp_path, own_cache, monkeypatch):
    from dsfreeze.prefix import cache as caches

    enter = caches.PrefixCache.enter

    def spoiling(self, *args):
        enter(self, *args)
        for path in own_cache.rglob("*.safetensors"):
            content = bytearray(path.read_bytes())
            content[-300] ^= 4
            path.write_bytes(content)

    monkeypatch.setattr(caches.PrefixCache, "enter", spoiling)
    with pytest.raises(
        UserError, match=r"cannot give the states of a batch any more .*changed since.*resume_from_checkpoint"
    ):
        run(tmp_path, "disk", freeze={"evict_prefix": True})


@pytest.mark.parametrize(
    ("freeze", "changes", "message"),
    [
        ({"strategy": "full", "fraction": None}, {}, "no prefix to cache or to evict"),
        ({"strategy": "autofreeze", "fraction": None, "switch_every": 2}, {}, "decides on the way what trains"),
        ({}, {"model": {"trust_remote_code": True}}, "trust_remote_code"),
    ],
)
def test_what_an_evicted_run_cannot_do_is_refused(tmp_path, freeze, changes, message):
    if changes:
        changes = {"model": {"name": str(llama_folder(tmp_path / "model")), **changes["model"]}}
    recipe = tiny_recipe(tmp_path, freeze={"prefix_cache": "memory", "evict_prefix": True, **freeze}, **changes)
    with pytest.raises(UserError, match=message):
        train(recipe)


def test_eviction_without_a_cache_is_a_mistake_of_the_recipe(tmp_path):
    with pytest.raises(ValueError, match="evict_prefix trains on cached states alone"):
        tiny_recipe(tmp_path, freeze={"evict_prefix": True})


@pytest.mark.slow
def test_a_moving_cut_above_an_evicted_prefix(tmp_path):
    """layers.1 freezes for the second and third epoch; layers.0 is gone from the start. Oracle: the run without a cache."""
    freeze = {
        "strategy": "step_ranges",
        "fraction": None,
        "step_ranges": {"embed": [0, -1], "layers.0": [0, -1], "layers.1": [12, -1]},
    }
    (wanted, _) = run(tmp_path, "off", freeze=freeze)
    (found, summary) = run(tmp_path, "memory", freeze={**freeze, "evict_prefix": True})
    assert found == pytest.approx(wanted, rel=1e-6)
    told = summary["prefix_cache"]
    assert (told["hits"], told["extended"], told["cut"]) == (90, 45, 2)
    assert losses(tmp_path / "memory") == found
