"""Models made of models. Oracles: closed forms of their tensors, bit-identity, plain transformers."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import llama_folder
from transformers import AutoModelForCausalLM

from dsfreeze.cli import run
from dsfreeze.engine.masks import Bits
from dsfreeze.errors import UserError
from dsfreeze.merging import FLOATS, _mixed, _rewrite, average, greedy_soup, interpolate, reset, reset_frozen
from dsfreeze.recipe import Recipe

UP = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


def model(folder, seed, dtype=torch.float32, shards=None):
    """A random Llama; the final norm is that of seed 0, as if it had been frozen."""
    path = llama_folder(folder, layers=2, seed=seed)
    module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    shutil.rmtree(path)
    module.save_pretrained(path, **({"max_shard_size": shards} if shards else {}))
    (path / "tokenizer.json").write_text("{}")
    return path


def tensors(folder):
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def same_bits(one, other):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return (
        one.keys() == other.keys()
        and all(one[n].dtype == v.dtype and one[n].shape == v.shape for n, v in other.items())
        and all(
            torch.equal(one[n].view(kinds[v.element_size()]), v.view(kinds[v.element_size()])) for n, v in other.items()
        )
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    start, end = (model(folder / name, seed, request.param) for seed, name in enumerate(("start", "end")))
    for path, odd in ((start, -0.0), (end, float("inf"))):  # what arithmetic with 0 and 1 would spoil
        values = load_file(path / "model.safetensors")
        values[EMBED][0, 0] = odd
        save_file(values, path / "model.safetensors", {"format": "pt"})
    return start, end


@pytest.mark.parametrize("alpha", [0, 1])
def test_both_ends_are_reproduced_to_the_last_bit(pair, alpha, tmp_path):
    """Oracle: the ends themselves, file for file."""
    out = interpolate(*pair, alpha, tmp_path / "out")
    assert same_bits(tensors(out), tensors(pair[alpha]))
    assert (out / "model.safetensors").read_bytes() == (pair[alpha] / "model.safetensors").read_bytes()


@pytest.mark.parametrize("alpha", [0.3, 0.5])
def test_between_the_ends_lies_their_mean(pair, alpha, tmp_path):
    """Oracle: the formula in float64, rounded once; equal tensors keep their bits."""
    start, end = map(tensors, pair)
    found = tensors(interpolate(*pair, alpha, tmp_path / "out"))
    for name, value in found.items():
        wanted = (1 - alpha) * start[name].double() + alpha * end[name].double()
        ulp = 2.0**-8 if value.dtype == torch.bfloat16 else 2.0**-24
        torch.testing.assert_close(value.double(), wanted, rtol=ulp, atol=1e-9)
        assert value.dtype == start[name].dtype
    assert torch.equal(found["model.norm.weight"], start["model.norm.weight"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_elements_that_are_equal_keep_their_bits(dtype):
    """Oracle: bit-identity, of a zero's sign too, in a tensor of which one element differs."""
    start = torch.randn(999, generator=torch.Generator().manual_seed(0)).to(dtype)
    start[1] = -0.0
    end = start.clone()
    end[0] += 1
    for shares in ((0.3, 0.7), (1 / 3, 2 / 3)):
        found = _mixed("x", [start, end], shares)
        assert same_bits({"x": found[1:]}, {"x": start[1:]})
        assert start[0] < found[0] < end[0]


def test_the_mean_of_one_model_thrice_is_that_model(pair, tmp_path):
    """Oracle: bit-identity; a third is no binary number."""
    start = pair[0]
    copies = [shutil.copytree(start, tmp_path / f"copy{n}") for n in range(3)]
    assert same_bits(tensors(average(copies, tmp_path / "out")), tensors(start))


def test_an_average_is_the_mean(pair, tmp_path):
    """Oracle: the mean in float64, of three."""
    third = model(tmp_path / "third", 2, next(iter(tensors(pair[0]).values())).dtype)
    folders = [*pair, third]
    found, members = tensors(average(folders, tmp_path / "out")), [tensors(folder) for folder in folders]
    for name, value in found.items():
        wanted = sum(m[name].double() for m in members) / 3
        ulp = 2.0**-8 if value.dtype == torch.bfloat16 else 2.0**-24
        torch.testing.assert_close(value.double(), wanted, rtol=ulp, atol=1e-8)


