"""Scores: numbers that say how much a layer or a tensor matters; the larger, the more it should train.

One file a family, each score a function of what an analysis has seen; `SCORES` is the list of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsfreeze.scores import change, deviation, gradient, magnitude, similarity, spectrum
from dsfreeze.scores.observations import Observations, Scores

__all__ = ["DATA_FREE", "FAMILIES", "SCORES", "Observations", "Score", "Scores"]


@dataclass(frozen=True)
class Score:
    """A score, its family, and the pass over the calibration data that it rests on."""

    family: str
    source: str
    compute: Callable[[Observations], Scores]


SCORES: dict[str, Score] = {
    "change_l2": Score("change", "probe", change.change_l2),
    "change_relative": Score("change", "probe", change.change_relative),
    "change_rms": Score("change", "probe", change.change_rms),
    "gradient_norm_change": Score("change", "probe", gradient.gradient_norm_change),
    "auto_rgn": Score("change", "gradients", gradient.auto_rgn),
    "ila": Score("change", "gates", change.ila),
    "deviation_a": Score("deviation", "traces", deviation.deviation_a),
    "deviation_b": Score("deviation", "traces", deviation.deviation_b),
    "deviation_c": Score("deviation", "traces", deviation.deviation_c),
    "deviation_d": Score("deviation", "traces", deviation.deviation_d),
    "logit_lens": Score("deviation", "traces", deviation.logit_lens),
    "gradient_norm": Score("gradient", "gradients", gradient.gradient_norm),
    "gradient_norm_by_size": Score("gradient", "gradients", gradient.gradient_norm_by_size),
    "fisher": Score("gradient", "fisher", gradient.fisher),
    "greentrainer": Score("gradient", "gradients", gradient.greentrainer),
    "ablation": Score("gradient", "ablation", gradient.ablation),
    "weight_norm": Score("magnitude", "weights", magnitude.weight_norm),
    "wanda": Score("magnitude", "inputs", magnitude.wanda),
    "snr": Score("spectrum", "spectra", spectrum.snr),
    "snr_textbook": Score("spectrum", "spectra", spectrum.snr_textbook),
    "condition_number": Score("spectrum", "spectra", spectrum.condition_number),
    "block_influence": Score("similarity", "states", similarity.block_influence),
    "cka_consecutive": Score("similarity", "states", similarity.cka_consecutive),
    "cka_reference": Score("similarity", "reference", similarity.cka_reference),
    "plasticity_reference": Score("similarity", "reference", similarity.plasticity_reference),
}
#: Sources that look at the weights alone: no other data would give another ranking.
DATA_FREE = ("spectra", "weights")
FAMILIES = tuple(dict.fromkeys(score.family for score in SCORES.values()))
