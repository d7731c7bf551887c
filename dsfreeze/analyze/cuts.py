"""Where freezing would end by the transition traces: for each example, batch and data set, and by each gain formula."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies.salf import GAINS, batch_cuts, dataset_cut, end_of_freezing

CUTS = ("median", "mode", "q25")


def cuts_of(traces: Sequence[Sequence[float]], labels: Sequence[Sequence[int]], batch_size: int) -> dict[str, Any]:
    """By gain formula: `examples` (an end for each trace), `batches` (the lowest of each batch), `dataset` (by each rule),
    `agreement` (share of traces that end where A's do), `by_label` (the median of each label, where an example has one)."""
    ends = {gain: [end_of_freezing(trace, _options(gain)) for trace in traces] for gain in GAINS}
    single = [own[0] for own in labels if len(own) == 1]
    return {
        gain: {
            "dataset": {rule: dataset_cut(own, rule) for rule in CUTS},
            "agreement": fmean(float(one == other) for one, other in zip(own, ends["a"], strict=True)),
            "by_label": _by_label(own, single) if len(single) == len(own) else {},
            "counts": dict(sorted(Counter(own).items())),
            "examples": own,
            "batches": batch_cuts(own, batch_size),
        }
        for gain, own in ends.items()
    }


def _by_label(ends: Sequence[int], labels: Sequence[int]) -> dict[str, int]:
    kinds = sorted(set(labels)) if len(set(labels)) <= 20 else []
    return {
        str(kind): dataset_cut([end for end, label in zip(ends, labels, strict=True) if label == kind], "median")
        for kind in kinds
    }


def _options(gain: str) -> FreezeOptions:
    return FreezeOptions.model_validate({"strategy": "salf", "scores": "-", "gain": gain})
