"""What notebooks say of importance and of forgetting. Oracles: rankings and matrices written out by hand, the committed benchmark."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsfreeze.continual.results import summarise
from dsfreeze.errors import UserError
from dsfreeze.notebook import forgetting, importance
from dsfreeze.record import read_object

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def analysis(**scores: tuple[list[float], float | None]) -> dict[str, Any]:
    """An analysis of a model of three layers: of each score the layers' values, and the agreement of halves."""
    return {
        "model": {"name": "m", "layers": 3}, "data": {"num_examples": 8},
        "all": {
            name: {"family": "f", "spearman": rho, "examples_needed": None, "scores": {f"layers.{n}": value for n, value in enumerate(values)}}
            for name, (values, rho) in scores.items()
        },
    }  # fmt: skip


UP, DOWN = [1.0, 2.0, 3.0], [9.0, 5.0, 1.0]


def test_ranks_run_from_0_to_1():
    rows = importance.rank_rows(analysis(up=(UP, 0.9), tied=([1.0, 1.0, 2.0], 0.9)))
    assert [row["rank"] for row in rows] == [0.0, 0.5, 1.0, 0.0, 0.0, 1.0]


def test_stable_scores_are_counted():
    told = importance.stability_finding(analysis(up=(UP, 0.9), down=(DOWN, 0.2), data_free=(UP, None)))
    assert told.startswith("On 8 examples 1 of 2 scores that need data rank the layers stably")
    assert told.endswith("first of all up, rho 0.90.")
    assert "no score would rank" in importance.stability_finding(analysis(up=(UP, 0.5)))
    assert "None of these scores needs data" in importance.stability_finding(analysis(up=(UP, None)))


def test_scores_that_oppose_each_other():
    told = importance.agreement_finding(analysis(up=(UP, 0.9), down=(DOWN, 0.9)))
    assert "1 of 1 pairs rank the layers against each other" in told
    assert "up and down, rho -1.00" in told
    assert "more alike than not" in importance.agreement_finding(analysis(up=(UP, 0.9), too=(UP, 0.9)))
    assert "nothing to compare" in importance.agreement_finding(analysis(up=(UP, 0.9)))
    rows = importance.agreement_rows(analysis(up=(UP, 0.9), down=(DOWN, 0.9)))
    assert [row["agreement"] for row in rows] == [1, -1, -1, 1]


def test_advice_is_the_analyses():
    assert (
        importance.advice_finding({"model": {"name": "m"}, "recommendation": {"sentence": "train 3"}})
        == "For m: train 3."
    )
    assert importance.advice_finding({"model": {"name": "m"}}) == "This file holds no recommendation."


def ranking(mean: float, sets: list[list[int]], sd: float = 0.01) -> dict[str, Any]:
    return {"task": {"mean": mean, "sd": sd, "sets": sets, "flops": [0.8]}}


def test_a_ranking_must_beat_the_bottom_by_more_than_the_seeds_spread():
    """Spread sqrt(0.01^2 + 0.01^2) = 1.41 points: 1 point more is none, 2 are."""
    record = {"rankings": {"bottom frozen": ranking(0.8, [[2]]), "same": ranking(0.8, [[2]]), "near": ranking(0.81, [[1]]), "worse": ranking(0.7, [[0]])}}  # fmt: skip
    rows = importance.ranking_rows(record)
    assert next(row for row in rows if row["ranking"] == "near")["spread"] == pytest.approx(1.41421, rel=1e-4)
    assert importance.ranking_finding(rows) == (
        "1 of 3 times a ranking, or a control, chose the very layers that freezing the bottom leaves; of the others none did better by more than the "
        "spread between seeds, and 1 did worse."
    )
    record["rankings"]["better"] = ranking(0.82, [[1]])
    assert "1 did better by more than the spread between seeds, most better on task (+2.0 points)" in importance.ranking_finding(importance.ranking_rows(record))  # fmt: skip


def test_the_benchmark_of_rankings_is_read():
    rows = importance.ranking_rows(read_object(BENCHMARKS / "rankings.json"))
    assert {row["above_bottom"] for row in rows if row["ranking"] == "bottom frozen"} == {0.0}
    assert {row["task"] for row in rows} == {"sst2", "sick", "snli_dev"}


# -- forgetting ----------------------------------------------------------------------------------------------------


def row_of(number: int, task: str, **scores: float) -> dict[str, Any]:
    metrics = {"stories": {"perplexity": 100 / scores["stories"], "loss": 1.0}} if "stories" in scores else {}
    return {"round": number, "task": task, "scores": scores, "numbers": metrics, "update_norm": 1.0, "trainable_share": 0.5, "seconds": 1.0}  # fmt: skip


