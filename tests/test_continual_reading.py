"""Reading a sequence of tasks. Oracles: the messages that a user is meant to see, and recipes written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsfreeze.continual.methods import METHODS
from dsfreeze.continual.reading import read_course
from dsfreeze.continual.spec import Spec, fields_of
from dsfreeze.errors import UserError
from dsfreeze.recipe import RetainOptions, Strategy
from dsfreeze.recipe_reference import choices_of
from dsfreeze.recipe_yaml import dump_yaml

TASKS = [
    {"name": name, "data": {"train": f"{name}.jsonl", "eval": f"{name}_test.jsonl"}, "prompt": "{text}", "answer": "{label}"}
    for name in ("one", "two", "three")
]  # fmt: skip
BASE = {"model": "smollm2-135m", "zero": "local", "tasks": TASKS, "methods": ["full"]}


@pytest.fixture
def written(tmp_path: Path) -> Any:
    def write(**changes: Any) -> Path:
        values = {**BASE, **changes}
        path = tmp_path / "tasks.yaml"
        path.write_text(dump_yaml({k: v for k, v in values.items() if v is not ...}), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read(written: Any) -> Any:
    return lambda *words, **changes: read_course(written(**changes), words)


def changed(index: int, **more: Any) -> list[dict[str, Any]]:
    return [{**task, **more} if n == index else task for n, task in enumerate(TASKS)]


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": ...}, "tasks is missing. The tasks, in the order of training"),
    ({"tasks": []}, r"tasks is \[\]"),
    ({"methods": ...}, "methods is missing"),
    ({"model": ...}, "model is missing"),
    ({"modle": "m"}, r"tasks.yaml:\d+: modle is an unknown key. Did you mean 'model'"),
    ({"tasks": changed(1, promt="x")}, r"tasks.yaml:\d+: tasks\[1\].promt is an unknown key. Did you mean 'prompt'"),
    ({"tasks": changed(1, answer=None)}, "'two' has a prompt or an answer alone"),
    ({"tasks": changed(1, prompt="{}")}, "write columns as {column}"),
    ({"tasks": changed(1, prompt="{text.upper}")}, "write columns as {column}"),
    ({"tasks": changed(1, prompt="{text")}, "expected '}'"),
    ({"tasks": changed(1, name="one")}, "tasks: the name 'one' is given twice"),
    ({"tasks": changed(1, name="../up")}, "names a folder too"),
    ({"tasks": changed(1, data={"train": "a.jsonl"})}, r"tasks.yaml:\d+: task 'two' has no data.eval"),
    ({"tasks": changed(1, data={"eval": "a.jsonl"})}, r"task 'two' has no data.train"),
    ({"tasks": changed(1, metric="exact_mach")}, r"tasks.yaml:\d+: tasks\[1\].metric: 'exact_mach' does not exist. Did you mean 'exact_match'"),
    ({"tasks": changed(1, metric="accuracy")}, "'accuracy' is not for this task"),
    ({"tasks": changed(1, task="sfd")}, "Did you mean 'sft'"),
    ({"tasks": changed(1, train={"max_step": 3})}, r"tasks.yaml:\d+: train.max_step: unknown key. Did you mean 'max_steps'"),
    ({"tasks": changed(1, task="classification")}, "'two' is of task classification, whose model cannot do the others"),
    ({"task": "classification", "data": {"text": "text"}}, "data.labels: tasks that share a head have the same classes"),
    ({"train": {"learning_rate": -1}}, r"tasks.yaml:\d+: train.learning_rate: is -1; it takes a number above 0"),
    ({"train": {"seed": 3}}, "train.seed: the sequence sets it; write seeds"),
    ({"tasks": changed(2, train={"output_dir": "x"})}, r"tasks\[2\].train.output_dir: the sequence sets it; write output_dir"),
    ({"probes": [{"name": "p"}]}, r"tasks.yaml:\d+: probe 'p' has no data.eval: name what to measure it on"),
    ({"probes": [{"name": "one", "data": {"eval": "e"}}]}, "tasks and probes: the name 'one' is given twice"),
    ({"methods": ["ful"]}, r"tasks.yaml:\d+: methods\[0\] method 'ful' does not exist. Did you mean 'full'"),
    ({"methods": ["full", "full"]}, "methods: the name 'full' is given twice"),
    ({"methods": ["bottom", "soup"]}, "method 'soup' is made of the models that full leaves; add full to methods"),
    ({"methods": [{"name": "full", "alphas": [0.5]}]}, "alphas are wise_ft's"),
    ({"methods": ["full", {"name": "wise_ft", "train": {"max_steps": 1}}]}, "trains nothing"),
    ({"methods": [{"name": "b", "method": "bottom", "freeze": {"fracton": 0.1}}]}, r"freeze.fracton: unknown key. Did you mean 'fraction'"),
    ({"methods": [{"name": "full", "freeze": {"seed": 1}}]}, "freeze.seed: the sequence sets it; write draws"),
    ({"order": ["one", "two", "tree"]}, "order names 'tree', which is no task. Did you mean 'three'"),
    ({"order": ["one", "two"]}, "order is to name every task once"),
    ({"order": ["one", "two", "three"], "permutation_seed": 1}, "keep one"),
    ({"seeds": []}, r"seeds is \[\]"),
    ({"replay": {"ratio": 2}}, "replay.ratio is 2"),
    ({"bwt": "N"}, "bwt is 'N'.* Valid: T-1, T"),
    ({"suite": "trace", "tasks": ...}, "suite trace needs `folder:`"),
    ({"suite": "tracé"}, "Did you mean 'trace'"),
    ({"zero": "zero9"}, "zero9"),
])  # fmt: skip
def test_mistakes(read: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_all_mistakes_of_all_recipes_at_once(read: Any) -> None:
    """Each once, though every method has it, in the file's order."""
    tasks = changed(2, train={"max_step": 3})
    with pytest.raises(UserError) as error:
        read(tasks=tasks, methods=["full", "bottom"], data={"max_lenght": 3}, probes=[{"name": "p"}])
    lines = str(error.value).splitlines()
    assert lines[0] == "3 mistakes:"
    assert [line.split(": ")[1].split()[0] for line in lines[1:]] == ["train.max_step", "data.max_lenght", "probe"]


