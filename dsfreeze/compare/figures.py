"""The comparison's figures: critical differences of ranks, score against costs, scores by task. Need seaborn.

Each function gives a matplotlib Figure that belongs to its caller (nothing is registered with pyplot, so nothing need be closed):
`figure.savefig(path)` writes PNG or SVG. Methods keep one colour and marker in all figures of a summary; the colours are seaborn's
colour-blind ones, and no two of 60 methods share both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dsfreeze.compare.pareto import Front, Point
from dsfreeze.compare.resampling import LEVEL
from dsfreeze.compare.rows import case_names
from dsfreeze.compare.statistics import CaseScore, Family, Summary
from dsfreeze.compare.verdicts import num_blocks
from dsfreeze.errors import UserError
from dsfreeze.plotting import EXTRA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>dh"
#: Costs whose largest is so many times the smallest are drawn on a logarithmic axis.
_WIDE = 20
#: Panels side by side.
_COLUMNS = 4


def score_figure(summary: Summary) -> Figure:
    """Scores by task: a panel for each case, a row for each method; the mean and its bootstrap interval, and below them a tick for each seed."""
    names = case_names(score.case for score in summary.cases)
    styles = styles_of(summary.methods)
    columns = min(_COLUMNS, max(1, len(names)))
    lines = max(1, math.ceil(len(names) / columns))
    size = (max(6.5, 2.2 + 2.6 * columns), 1.1 + lines * (0.9 + 0.24 * len(summary.methods)))
    figure, axes = _panels(lines, columns, size, sharey=True)
    for axis, case in zip(axes, names, strict=False):
        _score_panel(axis, [s for s in summary.cases if s.case == case], summary.methods, styles)
        axis.set_title(_plain(names[case]), fontsize=10)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(names) - columns) : len(names)]:
        axis.set_xlabel("score (0 to 100)")
    if not names:
        return _empty("no cell has a score yet")
    figure.suptitle(f"scores: mean over seeds, bar {LEVEL:.0%} bootstrap interval, ticks below the seeds", fontsize=11)
    return figure


def _score_panel(axis: Any, scores: Sequence[CaseScore], methods: Sequence[str], styles: Mapping[str, Any]) -> None:
    for score in scores:
        row, style = methods.index(score.method), styles[score.method]
        axis.plot(score.scores, [row + 0.3] * len(score.scores), "|", color="0.45", markersize=5)
        if score.interval:
            axis.plot([score.interval.low, score.interval.high], [row, row], color=style["color"], linewidth=1.8)
        axis.plot(score.mean, row, markersize=6, linestyle="none", zorder=3, **style)
    axis.set_yticks(range(len(methods)), [_plain(method) for method in methods])
    axis.set_ylim(len(methods) - 0.5, -0.5)
    axis.margins(x=0.12)


def pareto_figure(fronts: Sequence[Front], methods: Sequence[str]) -> Figure:
    """Score against each cost, a line of panels for each model: every method a point, the front a staircase; only its methods are named in
    place. `methods`: the summary's, so that each has its style."""
    models = list(dict.fromkeys(front.model for front in fronts))
    if not any(front.points for front in fronts):
        return _empty("no case has a score and a cost of every method yet")
    styles = styles_of(methods)
    columns = len(fronts) // len(models)
    figure, axes = _panels(len(models), columns, (3.6 * columns + 0.4, 3.5 * len(models) + 1.1), sharey="row")
    for axis, front in zip(axes, fronts, strict=True):
        _pareto_panel(axis, front, styles)
    for axis in axes[::columns]:
        axis.set_ylabel("score (0 to 100)")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(7, len(handles)),
        fontsize=9,
        frameon=False,
    )
    figure.draw_without_rendering()  # the layout, which says where there is room for names
    for axis, front in zip(axes, fronts, strict=True):
        _name_points(axis, front.edge)
    return figure


def _pareto_panel(axis: Any, front: Front, styles: Mapping[str, Any]) -> None:
    edge = front.edge
    if edge:
        axis.step(
            [p.cost for p in edge],
            [p.score for p in edge],
            where="post",
            color="0.4",
            linewidth=1.2,
            label="Pareto front",
        )
    for point in front.points:
        alpha, size = (1.0, 8) if point.on_front else (0.8, 6)
        axis.plot(
            point.cost, point.score, linestyle="none", markersize=size, alpha=alpha, label=_plain(point.method), zorder=3,
            **styles[point.method],
        )  # fmt: skip
    costs = [point.cost for point in front.points]
    if costs and 0 < _WIDE * min(costs) < max(costs):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(0.16)
    axis.set_xlabel(front.cost.label)
    axis.set_title(
        f"{_plain(front.model)}: {num_blocks(front.num_cases, 'case')}, {num_blocks(front.num_runs, 'run')} a method",
        fontsize=10,
    )


