"""Recipes. Oracles: the values and lines in the text at hand; any bytes and words give a recipe or a UserError."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsfreeze import recipe_yaml
from dsfreeze.compare.reading import read_grid
from dsfreeze.continual.reading import read_course
from dsfreeze.errors import UserError
from dsfreeze.metrics import METRICS
from dsfreeze.quickstart import FULL, RECIPE
from dsfreeze.recipe import DataOptions, Recipe
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.recipe_reference import recipe_reference, sections
from dsfreeze.recipe_yaml import dump_yaml, parse_value, parse_yaml

ROOT = Path(__file__).parents[1]
WRONG = """\
model: smollm2-135m
task: clasification
data: {train: 5, text: [a, b, c], lable: x}
learning_rate: 1e-4
freeze:
  strategy: botom
  fracton: 0.5
  fraction: 1.5
  adapter: {r: 0}
train:
  optim: galore_adamw
  report_to: [tensorbord]
  resume_from_checkpoint: [1]
  bf16: maybe
  seed: 1
  seed: 2
"""


@pytest.fixture
def written(tmp_path):
    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def told(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# -- what is read --------------------------------------------------------------------------------------------------


def test_the_designs_example(written):
    """Oracle: the example recipe of docs/design.md, key by key."""
    recipe = load_recipe(
        written(
            "model: smollm2-135m\ntask: classification\n"
            "data: {train: rte/train.jsonl, eval: rte/validation.jsonl, text: [premise, hypothesis], label: label}\n"
            "freeze: {strategy: bottom, fraction: 0.5}\nzero: zero2\n"
            "train: {max_steps: 300, per_device_train_batch_size: 8, learning_rate: 5.0e-5, output_dir: runs/x}\n"
        ),
        ["freeze.fraction=0.75"],
    )
    assert recipe.model.name == "smollm2-135m"
    assert recipe.data.text == ["premise", "hypothesis"]
    assert recipe.freeze.fraction == 0.75
    assert recipe.train.learning_rate == 5e-5
    assert recipe.train.output_dir == Path("runs/x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-5", 5e-5), ("1E3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-3", -3), ("0x10", 16), ("0o7", 7), ("010", 10),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("", None), ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("builtin:nli", "builtin:nli"),
        ("1_000", "1_000"), ("=", "="),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2_in_files_and_overrides(text, value):
    """Oracle: YAML 1.2.2's core schema (section 10.3.2)."""
    parsed = parse_yaml(f"key: {text}".encode(), "x").values["key"]
    for found in (parsed, parse_value(text)):
        assert found == value
        assert type(found) is type(value)


def test_no_is_hugging_faces_no_and_still_false_where_that_is_asked(written):
    recipe = load_recipe(written("model: m\ntrain: {save_strategy: no, eval_strategy: no, bf16: yes, export: off}"))
    assert (recipe.train.save_strategy, recipe.train.eval_strategy) == ("no", "no")
    assert recipe.train.bf16 is True
    assert recipe.train.export is False


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("freeze.trainable=*.bias", "trainable", ["*.bias"]),
        ("freeze.trainable=[layers.1.*, 'head']", "trainable", ["layers.1.*", "head"]),
        ("freeze.unfrozen_parameters=^model.layers.(1|2)", "unfrozen_parameters", ["^model.layers.(1|2)"]),
        ("freeze.adapter={kind: dora, r: 4}", "adapter", None),
    ],
)
def test_overrides_take_plain_texts_whole_and_brackets_as_yaml(word, key, value):
    freeze = load_recipe(None, ["model=m", word]).freeze
    if key == "adapter":
        assert (freeze.adapter.kind, freeze.adapter.r) == ("dora", 4)
    else:
        assert getattr(freeze, key) == value
        assert freeze.strategy == "patterns"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("builtin:nli", "builtin:nli")),
        (["data.train=mine.jsonl"], ("mine.jsonl", None)),
        (["data.train=mine.jsonl", "data.eval=builtin:nli"], ("mine.jsonl", "builtin:nli")),
        (["data.train=null"], (None, None)),
        (["data.train=builtin:nli"], ("builtin:nli", "builtin:nli")),
    ],
)  # fmt: skip
def test_rows_of_ones_own_are_not_measured_on_the_built_in_ones(words, expected):
    """Oracle: by hand; a run that names what it trains on alone would report an accuracy on another task's rows."""
    data = load_recipe(None, ["model=m", *words]).data
    assert (data.train, data.eval) == expected


