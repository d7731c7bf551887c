"""Fronts of score against cost. Oracles: brute force over the definition, a sweep by cost, cells by hand."""

from __future__ import annotations

import random

import pytest
from compare_cells_kit import cell, cells_of, random_cells

from dsfreeze.compare.pareto import COSTS, pareto_front, pareto_fronts


def swept(points):
    """The front by another way: in order of cost, whoever scores more than all that cost less, and as much as any of equal cost."""
    best = {}
    for score, cost in points:
        best[cost] = max(score, best.get(cost, score))
    return [score == best[cost] and all(score > s for c, s in best.items() if c < cost) for score, cost in points]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_that_of_a_sweep(seed):
    """Few values, so that equal scores, equal costs and equal points come up."""
    draw = random.Random(seed)
    points = [(draw.randint(0, 6), draw.randint(0, 6)) for _ in range(15)]
    assert pareto_front(points) == swept(points)


def test_equal_points_are_both_on_the_front():
    assert pareto_front([(70, 2), (70, 2), (60, 1), (70, 3), (69, 2)]) == [True, True, True, False, False]
    assert pareto_front([]) == []


def test_points_are_means_over_cases_of_means_over_seeds():
    """x: seeds 60 and 70; y: one seed that both have, 90. Mean (65 + 90) / 2; seconds (15 + 30) / 2."""
    cells = (
        cell("a", "x", 1, 60.0, seconds=10.0)
        | cell("a", "x", 2, 70.0, seconds=20.0)
        | cell("a", "y", 1, 90.0, seconds=30.0)
    )
    cells |= cell("a", "y", 2, 10.0) | cells_of({"b": {"x": [50.0, 50.0], "y": [50.0]}})
    seconds = pareto_fronts(cells)[0]
    assert (seconds.num_cases, seconds.num_runs) == (2, 3)
    assert (seconds.points[0].score, seconds.points[0].cost) == (77.5, 22.5)
    assert [point.on_front for point in seconds.points] == [True, False]


def test_costs_are_in_the_units_of_their_labels():
    """60 s, 1 GiB, 10 million, 1e15 FLOPs."""
    found = {front.cost.label: front.points[0].cost for front in pareto_fronts(cells_of({"a": {"x": [70.0]}}))}
    assert found == {
        "run time (s)": 60,
        "peak memory (GiB)": 1,
        "trains (M)": 10,
        "compute (TFLOP)": 1000,
    }


def test_who_lacks_a_cost_or_a_score_is_named_and_not_on_that_front():
    cells = (
        cells_of({"a": {"x": [70.0]}})
        | cells_of({"b": {"x": [80.0]}}, flops=None)
        | cell("c", "x", 1, None, status="failed")
    )
    cells |= cell("a", "y", 1, 70.0) | cell("b", "y", 1, 80.0)  # b has this cost here, and not on x
    fronts = {front.cost.key: front for front in pareto_fronts(cells)}
    assert fronts["flops"].left_out == ("b", "c")
    assert fronts["seconds"].left_out == ("c",)
    assert [point.method for point in fronts["flops"].edge] == ["a"]


def test_models_have_fronts_of_their_own():
    cells = cells_of({"a": {"x": [70.0]}}) | cells_of({"a": {"x": [80.0]}}, model="big", seconds=600.0)
    fronts = pareto_fronts(cells)
    assert [(front.model, front.cost) for front in fronts] == [
        (model, cost) for model in ("small", "big") for cost in COSTS
    ]
    assert [(front.points[0].score, front.points[0].cost) for front in fronts[::4]] == [(70, 60), (80, 600)]
    assert all(front.points[0].on_front for front in fronts)


def test_the_edge_rises_with_cost():
    """Oracle: along a front more cost buys more score."""
    edge = pareto_fronts(random_cells(12, 3, 1))[0].edge
    assert [point.cost for point in edge] == sorted(point.cost for point in edge)
    assert [point.score for point in edge] == sorted(point.score for point in edge)


def test_no_finished_cell_no_points():
    assert pareto_fronts({}) == []
    assert all(front.points == () for front in pareto_fronts(cell("a", "x", 1, None, status="waiting")))