def state() -> dict[str, Any]:
    """Two tasks and a probe; full tuning learns 80 and 90 and forgets 20 of the first; half of the way there 45 and 40."""
    runs = {
        "full/seed-1": {
            "label": "full", "method": "full", "seed": 1, "draw": None, "alpha": None,
            "rounds": [row_of(1, "one", one=80, two=5, stories=30), row_of(2, "two", one=60, two=90, stories=10)],
        },
        "wise_ft@0/seed-1": {
            "label": "wise_ft@0", "method": "wise_ft", "seed": 1, "draw": None, "alpha": 0.0,
            "rounds": [row_of(1, "one", one=10), row_of(2, "two", one=10, two=20, stories=50)],
        },
        "wise_ft@1/seed-1": {
            "label": "wise_ft@1", "method": "wise_ft", "seed": 1, "draw": None, "alpha": 1.0,
            "rounds": [row_of(1, "one", one=80), row_of(2, "two", one=60, two=90, stories=10)],
        },
        "multitask/seed-1": {
            "label": "multitask", "method": "multitask", "seed": 1, "draw": None, "alpha": None,
            "rounds": [row_of(2, "all", one=80, two=90, stories=20)],
        },
    }  # fmt: skip
    made = {
        "format_version": 1, "spec": {}, "sequence": ["one", "two"], "probes": ["stories"], "data": {},
        "start": {"scores": {"one": 10, "two": 20, "stories": 50}}, "runs": runs, "summary": {},
    }  # fmt: skip
    return {**made, "summary": summarise(made)}


def benchmark_of(made: dict[str, Any]) -> dict[str, Any]:
    """What benchmarks/continual.py writes of the same results."""
    scores = {key: [row["scores"] for row in run["rounds"]] for key, run in made["runs"].items()}
    return {"setting": {"model": "m"}, "start": made["start"], "summary": made["summary"], "scores": scores}


@pytest.fixture(params=["results.json", "continual-m.json"])
def course(request, tmp_path) -> forgetting.Course:
    """The same sequence from either file."""
    made = state()
    path = tmp_path / request.param
    path.write_text(json.dumps(made if path.name == "results.json" else benchmark_of(made)))
    return forgetting.read_course_of(path)


def test_both_files_hold_the_same_sequence(course):
    assert course.tasks == ("one", "two")
    assert course.probes == ("stories",)
    assert course.start_retained == 50
    assert course.rounds["full/seed-1"] == [1, 2]
    assert course.rounds["multitask/seed-1"] == [2]


def test_the_matrix_of_a_run(course):
    assert forgetting.whole_runs(course) == ["full/seed-1"], (
        "not the curve, which skips entries, nor what trains at once"
    )
    rows = forgetting.matrix_rows(course, "full/seed-1")
    found = {(row["after"], row["on"]): row["score"] for row in rows}
    assert found["start", "two"] == 20
    assert found["1: one", "one"] == 80
    assert found["2: two", "stories"] == 10
    told = forgetting.matrix_finding(course, "full/seed-1")
    assert "one scored 10.0 before, 80.0 right after its own round and 60.0 after 2 rounds: it lost 20.0 points" in told


def test_points_and_the_curve(course):
    rows = {row["label"]: row for row in forgetting.point_rows(course)}
    assert (rows["full"]["learnt"], rows["full"]["retained"], rows["full"]["alpha"]) == (85, 10, None)
    assert "multitask" not in rows, "a bound without rounds of its own has no learning accuracy"
    assert [row["alpha"] for row in forgetting.curve_rows(list(rows.values()))] == [0.0, 1.0]


def test_a_method_is_held_against_the_line():
    """The line runs from (15, 50) to (85, 10): at 50 learnt it retains 30."""

    def point(label, learnt, retained, alpha=None):
        return {"label": label, "learnt": learnt, "retained": retained, "alpha": alpha}

    curve = [point("w@0", 15.0, 50.0, 0.0), point("w@1", 85.0, 10.0, 1.0)]
    above, below, beyond = point("above", 50.0, 37.0), point("below", 50.0, 20.0), point("beyond", 90.0, 9.0)
    assert forgetting.above_curve(above, curve) == pytest.approx(7)
    assert forgetting.above_curve(below, curve) == pytest.approx(-10)
    assert forgetting.above_curve(beyond, curve) is None
    told = forgetting.forgetting_finding([*curve, above, below, beyond])
    assert told == (
        "beyond learnt most (90.0) and above retained most (37.0); 1 of 2 methods lie clearly above WiSE-FT's line, the farthest above "
        "(+7.0); 1 learnt more or less than any of its points."
    )
    assert "none of 1 methods lies clearly above" in forgetting.forgetting_finding([*curve, below])
    assert "none of 1" in forgetting.forgetting_finding([*curve, point("level", 50.0, 30.4)]), "less than half a point"
    assert "without a WiSE-FT curve" in forgetting.forgetting_finding([above])
    assert forgetting.forgetting_finding([]) == "No method has finished all its rounds."


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("results.json", "{}", "no results of this version"),
        ("results.json", '{"format_version": 1}', "no results of a sequence"),
        ("continual-x.json", "{}", "no results of a sequence"),
        ("continual-x.json", '{"start": {"scores": {}}, "summary": {}, "scores": {}}', "No method of .* has ended"),
    ],
)
def test_what_holds_no_sequence_is_named(tmp_path, name, text, why):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=why):
        forgetting.read_course_of(path)