@pytest.mark.parametrize(("word", "message"), [
    ("tasks.four.train.max_steps=3", "there is no 'four' in tasks"),
    ("tasks.tow.train.max_steps=3", "Did you mean 'two'"),
    ("tasks.7.train.max_steps=3", "there is no '7' in tasks"),
    ("model.name.x=3", "there is no 'name' in model"),
    ("train", "'train' is no override"),
    ("seeds=[1", "seeds: not YAML"),
    ("train.max_step=3", "command line: train.max_step: unknown key"),
])  # fmt: skip
def test_mistakes_of_overrides(read: Any, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(word)


def test_overrides(read: Any) -> None:
    course = read(
        "train.max_steps=3",
        "tasks.two.train.max_steps=5",
        "tasks.0.data.max_length=9",
        "seeds=[1, 2]",
        "methods=[full, bottom]",
    )
    steps = [course.round_recipe(task, course.spec.methods[0], seed=1).train.max_steps for task in course.spec.tasks]
    assert steps == [3, 5, 3]
    assert course.measure_recipe(course.spec.tasks[0]).data.max_length == 9
    assert course.spec.seeds == [1, 2]
    assert [method.name for method in course.spec.methods] == ["full", "bottom"]


def test_orders(read: Any) -> None:
    assert [t.name for t in read(order=["two", "three", "one"]).spec.sequence] == ["two", "three", "one"]
    shuffled = [[t.name for t in read(permutation_seed=seed).spec.sequence] for seed in range(8)]
    assert all(sorted(each) == ["one", "three", "two"] for each in shuffled)
    assert len(set(map(tuple, shuffled))) > 2
    assert shuffled == [[t.name for t in read(permutation_seed=seed).spec.sequence] for seed in range(8)]


def test_who_overrides_whom(read: Any) -> None:
    """The sequence below the task below the method; a strategy that a method names takes the place of the sequence's freeze."""
    methods = [
        {"name": "replay"}, {"name": "slow", "method": "lower_lr", "train": {"max_steps": 8}}, {"name": "short", "method": "early_stop"},
        {"name": "top", "freeze": {"fraction": 0.25}}, {"name": "full"},
    ]  # fmt: skip
    course = read(
        methods=methods, freeze={"strategy": "random", "fraction": 0.75}, train={"learning_rate": 1e-3, "max_steps": 4},
        tasks=changed(1, train={"max_steps": 6, "weight_decay": 0.1}),
    )  # fmt: skip
    two = course.spec.tasks[1]
    replay, slow, short, top, full = (course.round_recipe(two, each, 2, 11, 5) for each in course.spec.methods)
    assert (replay.freeze.strategy, replay.freeze.fraction, replay.freeze.seed) == ("random", 0.75, 5)
    assert (replay.train.max_steps, replay.train.weight_decay, replay.train.seed) == (6, 0.1, 11)
    assert (slow.train.learning_rate, slow.train.max_steps) == (5e-4, 8)
    assert (short.train.learning_rate, short.train.max_steps) == (1e-3, 3)
    assert (top.freeze.strategy, top.freeze.fraction) == ("top", 0.25)
    assert (full.freeze.strategy, full.freeze.fraction) == ("full", None)
    assert [course.draws(each) for each in course.spec.methods] == [True, True, True, False, False]
    assert all(each.train.eval_strategy == "no" for each in (replay, slow, short, top, full))


def test_paths_count_from_the_file_where_they_are_not_here(read: Any, tmp_path: Path) -> None:
    (tmp_path / "one_test.jsonl").write_text("{}\n")
    course = read()
    assert course.measure_recipe(course.spec.tasks[0]).data.eval == str(tmp_path / "one_test.jsonl")


def test_every_method_is_one_of_what_recipes_know(read: Any) -> None:
    """Oracle: the strategies and retaining methods of recipes. A method whose strategy is not there yet is told as a mistake of its
    key; all others make recipes."""
    strategies = choices_of(Strategy)
    retained = choices_of(RetainOptions.model_fields["method"].annotation)
    for name, method in METHODS.items():
        freezing, retaining = (method.changes.get(section, {}) for section in ("freeze", "retain"))
        known = freezing.get("strategy", "full") in strategies and retaining.get("method", "none") in retained
        if name == "salf":  # needs freeze.scores
            continue
        if known:
            read(methods=["full", name] if name != "full" else [name])
        else:
            with pytest.raises(UserError, match=r"strategy|method"):
                read(methods=["full", name])


def test_templates() -> None:
    assert fields_of("{a} and {b c}, {a} {{not}}") == ("a", "b c")


def test_a_resolved_sequence_reads_back_as_itself(read: Any) -> None:
    spec = read(methods=["full", {"name": "gentle", "method": "lower_lr"}], seeds=3).spec
    assert Spec.model_validate(spec.model_dump(mode="json")) == spec