def test_shards_are_kept_and_read_across(tmp_path):
    """Oracle: the merge of the same models in one file each; plain transformers loads the result."""
    start, end = model(tmp_path / "start", 0), model(tmp_path / "end", 1, shards="40KB")
    whole = model(tmp_path / "whole", 1)
    out = interpolate(start, end, 0.25, tmp_path / "out")
    assert len(list(out.glob("*.safetensors"))) > 2
    assert same_bits(tensors(out), tensors(interpolate(start, whole, 0.25, tmp_path / "one")))
    loaded, wanted = AutoModelForCausalLM.from_pretrained(out), tensors(out)
    assert all(torch.equal(value, wanted[name]) for name, value in loaded.named_parameters())


def test_a_tensor_is_in_memory_at_a_time(tmp_path):
    """Oracle: the calls, in the order of the file, each after the ones before were written (but for a buffer of 8 KiB)."""
    values = {name: torch.full((100_000,), n, dtype=torch.float32) for n, name in enumerate("abc")}
    save_file(values, tmp_path / "in.safetensors", {"format": "pt"})
    sizes = []

    def make(name):
        sizes.append((name, (tmp_path / "out.safetensors").stat().st_size))
        return values[name] + 1

    _rewrite(tmp_path / "in.safetensors", tmp_path / "out.safetensors", make)
    assert [name for name, _ in sizes] == ["a", "b", "c"]
    assert all(size >= 400_000 * n for n, (_, size) in enumerate(sizes))
    assert {name: float(v[0]) for name, v in load_file(tmp_path / "out.safetensors").items()} == {
        "a": 1,
        "b": 2,
        "c": 3,
    }


# -- resets ------------------------------------------------------------------------------------------------------------


def test_a_reset_takes_whole_tensors_and_elements(tmp_path):
    """Oracle: the two models' own values, to the bit."""
    start, end = model(tmp_path / "start", 0), model(tmp_path / "end", 1)
    down, mask = "model.layers.0.mlp.down_proj.weight", torch.arange(64 * 32).reshape(64, 32) % 3 == 0
    found = tensors(reset(start, end, [down], tmp_path / "out", {UP: Bits.of(mask)}))
    before, after = tensors(start), tensors(end)
    for name, value in found.items():
        wanted = (
            before[name]
            if name == down
            else torch.where(mask, after[name], before[name])
            if name == UP
            else after[name]
        )
        assert torch.equal(value, wanted), name
    note = json.loads((tmp_path / "out" / "dsfreeze_merge.json").read_text())
    assert (note["how"], note["tensors"], note["masked"]) == ("reset", [down], [UP])


@pytest.mark.parametrize("stored", ["both", EMBED, "lm_head.weight"])
def test_what_a_plan_freezes_is_reset(tmp_path, stored):
    """Oracle: the names that the strategy would train; a tied embedding is stored once, under either name."""
    start, end = (llama_folder(tmp_path / f"m{s}", layers=4, seed=s, tied=stored != "both") for s in (0, 1))
    for folder in (start, end) if stored == "lm_head.weight" else ():
        values = tensors(folder)
        save_file({stored: values.pop(EMBED), **values}, folder / "model.safetensors", {"format": "pt"})
    recipe = Recipe.model_validate({"model": "x", "task": "sft", "freeze": {"strategy": "bottom", "count": 3}})
    found = tensors(reset_frozen(start, end, recipe, tmp_path / "out"))
    before, after = tensors(start), tensors(end)
    kept = [
        n for n in found if "layers.3." in n or n == "model.norm.weight" or (n == "lm_head.weight" and stored == "both")
    ]
    for name, value in found.items():
        assert torch.equal(value, (after if name in kept else before)[name]), name
    assert not torch.equal(before[UP], after[UP])


# -- soups -------------------------------------------------------------------------------------------------------------


def test_a_greedy_soup_takes_what_does_not_harm():
    """Oracle: recipe 1 by hand: the best first, ties join, what lowers the score does not."""
    scores = {"b": 0.7, "a": 0.9, "c": 0.8, "d": 0.8}
    table = {("a", "c"): 0.9, ("a", "c", "d"): 0.85, ("a", "c", "b"): 0.95}
    asked = []

    def score_of(names):
        asked.append(tuple(names))
        return table[tuple(names)]

    assert greedy_soup(scores, score_of) == ("a", "c", "b")
    assert asked == list(table)
    assert greedy_soup({"a": 1.0}, score_of) == ("a",)
    with pytest.raises(UserError, match="members"):
        greedy_soup({}, score_of)


# -- folders and mistakes ----------------------------------------------------------------------------------------------