def test_a_prefix_keeps_its_last_blank():
    recipe = load_recipe(None, ["model=m", "task=seq2seq", "data.prefix=translate English to German: "])
    assert recipe.data.prefix == "translate English to German: "


def test_model_is_a_name_or_a_section_and_the_last_override_wins(written):
    file = written("model: a\ndata:\n")
    assert load_recipe(file, ["model.dropout=0.1"]).model.model_dump(include={"name", "dropout"}) == {
        "name": "a", "dropout": 0.1,
    }  # fmt: skip
    assert load_recipe(file, ["model=b", "model=c"]).model.name == "c"
    assert load_recipe(file, ["data.eval=null"]).data.eval is None


def test_a_value_on_the_command_line_mends_a_mistake_in_the_file(written):
    file = written("model: a\nfreeze: {fraction: 7, strategy: botom}\n")
    assert load_recipe(file, ["freeze.fraction=0.5", "freeze.strategy=top"]).freeze.fraction == 0.5
    file = written("model: a\ntrain: {seed: !!int abc}\n")
    assert load_recipe(file, ["train.seed=3"]).train.seed == 3


# -- mistakes ------------------------------------------------------------------------------------------------------


def test_every_mistake_at_once_with_its_line_and_the_nearest_name(written):
    """Oracle: the lines of WRONG, counted by hand, and the command line."""
    message = told(written(WRONG), "train.max_step=5", "oops", "freeze.count=[1")
    expected = [
        ("recipe.yaml:2: task", "'classification'"),
        ("recipe.yaml:3: data.train", "it takes text; write it in quotes: '5'"),
        ("recipe.yaml:3: data.text", "names 3 columns"),
        ("recipe.yaml:3: data.lable", "Did you mean 'label'"),
        ("recipe.yaml:4: learning_rate", "'train.learning_rate'"),
        ("recipe.yaml:6: freeze.strategy", "'bottom'"),
        ("recipe.yaml:7: freeze.fracton", "'fraction'"),
        ("recipe.yaml:8: freeze.fraction", "a number from 0 to 1"),
        ("recipe.yaml:9: freeze.adapter.r", "a whole number from 1 up"),
        ("recipe.yaml:11: train.optim", "Optimizers that work: adamw_torch"),
        ("recipe.yaml:12: train.report_to[0]", "'tensorboard'"),
        ("recipe.yaml:13: train.resume_from_checkpoint", "true or false, or auto, or a path"),
        ("recipe.yaml:14: train.bf16", "true or false"),
        ("recipe.yaml:16: train.seed", "line 15"),
        ("command line: 'oops'", "key=value"),
        ("command line: freeze.count", "not YAML"),
        ("command line: train.max_step:", "'max_steps'"),
    ]
    header, *lines = message.splitlines()
    assert header == f"{len(expected)} mistakes:"
    for line, (where, what) in zip(lines, expected, strict=True):
        assert where in line
        assert what in line


