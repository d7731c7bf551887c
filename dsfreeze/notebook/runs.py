"""07, a run's record: losses, phases, gradient norms, memory, surroundings; and several runs side by side. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.plan import FreezePlan
from dsfreeze.record import RecordData

Row = dict[str, Any]
#: Of what an evaluation measures, those of which less is better.
LOWER = ("loss", "perplexity")
#: Share of a run's steps, at its beginning and at its end, whose mean loss is compared.
ENDS = 0.1
_AFTER = "after: "


def choose(records: Mapping[str, RecordData], name: str | None) -> str:
    """The name of the run to look into: the one asked for, else that of most phases; UserError for a name that no run has, and where no
    step has ended."""
    if name is None:
        name = max(records, key=lambda each: len({line.get("phase") for line in records[each].steps}))
    if name not in records:
        raise UserError(f"RUN is '{name}', and no run here has that name.{did_you_mean(name, records)}")
    if not records[name].steps:
        raise UserError(f"No step of run '{name}' has ended. Name another run in RUN, or another folder in RECORDS.")
    return name


def status_of(record: RecordData) -> str:
    """`done`, or how far a run came that left no summary (it may still go on)."""
    if record.summary is not None:
        return "done"
    total = (record.recipe.get("train") or {}).get("max_steps")
    of = f" of {total}" if isinstance(total, int) and total > 0 else ""
    return f"interrupted after step {record.steps[-1]['step'] if record.steps else 0}{of}"


def step_rows(records: Mapping[str, RecordData]) -> list[Row]:
    """Every step's figures, with its run."""
    return [{"run": name, **line} for name, record in records.items() for line in record.steps]


def evaluation_rows(records: Mapping[str, RecordData]) -> list[Row]:
    """Every evaluation's figures: run, step, metric, value."""
    return [
        {"run": name, "step": event.get("step", 0), "metric": metric, "value": value}
        for name, record in records.items()
        for event in record.events
        if event.get("event") == "evaluation"
        for metric, value in (event.get("metrics") or {}).items()
    ]


def plan_of(record: RecordData) -> FreezePlan:
    """The plan that a run followed: the one it began with, or the last that an adaptive strategy decided on."""
    if not record.revisions:
        return record.plan
    return FreezePlan.from_json(json.dumps(record.revisions[-1]["plan"]))


def phase_rows(record: RecordData) -> list[Row]:
    """The phases that a run entered, as its steps tell: first and last step, and how many tensors train."""
    plan = plan_of(record)
    firsts: list[int] = list(dict.fromkeys(line["phase"] for line in record.steps if line.get("phase") is not None))
    rows = []
    for first in firsts:
        own = [line for line in record.steps if line.get("phase") == first]
        rows.append({
            "phase": first, "first_step": own[0]["step"], "last_step": own[-1]["step"],
            "tensors": len(plan.phase_at(first).trainable),
            "mean_loss": _of(fmean, own, "loss"), "median_seconds": _of(median, own, "seconds"),
        })  # fmt: skip
    return rows


def _of(mean: Callable[[list[float]], float], lines: Sequence[Row], key: str) -> float | None:
    """A mean of what steps measured; None where none has it."""
    values = [line[key] for line in lines if line.get(key) is not None]
    return mean(values) if values else None


def memory_rows(record: RecordData) -> list[Row]:
    """Measured bytes of a finished run by item, beside the predicted ones."""
    summary = record.summary or {}
    measured, predicted = summary.get("memory") or {}, summary.get("predicted") or {}
    return [
        {"item": item.replace("_", " "), "bytes": found[item], "source": source}
        for source, found in (("measured", measured), ("predicted", predicted))
        for item in ("weights", "gradients", "masters", "optimizer_state", "peak")
        if found.get(item) is not None
    ]


def peak_rows(records: Mapping[str, RecordData]) -> list[Row]:
    """Of finished runs that were priced: the peak that was measured, and the one predicted."""
    rows = []
    for name, record in records.items():
        summary = record.summary or {}
        predicted = summary.get("predicted") or {}
        if "peak" in predicted:
            measured = summary["memory"]["peak"]
            rows.append({
                "run": name, "measured": measured, "predicted": predicted["peak"],
                "error_percent": 100 * (measured / predicted["peak"] - 1),
            })  # fmt: skip
    return rows


def environment_rows(records: Mapping[str, RecordData]) -> list[Row]:
    """Where each run took place: a row for each fact, a column for each run."""
    facts = {name: {**record.environment, **record.environment.get("versions", {})} for name, record in records.items()}
    names = dict.fromkeys(fact for found in facts.values() for fact in found if fact != "versions")
    return [{"fact": fact, **{name: found.get(fact) for name, found in facts.items()}} for fact in names]


