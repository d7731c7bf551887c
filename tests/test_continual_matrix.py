"""The result matrix and its numbers. Oracles: sums written out by hand."""

from __future__ import annotations

import pytest

from dsfreeze.continual.matrix import Matrix, spread, spreads

TWO = Matrix([[80, None], [70, 90]], start=[10, 20])
THREE = Matrix([[60, 30, 5], [70, 80, 20], [50, 75, 90]], start=[10, 20, 10])


def test_the_matrix_of_the_protocol():
    """[[80, -], [70, 90]]: OP (70 + 90) / 2, BWT (70 - 80) / 1, or / 2."""
    assert TWO.overall_performance() == 80
    assert TWO.backward_transfer() == -10
    assert TWO.backward_transfer("T") == -5
    assert TWO.forgetting() == 10
    assert TWO.learning_accuracy() == 85
    assert TWO.forward_transfer() is None  # R[1][2] was not measured


def test_three_tasks():
    assert THREE.overall_performance() == pytest.approx((50 + 75 + 90) / 3)
    assert THREE.backward_transfer() == pytest.approx(((50 - 60) + (75 - 80)) / 2)
    assert THREE.backward_transfer("T") == pytest.approx(((50 - 60) + (75 - 80)) / 3)
    # the first task was best after round 2
    assert THREE.forgetting() == pytest.approx(((70 - 50) + (80 - 75)) / 2)
    assert THREE.forward_transfer() == pytest.approx(((30 - 20) + (20 - 10)) / 2)
    assert THREE.learning_accuracy() == pytest.approx((60 + 80 + 90) / 3)
    assert list(THREE.numbers()) == ["op", "bwt", "bwt_over_t", "forgetting", "fwt", "learning_accuracy"]


def test_a_task_that_still_gains_is_forgotten_less_than_nothing():
    """The last round is no candidate for the best one: 50 - 60."""
    assert Matrix([[50, 0], [60, 70]]).forgetting() == -10


@pytest.mark.parametrize("matrix", [Matrix([[80, 10]], [1, 2]), Matrix([], [1, 2]), Matrix([])])
def test_an_unfinished_sequence_has_no_numbers(matrix):
    assert set(matrix.numbers().values()) == {None}


def test_one_task_has_no_transfer():
    numbers = Matrix([[80]], [10]).numbers()
    assert (numbers["op"], numbers["learning_accuracy"]) == (80, 80)
    assert numbers["bwt"] is numbers["bwt_over_t"] is numbers["forgetting"] is numbers["fwt"] is None


def test_the_diagonal_and_the_last_row_are_enough_for_all_but_two():
    """Oracle: the same numbers of the full matrix; forgetting and forward transfer need what is missing."""
    sparse = Matrix([[60, None, None], [None, 80, None], [50, 75, 90]], start=THREE.start)
    full, part = THREE.numbers(), sparse.numbers()
    assert {k: v for k, v in part.items() if v is not None} == {
        k: v for k, v in full.items() if k not in ("forgetting", "fwt")
    }


def test_deviations_of_seeds_and_of_draws_are_told_apart():
    """Seeds 1 (draws 10, 14) and 2 (draws 20, 20): means 12 and 20, variances 8 and 0."""
    found = spread({(1, 0): 10, (1, 1): 14, (2, 0): 20, (2, 1): 20})
    assert found.mean == 16
    assert found.over_seeds == pytest.approx(32**0.5)
    assert found.over_draws == pytest.approx(4**0.5)
    assert (found.num_seeds, found.num_runs) == (2, 4)


def test_one_seed_has_no_deviation():
    found = spread({(1, None): 10})
    assert (found.mean, found.over_seeds, found.over_draws) == (10, None, None)
    assert spread({(1, None): None}) is None
    assert spreads({(1, None): {"op": 3, "bwt": None}})["bwt"] is None