def test_galore_is_refused_with_the_optimizers_that_work_and_why(written):
    message = told(written("model: m\ntrain: {optim: galore_adamw}\nzero: zero2\n"))
    assert message.endswith(
        "recipe.yaml:2: train.optim: is 'galore_adamw', which is not offered: it works on whole matrices, and ZeRO "
        "hands an optimizer flat slices of them. Optimizers that work: adamw_torch."
    )


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("model: a\nfreeze: {fraction: 0.5, count: 3}\ntrain: {max_steps: x}", [], ["2 mistakes", "freeze: fraction"]),
        ("model: a\nfreeze: {strategy: ranked}", [], [":2: freeze: strategy 'ranked' needs freeze.scores", '{"scores": {"layers.0": 0.12']),
        ("model: a\nfreeze: {strategy: ranked, scores: [3]}", [], [":2: freeze.scores: is [3]; it takes a path"]),
        ("model: a\nfreeze: 3\nadapter: 1", [], ["freeze: is 3; it is a section with the keys", "'freeze.adapter'"]),
        ("model: {dropout: 0.1}", [], [":1: model.name: is missing"]),
        ("model: 5", [], ["model: is 5; it is a section with the keys name"]),
        ("", [], ["recipe.yaml: model: is missing"]),
        ("model: a\ntrain.max_steps: 3", [], [":2: train.max_steps: dots join", "write max_steps under train:"]),
        ("model: a\ntask: preferences", [], ["is 'preferences'.", "Valid: classification, tokens, causal_lm, sft"]),
        ("model: a\ntrain: {learning_rate: .inf}", [], ["train.learning_rate: is inf; it takes a number above 0"]),
        ("model: a\ntrain: {max_steps: 0}", [], ["max_steps: is 0; write a positive number of steps, or -1"]),
        ("model: a\ntrain: {seed: -1}", [], ["train.seed: is -1; it takes a whole number from 0"]),
        ("model: a\nzero: 2", [], ["zero: is 2; it takes text; write it in quotes: '2'. A name under ds_configs/"]),
        ("model: a\ntrain: {gradient_checkpointing_kwargs: {use_reentrant: true}}", [], ["reentrant checkpointing"]),
        ("model: a", ["train.bf16.x=1"], ["command line: train.bf16.x: 'train.bf16' is a single value, not a section"]),
        ("model: a\ntrain: {bf16: true}", ["train.bf16.x=1"], ["'train.bf16' is a single value, not a section"]),
        ("model: a", ["--freeze.fraction=0.5"], ["command line: --freeze: unknown key. Did you mean 'freeze'?"]),
        ("model: a", ["=3"], ["'=3' is no override"]),
        ("model: a", ["freeze.trainable=[*.bias]"], ["command line: freeze.trainable: not YAML", "needs quotes"]),
        ("model: a\nfreeze:\n  trainable: [*.bias]", [], ["recipe.yaml:3: not YAML", "needs quotes"]),
        ("model: &x a\ntask: *x", [], ["recipe.yaml:2: not YAML: '*x' is an alias"]),
        ("model: a\n\ttask: sft", [], ["recipe.yaml:2: not YAML", "indent with spaces"]),
        ("a: b: c", [], ["recipe.yaml:1: not YAML: mapping values are not allowed here"]),
        ("- a", [], ["a recipe is a mapping", "not a list"]),
        ("just words", [], ["a recipe is a mapping", "'just words'"]),
        ("model: !!python/object/apply:os.getcwd []", [], [":1: model: the tag", "not allowed"]),
        ("model: a\ntrain: {seed: !!int abc}", [], [":2: train.seed: 'abc' is not readable as int"]),
        ("--- {model: a}\n--- {model: b}", [], ["another document"]),
    ],
)  # fmt: skip
def test_one_mistake(text, words, expected, written):
    message = told(written(text), *words)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    "junk",
    [
        b"\x00\xff\xfe", b"PK\x03\x04" + bytes(range(256)), b"model: \"\\UFFFFFFFF\"", b"[" * 20_000, b"x" * 2_000_000,
        b"a: " + b"9" * 5000, b"model: \xc3",
    ],
    ids=["bytes", "zip", "escape", "nesting", "size", "digits", "cut"],
)  # fmt: skip
def test_junk_is_the_users_mistake(junk, written):
    assert "recipe.yaml" in told(written(junk))


def test_no_such_file_names_those_that_are_there(written, tmp_path):
    file = written("model: m", "rte.yaml")
    assert "rte.yaml" in told(file.parent / "ret.yaml")
    assert "There is no folder" in told(tmp_path / "no" / "rte.yaml")
    assert told(tmp_path) == f"{tmp_path} is a folder; name the recipe file in it."
    assert "Cannot read" in told(Path("x" * 5000))


def test_an_unreadable_section_does_not_hide_behind_another(written):
    """Sections that contradict themselves are told in the same breath as a wrong value in them."""
    message = told(written("model: m\nfreeze: {fraction: 0.5, count: 1, round: up, strategy: ranked}"))
    assert "freeze.round" in message
    assert "freeze: fraction and count" in message


def test_a_mistake_is_told_once_without_its_consequences(written):
    """A wrong freeze.scores is not also a missing one."""
    message = told(written("model: a\nfreeze: {strategy: ranked, scores: [3]}"))
    assert message.count("\n") == 0
    assert "it takes a path" in message


UNREAD = """\
model: m
task: sft
data:
  prefix: "to German: "
  label: tags
freeze:
  strategy: bottom
  scores: scores.json
  offset: 1
  seed: 7
  fraction: 0.5
  round: floor
"""


