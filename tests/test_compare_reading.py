"""Reading a comparison. Oracles: the messages that a user is meant to see, and recipes written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsfreeze.compare.reading import Cell, Group, read_grid
from dsfreeze.errors import UserError
from dsfreeze.recipe_yaml import dump_yaml

TASKS = [
    {"name": name, "data": {"train": f"{name}.jsonl", "eval": f"{name}_test.jsonl"}} for name in ("one", "two")
]  # fmt: skip
BASE = {"models": ["minilm-l6"], "zero": "local", "tasks": TASKS, "methods": ["full", "random"]}


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def reading(*words: str, **changes: Any) -> Any:
        path = tmp_path / "grid.yaml"
        for name in ("a", "one", "one_test", "two", "two_test"):
            (tmp_path / f"{name}.jsonl").touch()
        path.write_text(dump_yaml({k: v for k, v in {**BASE, **changes}.items() if v is not ...}), encoding="utf-8")
        return read_grid(path, words)

    return reading


def changed(index: int, **more: Any) -> list[dict[str, Any]]:
    return [{**task, **more} if n == index else task for n, task in enumerate(TASKS)]


@pytest.mark.parametrize(("changes", "message"), [
    ({"models": ...}, "models is missing. Names, hub ids or folders"),
    ({"modles": ["m"]}, r"grid.yaml:\d+: modles is an unknown key. Did you mean 'models'"),
    ({"protocol": "papers"}, r"protocol is 'papers'. Did you mean 'paper'"),
    ({"methods": ["ful"]}, r"grid.yaml:\d+: methods\[0\] method 'ful' does not exist. Did you mean 'full'"),
    ({"tasks": changed(1, metric="acuracy")}, r"grid.yaml:\d+: tasks\[1\].metric: 'acuracy' does not exist. Did you mean 'accuracy'"),
    ({"tasks": changed(1, metric="bleu")}, "'bleu' is not for this task"),
    ({"tasks": changed(1, data={"train": "a.jsonl"})}, r"grid.yaml:\d+: task 'two' has no data.eval: name what to measure it on"),
    ({"tasks": changed(1, data={"train": "two.jsonl", "eval": "two_tests.jsonl"})},
     r"grid.yaml:\d+: task 'two', data.eval: no file .*two_tests.jsonl. Did you mean 'two_test.jsonl'"),
    ({"tasks": changed(1, train={"max_step": 3})}, r"grid.yaml:\d+: train.max_step: unknown key. Did you mean 'max_steps'"),
    ({"tasks": changed(1, task="clasification")}, "Did you mean 'classification'"),
    ({"train": {"seed": 3}}, "train.seed: the comparison sets it; write seeds"),
    ({"data": {"max_train_examples": 3}}, "data.max_train_examples: the comparison sets it; write sizes"),
    ({"methods": [{"name": "full", "freeze": {"seed": 3}}]}, r"methods\[0\].freeze.seed: the comparison sets it; write seeds"),
    ({"methods": [{"name": "bottom50", "freeze": {"fracton": 3}}]}, r"freeze.fracton: unknown key. Did you mean 'fraction'"),
    ({"methods": [{"name": "mine", "freeze": {"strategy": "botom"}}]}, "Did you mean 'bottom'"),
    ({"train": {"early_stopping_patience": 3}}, "train.early_stopping_patience: needs data.held_out"),
    ({"zero": "zero9"}, "zero9"),
])  # fmt: skip
def test_mistakes(read: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(**changes)


def test_all_mistakes_of_all_recipes_at_once(read: Any) -> None:
    """Each once, though every method has it."""
    with pytest.raises(UserError) as error:
        read(tasks=changed(1, train={"max_step": 3}, metric="bleu"), data={"max_lenght": 3}, train={"output_dir": "x"})
    lines = str(error.value).splitlines()
    assert lines[0] == "4 mistakes:"
    for told in ("train.max_step", "tasks[1].metric", "data.max_lenght", "train.output_dir"):
        assert sum(told in line for line in lines[1:]) == 1


def test_overrides(read: Any) -> None:
    grid = read("tasks.two.train.max_steps=5", "seeds=[1, 2]", "methods=[full]", "output_dir=elsewhere")
    assert [cell.key for cell in grid.cells] == [
        f"minilm-l6/{task}/full/size-all/seed-{seed}" for task in ("one", "two") for seed in (1, 2)
    ]
    recipes = [grid.recipe(group, 1) for group in grid.groups]
    assert [recipe.train.max_steps for recipe in recipes] == [100, 5]
    assert recipes[0].train.output_dir == Path("elsewhere/runs/minilm-l6/one/full/size-all/seed-1")
    with pytest.raises(UserError, match="there is no 'three' in tasks"):
        read("tasks.three.train.max_steps=5")


def test_who_overrides_whom(read: Any) -> None:
    """The protocol below the file below the model below the task below the method; sizes take the place of the protocol's cap."""
    methods = [
        {"name": "slow", "method": "bottom50", "freeze": {"fraction": 0.25}, "train": {"learning_rate": 1e-6}},
        "random",
    ]
    grid = read(
        methods=methods, train={"max_steps": 7, "weight_decay": 0.1}, sizes=["all", 40],
        models=[{"name": "mini", "model": "minilm-l6", "train": {"max_steps": 8, "warmup_steps": 1}}],
        tasks=changed(1, train={"max_steps": 9}, metric="f1"),
    )  # fmt: skip
    one, two = grid.spec.tasks
    (model,), (slow, random) = grid.spec.models, grid.spec.methods
    first, second = grid.recipe(Group(model, one, slow), 3), grid.recipe(Group(model, two, random, 40), 5)
    assert (first.model.name, first.task, first.zero) == ("minilm-l6", "classification", "local")
    assert (first.train.max_steps, second.train.max_steps) == (8, 9)
    assert (first.train.weight_decay, first.train.warmup_steps, first.train.per_device_train_batch_size) == (0.1, 1, 32)
    assert (first.train.learning_rate, second.train.learning_rate) == (1e-6, 5e-5)
    assert (first.freeze.strategy, first.freeze.fraction, first.freeze.seed) == ("bottom", 0.25, 42)
    assert (second.freeze.strategy, second.freeze.seed, second.train.seed) == ("random", 5, 5)
    assert (first.data.max_train_examples, second.data.max_train_examples) == (3200, 40)
    assert (first.data.metrics, second.data.metrics) == (None, ["f1"])
    assert (grid.metric_of(one), grid.metric_of(two)) == ("accuracy", "f1")
    assert not first.train.export
    assert Cell(Group(model, two, random, 40), 5).key == "mini/two/random/size-40/seed-5"


def test_what_measures_a_task_that_names_no_metric(read: Any) -> None:
    """The first number of an evaluation of its kind."""
    tasks = changed(1, data={**TASKS[1]["data"], "num_labels": 1})
    grid = read(tasks=[*tasks, {**TASKS[0], "name": "tags", "task": "tokens"}])
    assert [grid.metric_of(task) for task in grid.spec.tasks] == ["accuracy", "pearson", "entity_f1"]


def test_converged_looks_at_rows_of_the_training_data(read: Any) -> None:
    recipe = read(protocol="converged").recipe(read(protocol="converged").groups[0], 1)
    assert (recipe.data.held_out, recipe.train.early_stopping_patience, recipe.train.eval_strategy) == (0.1, 3, "epoch")
    assert recipe.train.max_steps == -1


def test_prefix_caches_are_shared(read: Any) -> None:
    grid = read(prefix_cache="disk", output_dir="out")
    found = {(r.freeze.prefix_cache, str(r.freeze.prefix_cache_dir)) for r in (grid.recipe(g, 1) for g in grid.groups)}
    assert found == {("disk", "out/prefix")}
