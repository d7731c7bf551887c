"""Sequences of tasks on a tiny model. Oracles: separate calls of train and evaluate, an uninterrupted run, files written by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from continual_kit import LABELS, TRAIN, rows_of, sequence, task_of, write_lines
from marks import some_fast
from rich.console import Console
from safetensors.torch import load_file, save_file

from dsfreeze.commands import evaluate_recipe
from dsfreeze.continual import measuring, rounds, weights
from dsfreeze.continual.reading import read_course
from dsfreeze.continual.results import read_results
from dsfreeze.errors import UserError
from dsfreeze.loop import Run, train
from dsfreeze.recipe import Recipe

QUIET = Console(quiet=True)


def run(path: Path, *words: str) -> dict[str, Any]:
    return rounds.run_course(read_course(path, words), QUIET)


def scores(state: dict[str, Any], key: str) -> list[dict[str, float]]:
    return [row["scores"] for row in state["runs"][key]["rounds"]]


def by_hand(folder: Path, model: str, name: str | None, **train_options: Any) -> Recipe:
    """A recipe of a task written out here (None: the probe's), its data as prompts and completions."""
    values = {"model": model, "zero": "local", "task": "sft" if name else "causal_lm", "freeze": {"strategy": "full"}}
    data: dict[str, Any] = {
        "max_length": 64,
        "train": None,
        "eval": str(folder / "cat.jsonl"),
        "metrics": ["perplexity"],
    }
    if name:
        for role, count in (("train", 12), ("eval", 4)):
            pairs = [
                {"prompt": f"{name}: {row['text']}", "completion": row["label"]} for row in rows_of(name, role, count)
            ]
            data[role] = write_lines(folder / f"hand_{name}_{role}.jsonl", pairs)
    options = {**TRAIN, "seed": 7, "eval_strategy": "no", **train_options}
    return Recipe.model_validate({**values, "data": data, "train": options})


def test_the_matrix_is_that_of_separate_calls(tmp_path: Path) -> None:
    """Train on one, two, three in turn and evaluate everything after each: the same numbers to the last bit."""
    state = run(sequence(tmp_path))
    model, expected = str(tmp_path / "model"), []
    for number, name in enumerate((None, *LABELS)):
        if name is not None:
            out = tmp_path / "hand" / str(number)
            model = train(by_hand(tmp_path, model, name, output_dir=str(out)), QUIET)["model"]
        found = {each or "cat": evaluate_recipe(by_hand(tmp_path, model, each)) for each in (*LABELS, None)}
        expected.append({each: 100 / numbers["perplexity"] for each, numbers in found.items()})
    assert state["start"]["scores"] == expected[0]
    assert scores(state, "full/seed-7") == expected[1:]
    assert len({json.dumps(row) for row in expected}) == 4  # every round has changed something
    assert read_results(tmp_path / "out" / "results.json") == state
    numbers, last = state["summary"]["full"], expected[3]
    assert numbers["op"]["mean"] == pytest.approx(sum(last[name] for name in LABELS) / 3)
    assert numbers["bwt"]["mean"] == pytest.approx(
        (last["one"] - expected[1]["one"] + last["two"] - expected[2]["two"]) / 2
    )
    assert numbers["general_ability"]["mean"] == last["cat"]
    row = state["runs"]["full/seed-7"]["rounds"][-1]
    assert (row["steps"], row["trainable_share"], row["task"]) == (2, 1.0, "three")


def test_the_update_norm_is_the_distance_of_the_files(tmp_path: Path) -> None:
    state = run(sequence(tmp_path, "one", "two"))
    start, end = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "model", tmp_path / "out/runs/full/seed-7/round-2/model")
    )
    squares = sum(float((end[name].double() - start[name].double()).square().sum()) for name in start)
    assert state["runs"]["full/seed-7"]["rounds"][1]["update_norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)


class Killed(BaseException):
    """Nobody catches it, as nobody catches SIGKILL."""


@pytest.mark.parametrize("when", some_fast(["second step", "first step", "evaluation"]))
def test_a_killed_sequence_goes_on_to_the_same_matrix(tmp_path: Path, monkeypatch: Any, when: str) -> None:
    """Killed in round 3: before its first checkpoint, after it, and after its training."""
    expected = run(sequence(tmp_path, train={"save_steps": 1}), f"output_dir={tmp_path / 'whole'}")
    path, trained = sequence(tmp_path, train={"save_steps": 1}), []
    one_step, measured = Run._one_step, rounds.Rounds._measured

    def step(self: Any, *rest: Any) -> None:
        last = {"first step": 0, "second step": 1}.get(when)
        if "round-3" in str(self.job.output_dir) and self.step == last:
            raise Killed
        one_step(self, *rest)

    def measure(self: Any, model: str, *rest: Any) -> Any:
        if when == "evaluation" and "round-3" in model:
            raise Killed
        return measured(self, model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_one_step", step)
        patch.setattr(rounds.Rounds, "_measured", measure)
        with pytest.raises(Killed):
            run(path)
    assert len(read_results(tmp_path / "out" / "results.json")["runs"]["full/seed-7"]["rounds"]) == 2

    def counted(self: Any, *rest: Any) -> None:
        trained.append((Path(self.job.output_dir).name, self.step))
        one_step(self, *rest)

    monkeypatch.setattr(Run, "_one_step", counted)
    state = run(path)
    assert scores(state, "full/seed-7") == scores(expected, "full/seed-7")
    left = {"first step": [0, 1], "second step": [1], "evaluation": []}[when]
    assert trained == [("round-3", step) for step in left]


def test_a_finished_sequence_does_nothing_and_another_one_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    path = sequence(tmp_path, "one", "two")
    state = run(path)
    with monkeypatch.context() as patch:
        patch.setattr(rounds, "train", None)
        patch.setattr(measuring, "evaluate", None)
        assert run(path)["runs"] == state["runs"]
    with pytest.raises(UserError, match=r"What differs: train.learning_rate \(0.01 there, 0.02 here\)"):
        run(path, "train.learning_rate=0.02")
    with pytest.raises(UserError, match=r"differs: methods.full.train.max_steps \(null there, 1 here\)"):
        run(path, "methods=[{name: full, train: {max_steps: 1}}]")
    write_lines(tmp_path / "two_eval.jsonl", rows_of("two", "eval", 3))
    with pytest.raises(UserError, match="What differs: the rows of 'two'"):
        run(path)


def test_a_method_can_be_added_later(tmp_path: Path) -> None:
    path = sequence(tmp_path, "one", "two")
    first = run(path)
    second = run(path, "methods=[full, bottom]", "seeds=[7, 8]")
    assert list(second["runs"]) == ["full/seed-7", "full/seed-8", "bottom/seed-7", "bottom/seed-8"]
    assert second["runs"]["full/seed-7"] == first["runs"]["full/seed-7"]
    assert second["summary"]["full"]["op"]["over_seeds"] is not None


def test_models_are_dropped_but_the_last(tmp_path: Path) -> None:
    run(sequence(tmp_path))
    folder = tmp_path / "out/runs/full/seed-7"
    assert [path.parent.name for path in sorted(folder.glob("*/model"))] == ["round-3"]
    assert not list(folder.glob("*/checkpoint-*"))
    run(sequence(tmp_path, keep_models=True), f"output_dir={tmp_path / 'kept'}")
    assert len(list((tmp_path / "kept/runs/full/seed-7").glob("*/model"))) == 3


def test_replay_mixes_a_sample_that_stays(tmp_path: Path, monkeypatch: Any) -> None:
    """A quarter of 12 rows of each earlier task, beside the own ones; the first of the file where that is asked for."""
    seen: dict[str, list[str]] = {}

    def keep(recipe: Recipe, console: Any) -> dict[str, Any]:
        lines = Path(str(recipe.data.train)).read_text(encoding="utf-8").splitlines()
        seen[Path(recipe.train.output_dir).name] = [json.loads(line)["prompt"][0]["content"] for line in lines]
        return train(recipe, console)

    monkeypatch.setattr(rounds, "train", keep)
    run(sequence(tmp_path, methods=["replay"], replay={"ratio": 0.25}))
    own = {name: [f"{name}: {row['text']}" for row in rows_of(name, "train", 12)] for name in LABELS}
    assert seen["round-1"] == own["one"]
    assert seen["round-2"][:12] == own["two"]
    replayed = seen["round-2"][12:]
    assert len(replayed) == 3
    assert set(replayed) < set(own["one"])
    assert seen["round-3"] == [*own["three"], *replayed, *seen["round-3"][15:]]
    assert len(seen["round-3"]) == 18
    run(
        sequence(tmp_path, "one", "two", methods=["replay"], replay={"ratio": 0.25, "choose": "first"}),
        f"output_dir={tmp_path / 'first'}",
    )
    assert seen["round-2"] == [*own["two"], *own["one"][:3]]


def test_the_bounds(tmp_path: Path, monkeypatch: Any) -> None:
    """Multitask: one round on all rows, as many steps as all tasks together, or each row as often as its task has epochs. Single
    tasks: each from the start model, the first being full tuning's first round."""
    seen: list[Recipe] = []

    def keep(recipe: Recipe, console: Any) -> dict[str, Any]:
        seen.append(recipe)
        return train(recipe, console)

    monkeypatch.setattr(rounds, "train", keep)
    state = run(sequence(tmp_path, "one", "two", methods=["full", "multitask", "single_task"]))
    pooled, alone = seen[2], seen[4]
    assert (pooled.train.max_steps, pooled.model.name, alone.model.name) == (
        4,
        str(tmp_path / "model"),
        str(tmp_path / "model"),
    )
    (row,) = state["runs"]["multitask/seed-7"]["rounds"]
    assert (row["round"], row["task"], row["steps"]) == (2, "all", 4)
    assert state["summary"]["multitask"]["bwt"] is None
    assert state["summary"]["multitask"]["op"]["mean"] == pytest.approx(
        (row["scores"]["one"] + row["scores"]["two"]) / 2
    )
    single, full = scores(state, "single_task/seed-7"), scores(state, "full/seed-7")
    assert [list(row) for row in single] == [["one"], ["two"]]
    assert single[0]["one"] == full[0]["one"]
    assert single[1]["two"] != full[1]["two"]
    tasks = [
        task_of(tmp_path, name, train={"max_steps": -1, "num_train_epochs": n}) for name, n in (("one", 1), ("two", 2))
    ]
    state = run(sequence(tmp_path, tasks=tasks, methods=["multitask"]), f"output_dir={tmp_path / 'epochs'}")
    assert state["runs"]["multitask/seed-7"]["rounds"][0]["steps"] == (12 + 2 * 12) // 4


def test_draws_seed_what_is_drawn(tmp_path: Path) -> None:
    """A random set, redrawn: other digests; a method that draws nothing has one run."""
    state = run(
        sequence(
            tmp_path,
            "one",
            methods=["full", {"name": "two_of", "method": "random", "freeze": {"granularity": "matrix"}}],
            draws=[0, 1],
        )
    )
    assert list(state["runs"]) == ["full/seed-7", "two_of/seed-7-draw-0", "two_of/seed-7-draw-1"]
    digests = {run["rounds"][0]["plan_digest"] for run in state["runs"].values()}
    assert len(digests) == 3
    assert state["summary"]["two_of"]["op"]["over_draws"] is not None
    assert state["summary"]["two_of"]["op"]["over_seeds"] is None


def test_models_made_of_full_tunings(tmp_path: Path, monkeypatch: Any) -> None:
    """WiSE-FT's curve has the start model and full tuning at its ends; a soup's first model is full tuning's first. The arithmetic
    is stood in for here."""

    def mix(shares: list[tuple[Path, float]], out: Path) -> None:
        tensors = [(load_file(folder / "model.safetensors"), share) for folder, share in shares]
        out.mkdir()
        for file in (shares[-1][0]).glob("*.json"):
            (out / file.name).write_bytes(file.read_bytes())
        mixed = {name: sum((each[name] * share for each, share in tensors), torch.zeros(())) for name in tensors[0][0]}
        save_file(mixed, out / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(
        weights, "interpolated", lambda one, other, alpha, out: mix([(one, 1 - alpha), (other, alpha)], out)
    )
    monkeypatch.setattr(
        weights, "averaged", lambda folders, out: mix([(each, 1 / len(folders)) for each in folders], out)
    )
    methods = ["full", {"name": "wise_ft", "alphas": [0, 0.5, 1]}, "soup"]
    state = run(sequence(tmp_path, "one", "two", methods=methods))
    full, start = scores(state, "full/seed-7"), state["start"]["scores"]
    assert scores(state, "wise_ft@0/seed-7") == [start, start]
    assert scores(state, "wise_ft@1/seed-7") == full
    first, last = scores(state, "wise_ft@0.5/seed-7")
    assert (list(first), list(last)) == (["one"], ["one", "two", "cat"])
    norms = [state["summary"][f"wise_ft@{alpha}"]["update_norm"]["mean"] for alpha in ("0", "0.5", "1")]
    assert norms == pytest.approx([0, norms[2] / 2, norms[2]], rel=1e-5)
    assert scores(state, "soup/seed-7")[0] == full[0]
    assert scores(state, "soup/seed-7")[1] != full[1]
    assert not list((tmp_path / "out/runs").glob("wise_ft*/*/*/model"))
    with pytest.raises(
        UserError, match="soup2 is made of the models that full left after each round, and that of round 1"
    ):
        run(sequence(tmp_path, "one", "two", methods=[*methods, {"name": "soup2", "method": "soup"}]))


def test_the_length_of_answers_is_taken_from_the_data(tmp_path: Path, monkeypatch: Any) -> None:
    """`blue` and the mark that ends it are five tokens of a byte tokenizer, and the line's end one more."""
    lengths = []

    def keep(engine: Any, data: Any, recipe: Recipe) -> dict[str, float]:
        lengths.append(recipe.data.max_new_tokens)
        return {"exact_match": 0.0, "loss": 1.0}

    monkeypatch.setattr(measuring, "evaluate", keep)
    task = task_of(tmp_path, "two", metric="exact_match")
    run(sequence(tmp_path, tasks=[task], probes=[]))
    given = {**task, "name": "given", "data": {**task["data"], "max_new_tokens": 3}}
    run(sequence(tmp_path, tasks=[given], probes=[]), f"output_dir={tmp_path / 'given'}")
    assert lengths == [6, 6, 3, 3]
