"""What notebooks find in a folder and say of runs. Oracles: what was written there; sentences that change when a figure does."""

from __future__ import annotations

import json
import os

import pytest
from notebook_kit import PLAN, run_record, summary_of

from dsfreeze.errors import UserError
from dsfreeze.notebook import runs, throughput
from dsfreeze.notebook.folders import find_file, find_runs, records_folder
from dsfreeze.notebook.memory import error_finding
from dsfreeze.notebook.showing import framed
from dsfreeze.record import read_object

# -- folders -------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_none_is_named(tmp_path):
    (tmp_path / "file").touch()
    assert records_folder(tmp_path) == tmp_path
    with pytest.raises(UserError, match=r"no-such, which does not exist\. .*DSFREEZE_RECORDS"):
        records_folder(tmp_path / "no-such")
    with pytest.raises(UserError, match="which is a file"):
        records_folder(tmp_path / "file")


def test_the_nearest_file_and_of_those_the_newest(tmp_path):
    for place, age in (("x/study.json", 1), ("y/scaling.json", 2), ("x/deep/study.json", 3)):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (age, age))
    names = ["study.json", "scaling.json"]
    assert find_file(tmp_path, names, "nothing") == tmp_path / "y/scaling.json"
    assert find_file(tmp_path / "x", names, "nothing") == tmp_path / "x/study.json"
    with pytest.raises(UserError, match=r"holds no scores\.json.* `dsfreeze analyze` writes one"):
        find_file(tmp_path, ["scores.json"], "`dsfreeze analyze`")


def test_runs_that_cannot_be_read_are_named_beside_those_that_can(tmp_path):
    run_record(tmp_path / "one", summary=summary_of())
    run_record(tmp_path / "group" / "two")
    run_record(tmp_path / "old")
    (tmp_path / "old" / "environment.json").write_text('{"format_version": 1}')
    found = find_runs(tmp_path)
    assert list(found.records) == ["group/two", "one"]
    assert "is a record of format 1" in found.refused["old"]
    assert list(find_runs(tmp_path / "one").records) == ["one"], "a run's own folder"


