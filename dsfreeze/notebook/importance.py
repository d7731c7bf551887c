"""02, importance: scores of a model's layers, how sure and how alike they are, and what choosing by them brought. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import hypot
from statistics import fmean
from typing import Any

from dsfreeze.ranking import STABLE, spearman

Row = dict[str, Any]
#: Names in the benchmark's record of rankings: what others are held against, and what trains everything.
BOTTOM, FULL = "bottom frozen", "full"


def layer_values(content: Mapping[str, Any], score: str) -> list[float]:
    """A score's value of every transformer layer, input first."""
    scores = content["all"][score]["scores"]
    return [scores[f"layers.{number}"] for number in range(content["model"]["layers"])]


def rank_rows(content: Mapping[str, Any]) -> list[Row]:
    """Each layer's rank by each score, from 0 (matters least) to 1: units differ between scores, orders compare."""
    last = max(1, content["model"]["layers"] - 1)
    rows = []
    for name, found in content["all"].items():
        values = layer_values(content, name)
        rows += [
            {"score": name, "family": found["family"], "layer": layer, "rank": sum(other < value for other in values) / last}
            for layer, value in enumerate(values)
        ]  # fmt: skip
    return rows


def stability_rows(content: Mapping[str, Any]) -> list[Row]:
    """Agreement between halves of the data; scores of the weights alone have none."""
    return [
        {"score": name, "family": found["family"], "agreement": found["spearman"], "needed": found["examples_needed"]}
        for name, found in content["all"].items()
        if found["spearman"] is not None
    ]


def agreement_rows(content: Mapping[str, Any]) -> list[Row]:
    """Spearman's rank correlation between every two scores, over layers."""
    values = {name: layer_values(content, name) for name in content["all"]}
    return [
        {"score": one, "other": other, "agreement": spearman(values[one], values[other])}
        for one in values
        for other in values
    ]


def stability_finding(content: Mapping[str, Any]) -> str:
    rows = stability_rows(content)
    if not rows:
        return "None of these scores needs data, so none has halves to agree."
    stable = sorted((row for row in rows if row["agreement"] >= STABLE), key=lambda row: -row["agreement"])
    examples = content["data"]["num_examples"]
    if not stable:
        best = max(rows, key=lambda row: row["agreement"])
        return (
            f"On {examples} examples no score would rank the layers alike on another half of the data (rho {STABLE} or more): "
            f"the best is {best['score']}, rho {best['agreement']:.2f}."
        )
    return (
        f"On {examples} examples {len(stable)} of {len(rows)} scores that need data rank the layers stably (rho {STABLE} or more "
        f"between halves), first of all {stable[0]['score']}, rho {stable[0]['agreement']:.2f}."
    )


def advice_finding(content: Mapping[str, Any]) -> str:
    """What the analysis itself recommends."""
    advice = (content.get("recommendation") or {}).get("sentence")
    return f"For {content['model']['name']}: {advice}." if advice else "This file holds no recommendation."


def agreement_finding(content: Mapping[str, Any]) -> str:
    names = list(content["all"])
    if len(names) < 2:
        return "There is one score, and nothing to compare it with."
    pairs = {
        pair: spearman(layer_values(content, pair[0]), layer_values(content, pair[1]))
        for pair in combinations(names, 2)
    }
    far = min(pairs, key=pairs.__getitem__)
    opposed = sum(value < 0 for value in pairs.values())
    return (
        f"Scores do not say the same: {opposed} of {len(pairs)} pairs rank the layers against each other (rho below 0), most of all "
        f"{far[0]} and {far[1]}, rho {pairs[far]:.2f}."
        if opposed
        else f"All {len(pairs)} pairs of scores rank the layers more alike than not; the least so {far[0]} and {far[1]}, rho {pairs[far]:.2f}."
    )


# -- what choosing by a ranking brought ----------------------------------------------------------------------------


def ranking_rows(record: Mapping[str, Any]) -> list[Row]:
    """Accuracy of each ranking's choice on each task, percent, and its distance from freezing the bottom, with the two runs' deviations
    over seeds taken together."""
    rows = []
    for ranking, tasks in record["rankings"].items():
        for task, found in tasks.items():
            base = record["rankings"][BOTTOM][task]
            rows.append({
                "ranking": ranking, "task": task, "accuracy": 100 * found["mean"], "deviation": 100 * found["sd"],
                "above_bottom": 100 * (found["mean"] - base["mean"]), "spread": 100 * hypot(found["sd"], base["sd"]),
                "flops_percent": 100 * fmean(found["flops"]), "same_layers": found["sets"] == base["sets"],
            })  # fmt: skip
    return rows


def ranking_finding(rows: Sequence[Row]) -> str:
    """Whether any ranking beat freezing the bottom by more than the seeds' spread, at its FLOPs or fewer."""
    chosen = [row for row in rows if row["ranking"] not in (BOTTOM, FULL)]
    other = [row for row in chosen if not row["same_layers"]]
    wins = [row for row in other if row["above_bottom"] > row["spread"]]
    losses = sum(row["above_bottom"] < -row["spread"] for row in other)
    same = f"{len(chosen) - len(other)} of {len(chosen)} times a ranking, or a control, chose the very layers that freezing the bottom leaves"
    if wins:
        best = max(wins, key=lambda row: row["above_bottom"])
        return (
            f"{same}; of the others {len(wins)} did better by more than the spread between seeds, most {best['ranking']} on {best['task']} "
            f"(+{best['above_bottom']:.1f} points), and {losses} did worse."
        )
    return f"{same}; of the others none did better by more than the spread between seeds, and {losses} did worse."
