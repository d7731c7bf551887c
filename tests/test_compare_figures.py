"""The comparison's figures. Oracles: what matplotlib's own objects hold against the numbers drawn; figures were looked at as pictures."""

from __future__ import annotations

import io
import itertools
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from compare_cells_kit import cell, random_cells

from dsfreeze.analyze.figure import EXTRA
from dsfreeze.compare.figures import critical_difference_figure, pareto_figure, score_figure, styles_of
from dsfreeze.compare.pareto import COSTS, pareto_fronts
from dsfreeze.compare.statistics import summarise
from dsfreeze.errors import UserError

CELLS = random_cells(6, 7, 3, gain=2)
EMPTY = cell("a", "x", 1, None, status="waiting")


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def test_the_diagram_has_every_rank_and_a_bar_for_each_group():
    family = summarise(CELLS).families[0]
    figure = critical_difference_figure(family)
    named = "".join(texts(figure))
    for method, rank in family.ranks.average.items():
        assert method in named
        assert f"{rank:.2f}" in named
    assert f"critical difference {family.ranks.critical_difference:.2f}" in named
    bars = [line for line in figure.axes[0].lines if line.get_linewidth() == 3.5]
    ends = [[min(line.get_xdata()), max(line.get_xdata())] for line in bars]
    groups = [[family.ranks.average[group[0]], family.ranks.average[group[-1]]] for group in family.ranks.groups]
    assert len(ends) == len(groups)
    for end, group in zip(ends, groups, strict=True):
        assert end == pytest.approx(group, abs=0.1)
    assert "over 7 cases" in figure.axes[0].get_title()


def test_four_panels_with_units_a_staircase_and_every_method_in_the_legend():
    fronts = pareto_fronts(CELLS)
    figure = pareto_figure(fronts, summarise(CELLS).methods)
    assert figure.axes[0].get_ylabel() == "score (0 to 100)"
    assert [axis.get_xlabel() for axis in figure.axes] == [cost.label for cost in COSTS]
    for axis, front in zip(figure.axes, fronts, strict=True):
        stairs = next(line for line in axis.lines if line.get_label() == "Pareto front")
        assert stairs.get_drawstyle() == "steps-post"
        assert list(zip(stairs.get_xdata(), stairs.get_ydata(), strict=True)) == [(p.cost, p.score) for p in front.edge]
        assert {text.get_text() for text in axis.texts} == {point.method for point in front.edge}
    assert {text.get_text() for text in figure.legends[0].texts} == {"Pareto front", *(f"method{k}" for k in range(6))}


def test_names_cover_neither_each_other_nor_the_front():
    """Oracle: every pair of text boxes, and every point of a front that is crowded with 15 methods."""
    cells = {key: {**value, "score": 50 + value["seconds"] / 9} for key, value in random_cells(15, 2, 1).items()}
    fronts = pareto_fronts(cells)
    axis = pareto_figure(fronts, summarise(cells).methods).axes[0]
    boxes = [text.get_window_extent() for text in axis.texts]
    assert 5 < len(boxes) <= len(fronts[0].edge) == 15
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    assert not any(box.contains(*axis.transData.transform((p.cost, p.score))) for box in boxes for p in fronts[0].edge)


def test_a_panel_for_each_case_with_means_intervals_and_seeds():
    summary = summarise(CELLS)
    figure = score_figure(summary)
    seen = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in seen] == [f"task{k:02}" for k in range(7)]
    score = summary.cases[0]
    drawn = [list(line.get_xdata()) for line in seen[0].lines]
    assert list(score.scores) in drawn
    assert [score.interval.low, score.interval.high] in drawn
    assert [score.mean] in drawn
    assert [label.get_text() for label in seen[0].get_yticklabels()] == list(summary.methods)


def test_no_two_methods_look_alike():
    names = [f"m{k}" for k in range(60)]
    assert len({(style["color"], style["marker"]) for style in styles_of(names).values()}) == 60


def test_figures_are_svg_and_register_nothing():
    """Oracles: an XML parser; pyplot's own list of open figures."""
    from matplotlib import pyplot

    summary = summarise(CELLS)
    before = pyplot.get_fignums()
    for figure in (
        score_figure(summary),
        pareto_figure(pareto_fronts(CELLS), summary.methods),
        critical_difference_figure(summary.families[0]),
    ):
        page = io.BytesIO()
        figure.savefig(page, format="svg")
        assert ElementTree.fromstring(page.getvalue()).tag.endswith("svg")
    assert pyplot.get_fignums() == before


def test_nothing_to_draw_is_said_in_the_figure():
    summary = summarise(EMPTY)
    for figure in (
        score_figure(summary),
        pareto_figure(pareto_fronts(EMPTY), summary.methods),
        critical_difference_figure(summary.families[0]),
    ):
        assert " yet" in texts(figure)[0] or "no average ranks" in texts(figure)[0]


def test_names_are_no_markup():
    """Oracle: matplotlib draws it; a dollar sign would begin a formula that does not parse."""
    cells = {
        key: {**value, "method": value["method"] + " $^$ <b>", "task": "a$\\frac$"} for key, value in CELLS.items()
    }
    summary = summarise(cells)
    for figure in (
        score_figure(summary),
        pareto_figure(pareto_fronts(cells), summary.methods),
        critical_difference_figure(summary.families[0]),
    ):
        figure.savefig(io.BytesIO(), format="png", dpi=40)


def test_without_seaborn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "seaborn", None)
    with pytest.raises(UserError) as told:
        score_figure(summarise(CELLS))
    assert str(told.value) == EXTRA