def comparison_rows(records: Mapping[str, RecordData]) -> list[Row]:
    """A row for each run; what an unfinished one has not is None."""
    rows = []
    for name, record in records.items():
        summary = record.summary or {}
        metrics = (summary.get("metrics") or {}).get("after") or {}
        trainable, total = summary.get("trainable"), summary.get("total")
        rows.append({
            "run": name, "status": status_of(record), "strategy": record.plan.strategy,
            "trainable_percent": 100 * trainable / total if trainable and total else None,
            "flops_percent": 100 * summary["flops_vs_full"] if summary.get("flops_vs_full") else None,
            "seconds_per_step": summary.get("seconds_per_step"), "peak_bytes": (summary.get("memory") or {}).get("peak"),
            "last_loss": record.steps[-1]["loss"] if record.steps else None,
            **{_AFTER + metric: value for metric, value in metrics.items()},
        })  # fmt: skip
    return rows


# -- findings ------------------------------------------------------------------------------------------------------


def loss_finding(name: str, record: RecordData) -> str:
    """Whether the loss fell, from the mean of the first steps to that of the last."""
    losses = [line["loss"] for line in record.steps if line.get("loss") is not None]
    if len(losses) < 2:
        return f"{name} has {len(losses)} step{'s' * (len(losses) != 1)}: too few to say anything."
    count = max(1, int(ENDS * len(losses)))
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    word = "fell" if last < first else "rose"
    steps = f"{count} step{'s' * (count > 1)}"
    return f"{name} ({status_of(record)}): the loss {word} from {first:.3f} to {last:.3f} (means of the first and the last {steps})."


def norm_finding(name: str, record: RecordData) -> str:
    """The gradient norm's largest value, and how far it stands out."""
    norms = {line["step"]: line["grad_norm"] for line in record.steps if line.get("grad_norm") is not None}
    if not norms:
        return f"{name} has no gradient norms."
    top, middle = max(norms, key=norms.__getitem__), median(norms.values())
    stands = norms[top] / middle if middle else float("inf")
    word = "a spike worth a look" if stands > 10 else "no spike"
    return f"The largest gradient norm of {name}, {norms[top]:.2f} at step {top}, is {stands:.1f} times the median: {word}."


def memory_finding(name: str, record: RecordData) -> str:
    """The measured peak against the predicted one."""
    rows = peak_rows({name: record})
    if not rows:
        return f"{name} has no prediction of its memory: it has not ended, or its model could not be priced."
    error = rows[0]["error_percent"]
    gib = {key: rows[0][key] / 2**30 for key in ("measured", "predicted")}
    return f"{name} peaked at {gib['measured']:.2f} GiB; predicted were {gib['predicted']:.2f} GiB, {abs(error):.1f} % {'less' if error > 0 else 'more'}."


def headline(rows: Sequence[Row]) -> str:
    """The metric that runs are compared by: of those after their last step the first that is no loss."""
    metrics = [key.removeprefix(_AFTER) for row in rows for key in row if key.startswith(_AFTER)]
    return next((metric for metric in metrics if metric not in LOWER), "loss")


def comparison_finding(rows: Sequence[Row], metric: str) -> str:
    """The best of the finished runs by a metric of `comparison_rows`, and the cheapest."""
    key = _AFTER + metric
    done = [row for row in rows if row.get(key) is not None and row["flops_percent"] is not None]
    unfinished = len(rows) - sum(row["status"] == "done" for row in rows)
    tail = f" {unfinished} of {len(rows)} runs did not end." if unfinished else ""
    if len(done) < 2:
        return f"Fewer than two finished runs have {metric}: there is nothing to compare.{tail}"
    best = (min if metric in LOWER else max)(done, key=lambda row: row[key])
    cheap = min(done, key=lambda row: row["flops_percent"])
    return (
        f"{best['run']} ended with the best {metric}, {best[key]:.3f}; {cheap['run']}, at {cheap['flops_percent']:.0f} % of full tuning's FLOPs, with "
        f"{cheap[key]:.3f}. One run each is an anecdote: `dsfreeze compare` repeats them over seeds.{tail}"
    )


def surroundings_finding(rows: Sequence[Row]) -> str:
    """In which facts of `environment_rows` the runs differ."""
    apart = [row for row in rows if row["fact"] != "started"]
    differing = [row["fact"] for row in apart if len({str(value) for key, value in row.items() if key != "fact"}) > 1]
    if differing:
        return f"These runs differ in {', '.join(differing)}: compare their times with care."
    return "All runs here had the same surroundings."
