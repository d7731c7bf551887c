"""Tables for people. Oracle: what they show, read as text."""

from io import StringIO

from rich.console import Console

from dsfreeze.tables import comparison_table, summary_table


def shown(table) -> str:
    console = Console(file=StringIO(), width=120)
    console.print(table)
    return console.file.getvalue()


def summary(**changes):
    memory = {"optimizer_state": 2048, "masters": 0, "peak": 4096}
    return {
        "steps": 3, "loss": 1.0, "trainable": 10, "total": 40, "flops_vs_full": 0.5, "seconds_per_step": 0.1, "memory": memory,
        "metrics": {}, "never_moved": [], "record": "runs/mine", "model": None, "switches": 0, "selection": None, **changes,
    }  # fmt: skip


def test_a_comparison_of_runs_that_evaluated_shows_both_ends():
    metrics = {"before": {"loss": 2.0, "accuracy": 0.25}, "after": {"loss": 1.0, "accuracy": 0.75}}
    lines = [line.split() for line in shown(comparison_table(summary(metrics=metrics), summary())).splitlines()]
    found = [[word for word in line if word not in "│┃"] for line in lines]
    assert ["accuracy", "before", "0.250"] in found
    assert ["accuracy", "after", "0.750"] in found


def test_a_run_that_evaluated_nothing_has_no_accuracy_and_one_without_a_model_names_none():
    """data.eval: null leaves no metrics, a resumed run may lack `before`, train.export: false leaves no model."""
    text = shown(comparison_table(summary(), summary()))
    assert "accuracy" not in text
    assert "peak memory" in text
    assert "0.750" in shown(comparison_table(summary(metrics={"after": {"accuracy": 0.75}}), summary()))
    assert "None" not in shown(summary_table(summary()))


def test_a_moving_run_tells_what_switching_and_deciding_took():
    memory = {"optimizer_state": 2048, "masters": 0, "peak": 4 << 30, "parked": 1 << 30}
    selection = {"decisions": 2, "seconds": 1.5, "peak": 4 << 30, "peak_after": 2 << 30, "host_bytes": 3 << 30}
    text = shown(summary_table(summary(memory=memory, switches=7, seconds_switching=0.25, selection=selection)))
    told = " ".join(text.replace("│", " ").split())
    assert "7 in 0.25 s; 1.00 GiB of state waits" in told
    assert "2 decisions in 1.50 s, peak memory 4.00 GiB until the last (2.00 GiB after it), 3.00 GiB of copies" in told


def test_a_predicted_peak_stands_beside_the_measured_one():
    """Oracle: the summaries' own bytes; a run without a prediction has no such line."""
    told = [
        summary(predicted={"peak": size, "peak_error": 0.02, "masters": 0, "optimizer_state": 0})
        for size in (2**30, 2**31)
    ]
    line = next(line for line in shown(comparison_table(*told)).splitlines() if "predicted" in line)
    assert all(figure in line for figure in ("1.00 GiB", "2.00 GiB", "0.50"))
    assert "predicted" not in shown(comparison_table(summary(), told[0]))
    assert "predicted 1.00 GiB (+2 %)" in shown(summary_table(told[0]))
