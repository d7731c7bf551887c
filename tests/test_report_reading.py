"""Records gathered for a report. Oracles: the numbers that the records were written with; which file a message names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_kit import cell, comparison_of, run_of, sequence_of

from dsfreeze.errors import UserError
from dsfreeze.report.reading import gather
from dsfreeze.report.row import headline
from dsfreeze.report.setups import setups_of, spread


def test_a_run_is_a_row_of_its_records_numbers(tmp_path: Path) -> None:
    run = gather([run_of(tmp_path / "one")]).runs[0]
    assert (run.name, run.state, run.reason) == ("one", "done", "")
    assert (run.steps, run.loss, run.seconds, run.seconds_per_step) == (3, 0.5, 1.5, 0.5)
    assert (run.metric, run.score) == ("accuracy", 75.0)
    assert (run.trainable, run.total, run.flops_ratio, run.peak_bytes) == (25, 100, 0.4, 2**31)
    assert run.losses == ((1, 2.0), (2, 1.0), (3, 0.5))
    assert run.environment["versions"]["torch"] == "2.13.0"


def test_runs_are_found_at_any_depth_once_and_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    run_of(tmp_path / "a" / "x")
    run_of(tmp_path / "b" / "deep" / "y")
    run_of(tmp_path / "a" / "x" / "model" / "inside")  # what lies in a record belongs to it
    run_of(tmp_path / ".trash" / "z")
    gathered = gather([tmp_path, tmp_path / "a", tmp_path / "a" / "x"])
    assert [run.name for run in gathered.runs] == ["a/x", "b/deep/y"]


@pytest.mark.parametrize(
    ("half", "reason"),
    [
        (lambda f: (f / "summary.json").unlink(), "no summary.json; 3 of 3 steps done"),
        (lambda f: (f / "summary.json").write_text('{"steps": 3, "lo'), "summary.json is half written"),
        (lambda f: (f / "summary.json").write_text(""), "summary.json is half written"),
        (lambda f: (f / "plan.json").unlink(), "stopped before plan.json was written"),
        (lambda f: (f / "plan.json").write_text('{"strategy"'), "plan.json is half written"),
        (lambda f: (f / "environment.json").write_text("{"), "environment.json is half written"),
        (lambda f: (f / "recipe.yaml").unlink(), "stopped before recipe.yaml was written"),
    ],
)
def test_a_half_written_record_is_interrupted(tmp_path: Path, half, reason: str) -> None:
    half(run_of(tmp_path / "one"))
    gathered = gather([tmp_path])
    assert [(run.state, run.reason) for run in gathered.runs] == [("interrupted", reason)]
    assert gathered.refused == []


def test_a_killed_runs_steps_count(tmp_path: Path) -> None:
    folder = run_of(tmp_path / "one", ended=False)
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    run = gather([folder]).runs[0]
    assert (run.state, run.steps, run.loss, run.seconds, run.peak_bytes) == ("interrupted", 3, 0.5, 1.5, 2**31)
    assert run.score is None


def test_other_versions_and_damage_are_refused_by_name_and_cost_no_other(tmp_path: Path) -> None:
    run_of(tmp_path / "good")
    old, changed, torn = (run_of(tmp_path / name) for name in ("old", "changed", "torn"))
    environment = json.loads((old / "environment.json").read_text())
    (old / "environment.json").write_text(json.dumps({**environment, "format_version": 1}))
    (changed / "plan.json").write_text((changed / "plan.json").read_text().replace("a.weight", "b.weight"))
    (torn / "steps.jsonl").write_text('{"step": 1}\njunk\n{"step": 3}\n')
    comparison_of(tmp_path / "grid", cell("full", 1, 80.0), format_version=9)
    gathered = gather([tmp_path])
    assert [run.name for run in gathered.runs] == ["good"]
    refused = dict(gathered.refused)
    assert set(refused) == {"old", "changed", "torn", "grid/results.json"}
    assert "format 1, and this dsfreeze reads format 2" in refused["old"]
    assert "changed by hand" in refused["changed"]
    assert "steps.jsonl:2" in refused["torn"]
    assert "results of format 9, and this dsfreeze reads format 1" in refused["grid/results.json"]


def test_nothing_readable_is_an_error_that_says_why(tmp_path: Path) -> None:
    (run_of(tmp_path / "one") / "environment.json").write_text('{"format_version": 1}')
    with pytest.raises(UserError, match=r"Nothing could be read\. .*one is a record of format 1"):
        gather([tmp_path])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"no record of a run in there.*dsfreeze train` writes"),
        ("nowhere", "There is no .*nowhere"),
        ("notes.txt", "a file that no report is made of"),
        ("x" * 400, "Cannot look at|There is no"),
        ("a\0b", "Cannot look at|There is no"),
    ],
)
def test_paths_without_records_teach(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=message):
        gather([tmp_path / name])


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"cells": {}, "format_version": 1}', '{"cells": {}, "tuning": {"full": {"trials": 3}}, "format_version": 1}', '{"cells": 3, "format_version": 1}', '{"cells": {"k": []}, "format_version": 1}',
     '{"cells": {"k": {"model": 1}}, "format_version": 1}', '{"sequence": ["a"], "format_version": 1}',
     '{"sequence": 3, "probes": [], "spec": {"bwt": "T"}, "runs": {}, "start": null, "format_version": 1}'],
)  # fmt: skip
def test_damaged_results_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        gather([tmp_path])


def test_results_of_both_kinds_are_told_apart(tmp_path: Path) -> None:
    comparison_of(tmp_path / "grid", cell("full", 1, 80.0))
    path = sequence_of(tmp_path / "sequence")
    gathered = gather([tmp_path / "grid", path])
    assert [each.name for each in gathered.comparisons] == ["grid"]
    assert [each.name for each in gathered.sequences] == ["sequence"]


def test_values_of_wrong_types_are_no_numbers(tmp_path: Path) -> None:
    """Oracle: such a value reads as absent, and nothing fails."""
    run = gather([run_of(tmp_path / "one", memory=3, metrics=[1], trainable="many", seconds_per_step=True)]).runs[0]
    assert (run.trainable, run.seconds_per_step, run.metrics, run.score) == (None, None, {}, None)
    assert run.peak_bytes == 2**31  # of the steps


@pytest.mark.parametrize(
    ("named", "numbers", "expected"),
    [
        (None, {"loss": 1.0, "f1": 0.4, "accuracy": 0.5}, ("accuracy", 50.0)),
        (["f1"], {"loss": 1.0, "f1": 0.4, "accuracy": 0.5}, ("f1", 40.0)),
        (["bleu", "f1"], {"f1": 0.4}, ("f1", 40.0)),
        (None, {"perplexity": 4.0}, ("perplexity", 25.0)),
        (None, {"bleu": 31.5}, ("bleu", 31.5)),
        (None, {"loss": 1.0}, ("", None)),
        ([3, "nonsense"], {}, ("", None)),
    ],
)
def test_the_score_is_the_first_metrics(named, numbers, expected) -> None:
    """Oracle: by hand, `metrics.score`'s scale."""
    assert headline({"data": {"metrics": named}}, numbers) == expected


