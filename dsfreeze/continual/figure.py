"""The learn-forget figure: what was learnt against what was kept, a point for each method. Needs seaborn.

Left: learning accuracy against what is retained. Right: what is retained against how far the weights moved; the size of a point is the
share of the weights that trained. Both are controls: whoever moves less forgets less, whatever the method. WiSE-FT of full tuning is a
line from the start model to the tuned one; a method is worth its name above that line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsfreeze.continual.results import general_ability
from dsfreeze.plotting import EXTRA

Spreads = Mapping[str, Any]


def draw_figure(state: Mapping[str, Any], path: Path) -> str:
    """Write the figure; the empty text, or why there is none."""
    try:
        import matplotlib
        import seaborn
    except ImportError:
        return EXTRA
    points = {label: numbers for label, numbers in state["summary"].items() if numbers.get(retained_of(state)[0])}
    if not points:
        return "no method has finished all rounds"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with seaborn.axes_style("whitegrid"):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharey=True)
        colours = _colours(seaborn, state, points)
        _learn_forget(left, state, points, colours)
        _controls(right, state, points, colours)
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return ""


def retained_of(state: Mapping[str, Any]) -> tuple[str, str]:
    """The number that says what is retained, and its axis: the probes' mean, or without probes the tasks' after the last round."""
    if state["probes"]:
        return "general_ability", "general ability: mean score of the probes (0 to 100)"
    return "op", "OP: mean score on all tasks (0 to 100)"


def _curve(state: Mapping[str, Any], points: Mapping[str, Spreads]) -> list[str]:
    """The labels of WiSE-FT's points, by alpha."""
    alphas = {run["label"]: run["alpha"] for run in state["runs"].values() if run["alpha"] is not None}
    return sorted((label for label in points if label in alphas), key=lambda label: alphas[label])


def _colours(seaborn: Any, state: Mapping[str, Any], points: Mapping[str, Spreads]) -> dict[str, Any]:
    curve = set(_curve(state, points))
    names = [label for label in points if label not in curve]
    return dict(zip(names, seaborn.color_palette("husl" if len(names) > 10 else "colorblind", len(names)), strict=True))


def _learn_forget(
    axis: Any, state: Mapping[str, Any], points: Mapping[str, Spreads], colours: Mapping[str, Any]
) -> None:
    key, label = retained_of(state)
    curve = [name for name in _curve(state, points) if points[name]["learning_accuracy"]]
    if curve:
        ends = [[points[name][number]["mean"] for name in curve] for number in ("learning_accuracy", key)]
        axis.plot(*ends, color="0.4", marker=".", linewidth=1.2, label="WiSE-FT of full tuning, by alpha", zorder=1)
        for name in (curve[0], curve[len(curve) // 2], curve[-1]):
            at = points[name]["learning_accuracy"]["mean"], points[name][key]["mean"]
            axis.annotate(
                name.partition("@")[2], at, xytext=(4, 4), textcoords="offset points", fontsize=8, color="0.3"
            )
    for number, (name, colour) in enumerate(colours.items()):
        x, y = points[name].get("learning_accuracy"), points[name][key]
        if x is None:  # a bound without rounds of its own: what it keeps, at any x
            axis.axhline(y["mean"], color=colour, linestyle="--", linewidth=1, label=name)
            continue
        axis.errorbar(
            x["mean"], y["mean"], xerr=x["over_seeds"], yerr=y["over_seeds"], color=colour, label=name, capsize=3,
            marker="osD^vP*X<>"[number % 10], markersize=7, linestyle="none", zorder=2,
        )  # fmt: skip
    before = general_ability(state, state["start"]["scores"])
    if key == "general_ability" and before is not None:
        axis.axhline(before, color="0.7", linestyle=":", linewidth=1.2, label="start model")
    axis.set_xlabel("score on each task right after its round (learning accuracy, 0 to 100)")
    axis.set_ylabel(label)
    axis.set_title("learnt against retained after the last round; bars: deviation over seeds", fontsize=10)


def _controls(axis: Any, state: Mapping[str, Any], points: Mapping[str, Spreads], colours: Mapping[str, Any]) -> None:
    key, _ = retained_of(state)
    curve = _curve(state, points)
    if curve:
        norms = [points[name]["update_norm"]["mean"] for name in curve]
        axis.plot(
            norms, [points[name][key]["mean"] for name in curve], color="0.4", marker=".", linewidth=1.2, zorder=1
        )
    for number, (name, colour) in enumerate(colours.items()):
        x, y, share = points[name]["update_norm"], points[name][key], points[name].get("trainable_share")
        size = 30 + 170 * (share["mean"] if share else 1.0)
        axis.errorbar(
            x["mean"], y["mean"], xerr=x["over_seeds"], yerr=y["over_seeds"], color=colour, capsize=3, linestyle="none"
        )
        axis.scatter(x["mean"], y["mean"], s=size, color=colour, marker="osD^vP*X<>"[number % 10], zorder=2)
    axis.set_xlabel("distance of the last model from the start model (L2 norm over all weights)")
    axis.set_title("retained against size of the update; area: share of weights that trained", fontsize=10)