def test_a_merged_folder_is_the_last_one_s_without_its_plan(tmp_path):
    """Oracle: file names; code, pickles and the run's own notes stay behind. A second merge may replace it, nothing else may."""
    start, end = model(tmp_path / "start", 0), model(tmp_path / "end", 1)
    for name in ("dsfreeze_plan.json", "README.md", "modeling_x.py", "pytorch_model.bin"):
        (end / name).write_text("{}")
    out = interpolate(start, end, 0.5, tmp_path / "out")
    assert {f.name for f in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "dsfreeze_merge.json", "SHA256SUMS",
    }  # fmt: skip
    note = json.loads((out / "dsfreeze_merge.json").read_text())
    assert (note["alpha"], [m["folder"] for m in note["members"]]) == (0.5, ["start", "end"])
    average([start, end], out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(UserError, match="not written by an export"):
        interpolate(start, end, 0.5, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["end", "mine", "out", "start"]


def spoilt(folder, kind):
    file = folder / "model.safetensors"
    values = load_file(file)
    if kind == "more":
        values["more"] = torch.zeros(2)
    elif kind == "shape":
        values[UP] = values[UP][:-1].contiguous()
    elif kind == "dtype":
        values[UP] = values[UP].bfloat16()
    save_file(values, file, {"format": "pt"})
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    if kind == "none":
        file.rename(folder / "pytorch_model.bin")
    if kind == "config":
        (folder / "config.json").unlink()
    if kind == "index":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../start/model.safetensors"}}')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("more", "'more' and .*start does not"), ("shape", r"F32 \[64, 32\] .*F32 \[63, 32\]"), ("dtype", "F32 .*BF16"),
        ("cut", "truncated or corrupt"), ("none", "no model.safetensors"), ("config", "no config.json"),
        ("index", "does not say which file"),
    ],
)  # fmt: skip
def test_models_that_do_not_match_are_refused(tmp_path, kind, message):
    """Oracle: the message; nothing is left behind."""
    start, end = model(tmp_path / "start", 0), model(tmp_path / "end", 1)
    spoilt(end, kind)
    with pytest.raises(UserError, match=message):
        interpolate(start, end, 0.5, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["end", "start"]


def test_integers_that_differ_have_no_mean(tmp_path):
    """Oracle: the message; equal ones pass."""
    start, end = model(tmp_path / "start", 0), model(tmp_path / "end", 1)
    for folder, last in ((start, 3), (end, 3)):
        save_file(
            {**tensors(folder), "position_ids": torch.tensor([1, last])}, folder / "model.safetensors", {"format": "pt"}
        )
    assert tensors(interpolate(start, end, 0.5, tmp_path / "out"))["position_ids"].tolist() == [1, 3]
    save_file({**tensors(end), "position_ids": torch.tensor([1, 4])}, end / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"'position_ids' has torch\.int64 and differs"):
        interpolate(start, end, 0.5, tmp_path / "out")


def test_other_mistakes(tmp_path):
    start = model(tmp_path / "start", 0)
    for alpha in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="from 0"):
            interpolate(start, start, alpha, tmp_path / "out")
    with pytest.raises(UserError, match="two models or more"):
        average([start], tmp_path / "out")
    for out in (start, tmp_path / "x" / ".." / "start"):
        with pytest.raises(UserError, match="is one of the models"):
            interpolate(start, start, 0.5, out)
    with pytest.raises(UserError, match=r"no tensor 'model\.layers\.7.*to reset"):
        reset(start, start, ["model.layers.7.mlp.up_proj.weight"], tmp_path / "out")


def test_the_command(tmp_path, capsys):
    """Oracle: the functions; one JSON object."""
    start, end = (str(model(tmp_path / n, seed)) for seed, n in enumerate(("start", "end")))
    out = str(tmp_path / "out")
    assert run(["merge", start, end, "-o", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": out}
    note = tmp_path / "out" / "dsfreeze_merge.json"
    assert json.loads(note.read_text())["alpha"] == 0.5
    assert run(["merge", start, end, "-o", out, "--alpha", "0.2"]) == 0
    assert json.loads(note.read_text())["alpha"] == 0.2
    assert run(["merge", "--average", start, end, start, "-o", out]) == 0
    assert json.loads(note.read_text())["how"] == "average"
    assert run(["merge", "--reset", start, end, "task=sft", "freeze.strategy=top", "-o", out]) == 0
    assert json.loads(note.read_text())["plan"]["strategy"] == "top"
    for wrong in (
        ["--average", "--alpha", "0.1", start, end], [start], [start, end, "freeze.strategy=top"], ["--average", start],
        ["--reset", start, end, "freeze.strategy=tpo"], [start, str(tmp_path / "nowhere")],
    ):  # fmt: skip
        assert run(["merge", *wrong, "-o", out]) == 2
