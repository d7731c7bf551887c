"""The learning rate as a function of the step. Oracle: the closed forms of linear and cosine decay."""

import math

import pytest

from dsfreeze.plan import FreezePlan, Phase, Rate
from dsfreeze.recipe import TrainOptions
from dsfreeze.schedule import learning_rate_schedule, rates_at


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


PHASES = (Phase(0, 4, ("a",)), Phase(4, 4, ("b",), lr_step=4), Phase(8, None, ("a",)))


def rates(plan, steps, peak=2.0):
    return [rates_at(plan, step, lambda step: 1.0 - step / 16, peak)[0] for step in steps]


def test_a_phase_may_share_one_rate():
    """HiFT: one learning rate a sweep. Oracle: f(step) read at the phase's own step."""
    plan = FreezePlan("made", PHASES)
    assert rates(plan, (3, 4, 5, 7, 8)) == [13 / 16, 12 / 16, 12 / 16, 12 / 16, 8 / 16]


def test_the_rate_rises_again_after_a_switch():
    """Oracle: 1/3, 2/3, 1 of f(step) with two steps of re-warm-up, and nothing at the run's start."""
    plan = FreezePlan("made", (PHASES[0], Phase(4, None, ("b",))), rewarmup_steps=2)
    assert rates(plan, (0, 3, 4, 5, 6)) == pytest.approx([1, 13 / 16, 12 / 48, 22 / 48, 10 / 16])


def test_layers_with_rates_of_their_own():
    """Oracle: ULMFiT's scale, and FreezeOut's half cosine from the peak rate, by hand."""
    plan = FreezePlan("made", (Phase(0, None, ("a",)),), rates=(Rate("layers.0", 0.25), Rate("layers.1", 2.0, 4)))
    rate, own = rates_at(plan, 1, lambda step: 1.0, 3.0)
    assert (rate, own["layers.0"]) == (1.0, 0.25)
    assert own["layers.1"] == pytest.approx(2 * 3 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates_at(plan, 4, lambda step: 1.0, 3.0)[1]["layers.1"] == 0