def test_a_key_that_nothing_reads_is_a_mistake_with_its_line(written):
    """Oracle: the lines of UNREAD, counted by hand; `round: floor` is rounding's default, and says nothing."""
    header, *lines = told(written(UNREAD)).splitlines()
    expected = [(4, "data.prefix: task 'sft'", "seq2seq"), (5, "data.label: task 'sft'", "classification, tokens"),
                (8, "freeze.scores: freeze.strategy 'bottom'", "ranked, owlore, budget, salf, half"),
                (9, "freeze.offset: freeze.strategy 'bottom'", "interval"),
                (10, "freeze.seed: freeze.strategy 'bottom'", "random, half, lisa, badam, hift, owlore, adagradselect, grass, blockllm")]  # fmt: skip
    assert header == f"{len(expected)} mistakes:"
    for line, (number, start, readers) in zip(lines, expected, strict=True):
        assert f"recipe.yaml:{number}: {start} does not read it (only {readers})." in line
        assert "leave this key at its default" in line


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (["freeze.strategy=head", "freeze.granularity=matrix"], "command line: freeze.granularity: freeze.strategy 'head'"),
        (["freeze.strategy=full", "freeze.granularity=bias"], "command line: freeze.granularity: freeze.strategy 'full'"),
        (["freeze.trainable=head", "freeze.granularity=bias"], "command line: freeze.granularity: freeze.strategy 'patterns'"),
        (["freeze.strategy=top", "freeze.trainable=head"], "command line: freeze.trainable: freeze.strategy 'top'"),
        (["freeze.trainable=head", "freeze.fraction=0.5"], "command line: freeze.fraction: freeze.strategy 'patterns'"),
        (["freeze.strategy=interval", "freeze.rounding=ceil"], "command line: freeze.rounding: freeze.strategy 'interval'"),
        (["freeze.count=2", "freeze.round=ceil"], "command line: freeze: rounding is about a fraction"),
        (["data.packing=true"], "command line: data.packing: task 'classification' does not read it (only sft)"),
        (["task=causal_lm", "data.max_new_tokens=9"], "command line: data.max_new_tokens: task 'causal_lm'"),
    ],
)  # fmt: skip
def test_keys_that_contradict_strategy_or_task(words, beginning):
    assert told(None, "model=m", *words).startswith(beginning)


BUDGET = ["freeze.strategy=budget", "freeze.scores=s.json", "freeze.budget={flops: 50%}"]
SALF = ["freeze.strategy=salf", "freeze.scores=s.json"]