# -- setups --------------------------------------------------------------------------------------------------------


def test_seeds_make_one_setup_and_what_varies_names_it(tmp_path: Path) -> None:
    for seed, accuracy in ((1, 0.5), (2, 0.75)):
        run_of(tmp_path / f"half-{seed}", "freeze.fraction=0.5", f"train.seed={seed}", accuracy=accuracy)
    run_of(tmp_path / "most", "freeze.fraction=0.75")
    run_of(tmp_path / "all", "freeze.strategy=full")
    run_of(tmp_path / "fast", "freeze.fraction=0.75", "train.learning_rate=0.01")
    setups = {setup.label: setup for setup in setups_of(gather([tmp_path]).runs)}
    common = "learning_rate=5e-05"
    assert set(setups) == {
        f"bottom · fraction=0.5 · {common}", f"bottom · fraction=0.75 · {common}", "bottom · fraction=0.75 · learning_rate=0.01",
        f"full · {common}",
    }  # fmt: skip
    half = setups[f"bottom · fraction=0.5 · {common}"]
    assert [run.name for run in half.runs] == ["half-1", "half-2"]
    assert half.values("score") == [50.0, 75.0]
    assert list(half.varied) == ["freeze.strategy", "freeze.fraction", "train.learning_rate"]


def test_interrupted_runs_are_in_no_mean(tmp_path: Path) -> None:
    run_of(tmp_path / "a", "train.seed=1")
    run_of(tmp_path / "b", "train.seed=2", ended=False)
    (setup,) = setups_of(gather([tmp_path]).runs)
    assert (len(setup.runs), setup.values("loss")) == (2, [0.5])


def test_spread_is_mean_and_sample_deviation() -> None:
    """Oracle: by hand, of 1, 2, 3."""
    assert spread([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert spread([4.0]) == (4.0, None)
    assert spread([]) == (None, None)
