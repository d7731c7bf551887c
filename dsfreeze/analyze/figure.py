"""The figure of an analysis: layers x scores as a heatmap, and the deviation's trace with the cut. Needs seaborn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsfreeze.plotting import EXTRA


def draw_figure(content: Mapping[str, Any], path: Path) -> str:
    """Write the figure; the empty text, or why there is none."""
    try:
        import matplotlib
        import seaborn
    except ImportError:
        return EXTRA
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, number = list(content["all"]), content["model"]["layers"]
    rows = 2 if content["traces"] else 1
    heights = [0.32 * len(names) + 0.6, 3.2][:rows]
    with seaborn.axes_style("whitegrid"):
        figure, axes = pyplot.subplots(
            rows, 1, figsize=(max(7, 0.3 * number + 4), sum(heights) + 1.2), height_ratios=heights, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        _heatmap(seaborn, axes[0][0], content, names, number)
        if rows == 2:
            _trace(axes[1][0], content, number)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return ""


def _heatmap(seaborn: Any, axis: Any, content: Mapping[str, Any], names: list[str], number: int) -> None:
    """Each score by its rank among the layers: units differ, orders compare."""
    ranks = []
    for name in names:
        scores = content["all"][name]["scores"]
        values = np.asarray([scores[f"layers.{k}"] for k in range(number)])
        ranks.append(values.argsort().argsort() / max(1, number - 1))
    rho = [content["all"][name]["spearman"] for name in names]
    labels = [f"{name} ({'no data' if r is None else f'{r:.2f}'})" for name, r in zip(names, rho, strict=True)]
    seaborn.heatmap(
        np.asarray(ranks), ax=axis, cmap="viridis", vmin=0, vmax=1, yticklabels=labels, linewidths=0.2,
        cbar_kws={"label": "rank among the layers (1: matters most)"},
    )  # fmt: skip
    axis.set_xlabel("transformer layer (bold: recommended)")
    axis.set_title(
        f"{content['model']['name']}, {content['data']['num_examples']} examples; in brackets the rank agreement of halves",
        fontsize=10,
    )
    chosen = {int(name.rpartition(".")[2]) for name in content["recommendation"].get("layers", ())}
    for tick, label in enumerate(axis.get_xticklabels()):
        label.set_fontweight("bold" if int(label.get_text() or tick) in chosen else "normal")


def _trace(axis: Any, content: Mapping[str, Any], number: int) -> None:
    """Mean and spread of the deviation in each space, beside the control; the median cut of each gain."""
    spaces = np.arange(number + 1)
    for name, colour in (("deviation", "C0"), ("deviation_random", "0.6")):
        rows = np.asarray(content["traces"][name])
        label = {"deviation": "label (mean and deviation of examples)", "deviation_random": "random basis (control)"}[
            name
        ]
        axis.plot(spaces, rows.mean(0), color=colour, label=label)
        axis.fill_between(spaces, rows.mean(0) - rows.std(0), rows.mean(0) + rows.std(0), color=colour, alpha=0.2, lw=0)
    ends: dict[int, list[str]] = {}
    for gain, cuts in content["cuts"].items():
        ends.setdefault(cuts["dataset"]["median"], []).append(gain.upper())
    for style, (end, gains) in zip(("-", "--", "-.", ":"), ends.items(), strict=False):
        axis.axvline(end, color="C3", linestyle=style, label=f"end of freezing, gain {', '.join(gains)}")
    axis.set_xlim(0, number)
    axis.set_xlabel("latent space (0: embedding; k: output of layer k - 1)")
    axis.set_ylabel("deviation, 1 - cosine")
    axis.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))