@pytest.mark.parametrize(
    ("words", "beginning"),
    [
        (["freeze.budget={flops: 50%}"], "freeze.budget: freeze.strategy 'bottom' does not read it (only budget)."),
        ([*SALF, "freeze.budget={flops: 50%}"], "freeze.budget: freeze.strategy 'salf' does not read it (only budget)."),
        ([*SALF, "freeze.score=fisher"], "freeze.score: freeze.strategy 'salf' does not read it (only ranked, owlore, budget, half)."),
        ([*SALF, "freeze.fraction=0.5"], "freeze.fraction: freeze.strategy 'salf' does not read it"),
        *(([*BUDGET, f"freeze.{key}={value}"], f"freeze.{key}: freeze.strategy 'budget' does not read it (only salf).")
          for key, value in (("trace", "logit_lens"), ("gain", "b"), ("tau", "0.5"), ("cut", "mode"), ("min_layers", "2"),
                             ("max_layers", "2"), ("padding", "fill"), ("flat", "train_all"))),
        (["freeze.strategy=budget", "freeze.budget={flops: 50%}"], "freeze: strategy 'budget' needs freeze.scores, a file that `dsfreeze analyze`"),
        (["freeze.strategy=salf"], "freeze: strategy 'salf' needs freeze.scores, a file that `dsfreeze analyze`"),
        (BUDGET[:2], "freeze: strategy 'budget' needs freeze.budget, such as {flops: -40%}"),
        ([*BUDGET[:2], "freeze.budget={}"], "freeze: strategy 'budget' needs freeze.budget, such as {flops: -40%}"),
        ([*BUDGET, "freeze.adapter={r: 4}"], "freeze: strategy 'budget' chooses among whole layers or matrices"),
        ([*BUDGET, "freeze.granularity=bias"], "freeze: strategy 'budget' chooses among whole layers or matrices"),
        ([*BUDGET, "freeze.granularity=category"], "freeze: strategy 'budget' chooses among whole layers or matrices"),
        ([*SALF, "freeze.granularity=matrix"], "freeze.granularity: freeze.strategy 'salf' does not read it"),
        ([*SALF, "freeze.min_layers=3", "freeze.max_layers=2"], "freeze: max_layers is 2 and min_layers 3; the most is not the least"),
        ([*SALF, "freeze.min_layers=0"], "freeze.min_layers: is 0; it takes a whole number from 1 up"),
        ([*SALF, "freeze.tau=0"], "freeze.tau: is 0; it takes a number above 0 to 1"),
        ([*SALF, "freeze.gain=e"], "freeze.gain: is 'e'. Valid: a, b, c, d."),
        ([*SALF, "freeze.cut=mean"], "freeze.cut: is 'mean'."),
        ([*BUDGET[:2], "freeze.budget={flop: 50%}"], "freeze.budget: is 'flop'. Did you mean 'flops'? Valid: memory, time, flops, trainable."),
        ([*BUDGET[:2], "freeze.budget={flops:50%}"], "freeze.budget: is 'flops:50%'. A colon is followed by a space. Did you mean"),
        ([*BUDGET[:2], "freeze.budget={flops: 150%}"], "freeze.budget: flops: '150%' is 150 % of full tuning; write a share above"),
        ([*BUDGET[:2], "freeze.budget={memory: 40}"], "freeze.budget: 40 alone is no limit; write a share of full tuning such as"),
        ([*BUDGET[:2], "freeze.budget={memory: null}"], "freeze.budget: None alone is no limit; write a share"),
        ([*BUDGET[:2], "freeze.budget={flops: 50%, time: soon}"], "freeze.budget: time: 'soon' is no limit; write a share of full tuning"),
        ([*BUDGET[:2], f"freeze.budget={{flops: {'9' * 400}%}}"], "freeze.budget: flops: '999"),
        ([*BUDGET[:2], "freeze.budget=50%"], "freeze.budget: is '50%'; it takes a mapping."),
        (["analyze.budget={}"], "analyze.budget: has no limit; write one such as {flops: 50%}"),
        (["analyze.budget={flops: 0%}"], "analyze.budget: flops: '0%' is 0 % of full tuning"),
        (["analyze.budget={watts: 50%}"], "analyze.budget: is 'watts'. Valid: memory, time, flops, trainable."),
        (["analyze.budget={flops: 0.5}"], "analyze.budget: 0.5 alone is no limit; write a share"),
        (["analyze.num_examples=1"], "analyze.num_examples: is 1; it takes a whole number from 2 up"),
        (["analyze.exampels=1"], "analyze.exampels: unknown key."),
    ],
)  # fmt: skip
def test_budget_salf_and_analyze(words, beginning):
    """Oracle: the key, and the strategies that read it by docs/methods/."""
    assert told(None, "model=m", *words).startswith(f"command line: {beginning}")


def test_limits_are_told_with_their_lines(written):
    """Oracle: the lines, counted by hand."""
    text = "model: m\nfreeze:\n  strategy: budget\n  scores: s.json\n  budget: {flops: 1}\nanalyze:\n  budget: {time: 2h}\n"
    header, *lines = told(written(text)).splitlines()
    assert header == "2 mistakes:"
    assert "recipe.yaml:5: freeze.budget: 1 alone is no limit" in lines[0]
    assert "recipe.yaml:7: analyze.budget: time: '2h' is no limit" in lines[1]


def test_limits_are_read_as_they_are_written(written):
    recipe = load_recipe(None, ["model=m", *BUDGET, "freeze.budget.memory=40 GiB", "analyze.budget={time: -40%}"])
    assert recipe.freeze.budget == {"flops": "50%", "memory": "40 GiB"}
    assert recipe.analyze.budget == {"time": "-40%"}
    assert load_recipe(written(dump_yaml(recipe.model_dump(mode="json")))) == recipe


def test_a_misspelt_strategy_or_task_makes_no_key_unread(written):
    """What would be said of the default strategy and task is a consequence, not a second mistake."""
    message = told(written("model: m\ntask: snt\ndata: {packing: true}\nfreeze: {strategy: rankd, scores: x.json}"))
    header, *lines = message.splitlines()
    assert header == "2 mistakes:"
    assert "'sft'" in lines[0]
    assert "'ranked'" in lines[1]


