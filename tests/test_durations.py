"""Seconds of steps against plain lists. Oracle: `statistics.median` and `sum` of them."""

from __future__ import annotations

import statistics
from random import Random

import pytest

from dsfreeze.durations import LATEST, Durations


@pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 101, LATEST, LATEST + 1, LATEST + 2, 3 * LATEST])
@pytest.mark.parametrize("warming", [0, 2])
def test_as_plain_lists_have_it(number, warming):
    random = Random(number)
    seconds = [random.random() for _ in range(number)]
    durations = Durations()
    for each in seconds:
        durations.add(each)
    latest = [each for step, each in enumerate(seconds) if step >= max(warming, number - LATEST)] or seconds
    assert durations.median(warming=warming) == (statistics.median(latest) if latest else None)
    assert (durations.number, durations.total) == (number, pytest.approx(sum(seconds)))


def test_no_more_is_held_than_that():
    """Oracle: the elements of what it holds."""
    durations = Durations()
    for _ in range(3 * LATEST):
        durations.add(1.0)
    assert sum(len(held) for held in vars(durations).values() if hasattr(held, "__len__")) == LATEST