def test_a_folder_without_runs_says_so_with_the_reasons(tmp_path):
    with pytest.raises(UserError, match="holds no record of a run"):
        find_runs(tmp_path)
    run_record(tmp_path / "torn")
    (tmp_path / "torn" / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"(?s)can be read.*torn: .*Not a freeze plan"):
        find_runs(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_a_file_that_is_no_object_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_object(path)


def test_a_notebook_shows_the_message_alone():
    """Oracle: IPython's protocol, by which an exception renders its own traceback."""
    assert UserError("Write 3.")._render_traceback_() == ["UserError: Write 3."]


def test_a_finding_is_text_not_markup():
    shown = framed('<img src=x onerror="alert(1)"> & more')
    assert "<img" not in shown
    assert "&lt;img src=x onerror=&quot;alert(1)&quot;&gt; &amp; more" in shown


# -- one run -------------------------------------------------------------------------------------------------------


def test_a_run_without_a_summary_is_interrupted(tmp_path):
    assert runs.status_of(run_record(tmp_path / "done", summary=summary_of())) == "done"
    assert runs.status_of(run_record(tmp_path / "killed")) == "interrupted after step 4 of 4"
    assert runs.status_of(run_record(tmp_path / "early", losses=())) == "interrupted after step 0 of 4"


def test_the_phases_that_a_run_entered(tmp_path):
    first, second = runs.phase_rows(run_record(tmp_path))
    assert (first["first_step"], first["last_step"], first["tensors"]) == (1, 2, 2)
    assert (second["first_step"], second["last_step"], second["tensors"]) == (3, 4, 1)
    assert (first["mean_loss"], second["mean_loss"]) == (3.5, 1.5)
    assert first["median_seconds"] == pytest.approx(0.15)


def test_an_adaptive_run_followed_its_last_decision(tmp_path):
    record = run_record(tmp_path)
    decided = PLAN.until(3)
    record.revisions.append({"step": 2, "scores": {}, "plan": json.loads(decided.to_json())})
    assert runs.plan_of(record) == decided


def test_losses_that_fall_and_rise(tmp_path):
    record = run_record(tmp_path / "fell", summary=summary_of())
    assert runs.loss_finding("x", record).startswith("x (done): the loss fell from 4.000 to 1.000")
    assert "rose from 1.000 to 2.000" in runs.loss_finding("x", run_record(tmp_path / "rose", losses=(1.0, 2.0)))
    assert "too few" in runs.loss_finding("x", run_record(tmp_path / "short", losses=(1.0,)))


def test_a_spike_of_the_gradient(tmp_path):
    """Norms are twice the losses: 8 against a median of 5, then 200 against 2."""
    assert runs.norm_finding("x", run_record(tmp_path / "a")) == (
        "The largest gradient norm of x, 8.00 at step 1, is 1.6 times the median: no spike."
    )
    assert "200.00 at step 2, is 100.0 times the median: a spike" in runs.norm_finding(
        "x", run_record(tmp_path / "b", losses=(1.0, 100.0, 1.0))
    )


def test_memory_beside_its_prediction(tmp_path):
    record = run_record(tmp_path / "done", summary=summary_of())
    rows = {(row["item"], row["source"]): row["bytes"] for row in runs.memory_rows(record)}
    assert rows["peak", "measured"] == 1500
    assert rows["peak", "predicted"] == 1200
    assert ("masters", "measured") not in rows
    assert "25.0 % less" in runs.memory_finding("x", record)
    killed = run_record(tmp_path / "killed")
    assert runs.memory_rows(killed) == []
    assert "has no prediction" in runs.memory_finding("x", killed)
    unpriced = run_record(tmp_path / "unpriced", summary=summary_of(predicted={"reason": "odd"}))
    assert runs.peak_rows({"u": unpriced}) == []


def test_the_run_of_most_phases_is_looked_into(tmp_path):
    records = {"short": run_record(tmp_path / "a", losses=(1.0,)), "long": run_record(tmp_path / "b")}
    assert runs.choose(records, None) == "long"
    assert runs.choose(records, "short") == "short"
    with pytest.raises(UserError, match="Did you mean 'long'"):
        runs.choose(records, "lon")
    with pytest.raises(UserError, match="No step of run 'empty' has ended"):
        runs.choose({"empty": run_record(tmp_path / "c", losses=())}, None)


# -- several runs --------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_what_they_have(tmp_path):
    records = {
        "a": run_record(tmp_path / "a", summary=summary_of()),
        "b": run_record(tmp_path / "b", summary=summary_of(flops_vs_full=1.0, metrics={"after": {"loss": 0.5, "accuracy": 0.5}})),
        "c": run_record(tmp_path / "c"),
    }  # fmt: skip
    rows = runs.comparison_rows(records)
    assert runs.headline(rows) == "accuracy"
    told = runs.comparison_finding(rows, "accuracy")
    assert told.startswith("a ended with the best accuracy, 0.750; a, at 50 %")
    assert told.endswith("1 of 3 runs did not end.")
    assert runs.comparison_finding(rows, "loss").startswith("b ended with the best loss, 0.500"), "less is better"
    assert "nothing to compare" in runs.comparison_finding(rows[2:], "accuracy")


def test_steps_and_evaluations_of_all_runs(tmp_path):
    records = {"a": run_record(tmp_path / "a"), "b": run_record(tmp_path / "b", losses=(1.0,))}
    assert [(row["run"], row["step"]) for row in runs.step_rows(records)] == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1)]  # fmt: skip
    rows = runs.evaluation_rows(records)
    assert {"run": "b", "step": 1, "metric": "accuracy", "value": 0.75} in rows


def test_surroundings_that_differ(tmp_path):
    records = {"a": run_record(tmp_path / "a"), "b": run_record(tmp_path / "b")}
    assert "the same surroundings" in runs.surroundings_finding(runs.environment_rows(records))
    records["b"].environment["versions"]["torch"] = "2.9.0"
    assert "differ in torch:" in runs.surroundings_finding(runs.environment_rows(records))


def test_speeds_of_runs_beside_their_flops(tmp_path):
    """With a prefix that was read the FLOPs it spares fall away, and the step that counts is one that reads."""
    cache = {"hits": 3, "flops_spared": 250, "seconds_per_cached_step": 0.1}
    records = {
        "full": run_record(tmp_path / "a", summary=summary_of(flops_vs_full=1.0, seconds_per_step=0.4)),
        "cached": run_record(tmp_path / "b", summary=summary_of(prefix_cache=cache)),
        "killed": run_record(tmp_path / "c"),
    }  # fmt: skip
    rows = throughput.run_speed_rows(records)
    assert [(row["run"], row["seconds"], row["flops_percent"]) for row in rows] == [("full", 0.4, 100), ("cached", 0.1, 25)]  # fmt: skip
    assert "a step of cached took 0.25 of the time of one of full, at 0.25 of its FLOPs" in throughput.run_speed_finding(rows)  # fmt: skip
    assert "nothing to compare" in throughput.run_speed_finding(rows[:1])


def test_the_farthest_prediction_is_told(tmp_path):
    rows = runs.peak_rows({"near": run_record(tmp_path / "a", summary=summary_of()), "far": run_record(tmp_path / "b", summary=summary_of(memory={"peak": 600}))})  # fmt: skip
    assert error_finding(rows, "the peak").endswith("the farthest is far (-50.0 %).")
    assert error_finding([], "the peak") == "No run here has a prediction of the peak."