@pytest.mark.parametrize(
    "words", [["task=sft", "data.packing=true"], ["freeze.strategy=interval", "freeze.offset=0"], []]
)
def test_a_resolved_recipe_is_read_again(words, written):
    """Oracle: the recipe itself; in its dump every key is given, most of them at their defaults."""
    recipe = load_recipe(None, ["model=m", *words])
    assert load_recipe(written(dump_yaml(recipe.model_dump(mode="json")))) == recipe


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_read(file):
    """A sequence of tasks makes recipes too, and so does a comparison."""
    read = {"continual": read_course, "compare_quick": read_grid}.get(file.stem, load_recipe)
    assert read(file)


def test_both_halves_of_the_quickstart_are_read():
    assert load_recipe(None, RECIPE).freeze.fraction == 0.75
    assert load_recipe(None, [*RECIPE, *FULL]).freeze.strategy == "full"


def test_recipes_are_immutable():
    recipe = load_recipe(None, ["model=m"])
    with pytest.raises(ValidationError):
        recipe.train.seed = 1


# -- paths ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A recipe in recipes/, a current folder here/, a file there/ alone and one that both folders have."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "here").mkdir()
    for name in ("recipes/mine.jsonl", "recipes/both.jsonl", "here/both.jsonl", "recipes/zero.json", "recipes/zero2"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "recipes" / "model").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "recipes"


def test_paths_count_from_here_then_from_the_recipe(beside):
    file = beside / "r.yaml"
    file.write_text(
        "model: ./model\ndata: {train: mine.jsonl, eval: both.jsonl}\nzero: zero.json\n"
        "freeze: {strategy: ranked, scores: mine.jsonl}\ntrain: {output_dir: model}\n"
    )
    recipe = load_recipe(file)
    assert Path(recipe.data.train) == beside / "mine.jsonl"
    assert recipe.data.eval == "both.jsonl"
    assert Path(recipe.zero) == beside / "zero.json"
    assert recipe.freeze.scores == beside / "mine.jsonl"
    assert Path(recipe.model.name).resolve() == beside / "model"
    assert recipe.train.output_dir == Path("model")


def test_names_stay_names(beside):
    """A bare model or ds_config name is never a file that happens to lie beside the recipe; hub ids pass untouched."""
    file = beside / "r.yaml"
    file.write_text("model: model\nzero: zero2\ndata: {train: 'glue/set:rte', eval: builtin:nli}\n")
    recipe = load_recipe(file)
    assert (recipe.model.name, recipe.zero) == ("model", "zero2")
    assert (recipe.data.train, recipe.data.eval) == ("glue/set:rte", "builtin:nli")


def test_overrides_count_from_here_alone_and_know_home(beside, monkeypatch):
    file = beside / "r.yaml"
    file.write_text("model: m\n")
    monkeypatch.setenv("HOME", str(beside))
    recipe = load_recipe(file, ["data.train=mine.jsonl", "data.eval=~/mine.jsonl", "train.output_dir=~/runs"])
    assert recipe.data.train == "mine.jsonl"
    assert Path(recipe.data.eval) == beside / "mine.jsonl"
    assert recipe.train.output_dir == beside / "runs"


# -- the whole space -----------------------------------------------------------------------------------------------

