"""The learning rate as a function of the step. Oracle: the closed forms of linear and cosine decay."""

import math

import pytest

from dsfreeze.recipe import TrainOptions
from dsfreeze.schedule import learning_rate_schedule


def test_linear_with_warmup():
    f = learning_rate_schedule(TrainOptions(learning_rate=1.0, warmup_steps=10), 110)
    expected = [min(s / 10, (110 - s) / 100) for s in range(110)]
    assert [f(s) for s in range(110)] == pytest.approx(expected)


def test_warmup_ratio_rounds_up():
    f = learning_rate_schedule(
        TrainOptions(learning_rate=2.0, warmup_ratio=0.1, lr_scheduler_type="constant_with_warmup"), 15
    )
    assert [f(s) for s in range(4)] == pytest.approx([0.0, 1.0, 2.0, 2.0])


def test_cosine():
    f = learning_rate_schedule(TrainOptions(learning_rate=1.0, lr_scheduler_type="cosine"), 100)
    assert f(25) == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))


def test_constant():
    f = learning_rate_schedule(TrainOptions(learning_rate=3e-5, lr_scheduler_type="constant"), 10)
    assert {f(s) for s in range(10)} == {3e-5}