def _name_points(axis: Any, edge: Sequence[Point]) -> None:
    """The front's methods beside their points, the best first, each at the first of four places where it covers no other name, nor a point of the
    front, and stays in the panel; where there is none the legend has to do."""
    from matplotlib.transforms import Bbox

    centres = [axis.transData.transform((point.cost, point.score)) for point in edge]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centres]
    for point in reversed(edge):
        for x, y in ((7, 5), (-7, 5), (7, -12), (-7, -12)):
            name = axis.annotate(
                _plain(point.method), (point.cost, point.score), xytext=(x, y), textcoords="offset points", fontsize=8,
                ha="left" if x > 0 else "right", in_layout=False,
            )  # fmt: skip
            box = name.get_window_extent()
            if axis.bbox.containsx(box.x0) and axis.bbox.containsx(box.x1) and not box.count_overlaps(taken):
                taken.append(box)
                break
            name.remove()


def critical_difference_figure(family: Family) -> Figure:
    """Demsar's diagram: methods on a line of average ranks, the best at the left; a bar joins those that the Nemenyi test does not tell apart."""
    ranks = family.ranks
    if ranks.critical_difference is None:
        return _empty("no average ranks: fewer than two methods share a block")
    half = math.ceil(len(ranks.methods) / 2)
    depth = 0.34 * len(ranks.groups) + 0.35
    figure, (axis,) = _panels(1, 1, (9, 1.5 + 0.3 * (depth + 0.75 * half)), style="white")
    low, high = 1, len(ranks.methods)
    axis.set_xlim(low - 0.45 * (high - low), high + 0.45 * (high - low))
    axis.set_ylim(-(depth + 0.75 * half), 1.9)
    axis.axis("off")
    _rank_line(axis, low, high, ranks.critical_difference)
    for level, group in enumerate(ranks.groups):
        ends = [ranks.average[group[0]], ranks.average[group[-1]]]
        margin, height = 0.012 * (high - low), -0.34 * (level + 1)
        axis.plot(
            [ends[0] - margin, ends[1] + margin], [height] * 2, color="0.15", linewidth=3.5, solid_capstyle="butt"
        )
    for place, method in enumerate(ranks.methods):
        side = place if place < half else len(ranks.methods) - 1 - place
        _named_rank(axis, method, ranks.average[method], -(depth + 0.75 * side), (low, high), place < half)
    over = num_blocks(ranks.num_blocks, family.unit)
    axis.set_title(
        f"average rank over {over} (1 is best); bars join what the Nemenyi test at {family.alpha:g} does not tell apart",
        fontsize=10,
    )
    return figure


def _rank_line(axis: Any, low: int, high: int, difference: float) -> None:
    """The axis with its ticks, and above it the critical difference as a length."""
    axis.plot([low, high], [0, 0], color="0.15", linewidth=1.2)
    for rank in range(low, high + 1):
        axis.plot([rank, rank], [0, 0.18], color="0.15", linewidth=1.2)
        axis.text(rank, 0.28, str(rank), ha="center", va="bottom", fontsize=9)
    shown = min(difference, high - low)
    axis.plot([low, low + shown], [1.25, 1.25], color="0.15", linewidth=1.2, marker="|", markersize=8)
    wider = ", wider than the line" if difference > high - low else ""
    axis.text(
        low + shown / 2, 1.4, f"critical difference {difference:.2f}{wider}", ha="center", va="bottom", fontsize=9
    )


def _named_rank(axis: Any, method: str, rank: float, height: float, ends: tuple[int, int], left: bool) -> None:
    """A bent line from the rank to the method's name at the side."""
    low, high = ends
    side = low - 0.06 * (high - low) if left else high + 0.06 * (high - low)
    axis.plot([rank, rank, side], [0, height, height], color="0.45", linewidth=0.9)
    text = f"{method}  {rank:.2f}" if left else f"{rank:.2f}  {method}"
    axis.text(side, height, f" {_plain(text)} ", ha="right" if left else "left", va="center", fontsize=9)


def _plain(name: str) -> str:
    """A name as it stands: between dollar signs matplotlib would read a formula."""
    return name.replace("$", r"\$")


def styles_of(methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour and marker of each method."""
    palette = _seaborn().color_palette("colorblind", 10)
    return {
        method: {
            "color": palette[i % 10],
            "marker": _MARKERS[(i + i // 10) % len(_MARKERS)],
            "markeredgecolor": "0.2",
            "markeredgewidth": 0.6,
        }
        for i, method in enumerate(methods)
    }


def _panels(
    lines: int,
    columns: int,
    size: tuple[float, float],
    sharey: bool | Literal["row"] = False,
    style: str = "whitegrid",
) -> tuple[Figure, list[Any]]:
    seaborn = _seaborn()
    from matplotlib.figure import Figure

    with seaborn.axes_style(style):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False, sharey=sharey)
    return figure, list(axes.flat)


def _empty(reason: str) -> Figure:
    figure, (axis,) = _panels(1, 1, (6, 1.2), style="white")
    axis.axis("off")
    axis.text(0.5, 0.5, reason, ha="center", va="center")
    return figure


def _seaborn() -> Any:
    try:
        import seaborn
    except ImportError:
        raise UserError(EXTRA) from None
    return seaborn