KEYS = [".".join(map(str, (*key, name))) for key, section in sections() for name in section.model_fields]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["no", "5e-5", "top", "zero2", "*", "&a", "1e3", "0o7", ".5", "null", "~", "-", "? x", "|"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
YAMLISH = st.text(alphabet="model:tasin \n\t-[]{}&*!|>'\"#%@`,?=~.0159e\\UxuÄ\x85\ufeff", max_size=60)
CASES = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@CASES
@given(content=st.one_of(st.binary(max_size=80), YAMLISH.map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(content=b'model: "\\UFFFFFFFF"')
@example(content=b'model: "\\U00110000"')
@example(content=b"%TAG ! tag:x,2000:\n---\nmodel: !a b")
def test_any_bytes_give_a_recipe_or_a_user_error(content, tmp_path):
    """Oracle: no other exception, ever."""
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(load_recipe(file), Recipe)


@CASES
@given(
    values=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6), words=st.lists(st.text(max_size=12), max_size=2)
)
def test_any_values_give_a_recipe_or_a_user_error(values, words, tmp_path):
    """Oracle: no other exception; a recipe that comes out is read again from what it dumps."""
    nested: dict = {}
    for key, value in values.items():
        *path, last = key.split(".")
        holder = nested
        for name in path:
            inner = holder.setdefault(name, {})
            holder = inner if isinstance(inner, dict) else holder
        holder[last] = value
    file = tmp_path / "r.yaml"
    file.write_bytes(dump_yaml(nested).encode("utf-8", "surrogatepass"))
    overrides = [f"{key}={value}" for key, value in list(values.items())[:2]]
    for given_words in ([], words, overrides):
        try:
            recipe = load_recipe(file, given_words)
        except UserError:
            continue
        file.write_text(dump_yaml(recipe.model_dump(mode="json")))
        assert load_recipe(file) == recipe


TEXT = st.text(st.characters(codec="utf-8"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
)


@CASES
@given(value=PLAIN)
@example("5e-5")
@example("0o7")
@example("no")
@example("\x85\u2028")
def test_what_is_dumped_is_read_back(value):
    """Oracle: the value itself. PyYAML's own dumper writes the text '5e-5' without quotes."""
    assert parse_yaml(dump_yaml({"key": value}).encode(), "x").values["key"] == value


# -- the reference -------------------------------------------------------------------------------------------------


def test_the_reference_page_is_up_to_date():
    """Oracle: the models. Mend with `python -m dsfreeze.recipe_reference > docs/recipe.md`."""
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == recipe_reference()


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHOWN = [
    line
    for page in PAGES
    for line in page.read_text(encoding="utf-8").splitlines()
    if re.match("dsfreeze [a-z]+ ", line)
]


@pytest.mark.parametrize("line", [line for line in SHOWN if "=" in line.partition("#")[0]])
def test_overrides_that_the_pages_show_are_read(line):
    """Oracle: the reader."""
    words = [word for word in shlex.split(line, comments=True) if "=" in word]
    assert words
    if line.startswith("dsfreeze continual "):
        read_course(ROOT / "recipes/continual.yaml", words)
    elif line.startswith("dsfreeze compare "):
        read_grid(ROOT / "recipes/compare_quick.yaml", words)
    else:
        load_recipe(None, ["model=minilm-l6", *words])


@pytest.mark.skipif(recipe_yaml._Quick is None, reason="this PyYAML has no libyaml")
@settings(max_examples=100, deadline=None, database=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters(max_codepoint=126)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab#:-. '", max_size=5), inner, max_size=3),
        max_leaves=12,
    )
)
@example("- a")
@example("x " * 100)
@example(["no", "on", "12:30", "2024-01-01", "1_000", "0x1f", "~", 5e-5])
@example({"a": [], "b": [{}], "c": "line\nline\n"})
def test_libyaml_reads_what_pyyaml_reads(value):
    """Oracle: PyYAML's own parser: values, the lines of keys and mistakes are the same."""
    content = dump_yaml({"key": value, "after": 1}).encode()
    quick = parse_yaml(content, "x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe_yaml, "_Quick", None)
        assert parse_yaml(content, "x") == quick


@pytest.mark.parametrize(
    "content", ["- " * 5000 + "a", "[" * 5000, "a:\n" + "".join(" " * n + "a:\n" for n in range(1, 700))]
)
def test_nesting_without_end_is_a_mistake(content):
    """Oracle: no other exception, whichever parser reads it."""
    with pytest.raises(UserError):
        parse_yaml(f"key: 1\nmore:\n  {content}".encode(), "x")


def test_the_metrics_are_listed():
    """Oracle: the METRICS that an evaluation knows."""
    listed = DataOptions.model_fields["metrics"].description.partition("Of: ")[2]
    assert listed.rstrip(".").replace("\n", " ").split(", ") == list(METRICS)


def test_every_key_is_documented():
    for key, section in sections():
        for name, info in section.model_fields.items():
            assert info.description, (*key, name)
            assert f"| `{name}` |" in recipe_reference()


def test_reading_is_quick(written):
    """A thousand unknown keys are one error, in well under the time a person waits."""
    began = time.perf_counter()
    message = told(written("model: m\n" + "".join(f"key{i}: 1\n" for i in range(1000))))
    assert message.startswith("1000 mistakes")
    assert time.perf_counter() - began < 20


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission(written):
    file = written("model: m")
    file.chmod(0)
    assert "Cannot read" in told(file)
