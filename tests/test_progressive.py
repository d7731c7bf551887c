"""Sweep, gradual unfreezing, FreezeOut and step ranges against schedules written down by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from math import isclose

import anatomies
import pytest

from dsfreeze.anatomy import Anatomy
from dsfreeze.cli import run
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Rate
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan


def plan_of(anatomy: Anatomy, steps: int | None = 100, **options) -> FreezePlan:
    return make_plan(anatomy, FreezeOptions(**options), steps)


def active(anatomy: Anatomy, plan: FreezePlan) -> list[tuple[int, int | None, str]]:
    """(first step, number of steps, what trains) of each phase: E embedding, digits layers, N norm, H head."""
    letters = {"embed": "E", "norm": "N", "head": "H"}
    adapted = plan.adapted(anatomy)
    rows = []
    for phase in plan.phases:
        names = dict.fromkeys(adapted.layer_of[name].name for name in phase.trainable)
        rows.append(
            (phase.first_step, phase.num_steps, "".join(letters.get(n, n.removeprefix("layers.")) for n in names))
        )
    return rows


# -- sweep ---------------------------------------------------------------------------------------------------------


def test_sweep_slides_from_input_to_output():
    """Oracle: by hand; 10 steps over 4 places are 2, 3, 2, 3, and the embedding trains with layers.0 alone."""
    anatomy = anatomies.llama()
    plan = plan_of(anatomy, 10, strategy="sweep")
    assert active(anatomy, plan) == [(0, 2, "E0NH"), (2, 3, "1NH"), (5, 2, "2NH"), (7, 3, "3NH")]
    assert plan.state == "clear"
    wide = plan_of(anatomy, 9, strategy="sweep", active_layers=2, order="descending")
    assert active(anatomy, wide) == [(0, 3, "23NH"), (3, 3, "12NH"), (6, 3, "E01NH")]


def test_a_tied_head_goes_with_the_embedding_and_it_is_said():
    anatomy = anatomies.llama(tied=True)
    plan = plan_of(anatomy, 8, strategy="sweep")
    assert active(anatomy, plan) == [(0, 2, "E0N"), (2, 2, "1N"), (4, 2, "2N"), (6, 2, "3N")]
    assert any("both train only while layers.0 does" in note for note in plan.notes)
    kept = plan_of(anatomy, 8, strategy="sweep", embed="train")
    assert {row[2][0] for row in active(anatomy, kept)} == {"E"}
    assert not any("only while layers.0" in note for note in kept.notes)


@pytest.mark.parametrize("strategy", ["sweep", "gradual_unfreezing"])
def test_a_run_too_short_for_its_stages(strategy):
    parts = "stages" if strategy == "gradual_unfreezing" else "places for its window"
    told = rf"has 4 {parts}, but .*only 3 steps.*train.max_steps or freeze.active_layers"
    with pytest.raises(UserError, match=told):
        plan_of(anatomies.llama(), 3, strategy=strategy)
    assert [phase.num_steps for phase in plan_of(anatomies.llama(), 4, strategy=strategy).phases] == [1, 1, 1, 1]


# -- gradual unfreezing --------------------------------------------------------------------------------------------


def test_gradual_unfreezing_grows_from_the_top():
    """Oracle: by hand: head and top group first, one more group a stage, everything in the last."""
    anatomy = anatomies.llama()
    stages = [(0, 3, "3NH"), (3, 3, "23NH"), (6, 3, "123NH"), (9, 3, "E0123NH")]
    assert active(anatomy, plan_of(anatomy, 12, strategy="gradual_unfreezing")) == stages
    given = plan_of(anatomy, 20, strategy="gradual_unfreezing", switch_every=3)
    assert active(anatomy, given) == [*stages[:3], (9, 11, "E0123NH")]
    cut = plan_of(anatomy, 7, strategy="gradual_unfreezing", switch_every=3)
    assert active(anatomy, cut) == [*stages[:2], (6, 1, "123NH")]
    assert any("never train" in note for note in cut.notes)
    odd = plan_of(anatomy, 8, strategy="gradual_unfreezing", active_layers=3)
    assert active(anatomy, odd) == [(0, 4, "123NH"), (4, 4, "E0123NH")]


def test_what_is_told_of_stages():
    """Oracle: by hand: 4 places of 10 steps settle, 1 / (1 - beta1) = 10, those of 9 do not; 4 stages of 5 steps are not reached in 15."""
    anatomy = anatomies.llama()
    few = "9 steps at a place are few: Adam's first ones are about lr * sign(gradient)"
    window = "a window of 1 slides over 4 units, 4 places of 9 steps or one more"
    assert plan_of(anatomy, 36, strategy="sweep").notes[:2] == (window, few)
    assert not any("are few" in note for note in plan_of(anatomy, 40, strategy="sweep").notes)
    unreached = "the run ends before the last stages: its bottom layers never train"
    assert unreached in plan_of(anatomy, 15, strategy="gradual_unfreezing", switch_every=5).notes
    assert unreached not in plan_of(anatomy, 20, strategy="gradual_unfreezing", switch_every=5).notes
    assert plan_of(anatomy, 15, strategy="gradual_unfreezing", switch_every=5).phases[-1].num_steps == 5
    tied = plan_of(anatomies.llama(tied=True), 36, strategy="sweep").notes
    assert few in tied
    assert any("only while layers.0" in note for note in tied), "one remark does not displace another"


@pytest.mark.parametrize("strategy", ["sweep", "gradual_unfreezing", "freezeout"])
def test_beside_adapters_no_end_of_the_model_trains(strategy):
    plan = plan_of(anatomies.llama(), 40, strategy=strategy, adapter={})
    assert all(".lora_" in name for name in plan.ever_trained)
    new_head = plan_of(anatomies.llama(labels=2), 40, strategy=strategy, adapter={})
    assert {name for name in new_head.ever_trained if ".lora_" not in name} == {"score.weight"}


def test_nothing_that_trains_stops_again():
    for anatomy in anatomies.everything().values():
        sets = [set(phase.trainable) for phase in plan_of(anatomy, strategy="gradual_unfreezing").phases]
        assert all(before < after for before, after in pairwise(sets))
        assert sets[-1] == {t.name for t in anatomy.tensors}


def test_discriminative_rates():
    """Oracle: ULMFiT's 2.6 by hand: the top group 1, then 1/2.6, 1/6.76; the embedding one deeper than layers.0."""
    anatomy = anatomies.llama()
    assert plan_of(anatomy, strategy="gradual_unfreezing").rates == ()
    rates = plan_of(anatomy, strategy="gradual_unfreezing", discriminative_factor=2.6, active_layers=2).rates
    scales = {rate.layer: rate.scale for rate in rates}
    by_hand = {"layers.3": 1.0, "layers.2": 1.0, "layers.1": 0.384615, "layers.0": 0.384615, "embed": 0.147929}
    assert set(scales) == set(by_hand)
    assert all(isclose(scales[name], by_hand[name], abs_tol=1e-6) for name in by_hand)
    assert all(rate.ends is None for rate in rates)


# -- FreezeOut -----------------------------------------------------------------------------------------------------


def test_freezeout_stops_layers_by_its_table():
    """Oracle: by hand for 4 layers, t0 0.8, cubic: t = .512, .650963 (= (13/15)^3), .813037 (= (14/15)^3), 1."""
    anatomy = anatomies.llama()
    plan = plan_of(anatomy, 1000, strategy="freezeout")
    assert active(anatomy, plan) == [(0, 512, "E0123NH"), (512, 139, "123NH"), (651, 163, "23NH"), (814, 186, "3NH")]
    rates = {rate.layer: rate for rate in plan.rates}
    assert {name: rate.ends for name, rate in rates.items()} == {
        "embed": 512, "layers.0": 512, "layers.1": 651, "layers.2": 814, "layers.3": 1000, "norm": 1000, "head": 1000,
    }  # fmt: skip
    scales = {"embed": 1.953125, "layers.0": 1.953125, "layers.1": 1.536186, "layers.2": 1.229956, "layers.3": 1.0}
    assert all(isclose(rates[name].scale, scale, abs_tol=1e-6) for name, scale in scales.items())
    assert (plan.state, plan.drop_master) == ("clear", True)
    assert plan.notes[:2] == (
        "layers.0 stops after 512 of 1000 steps, the last but one after 814",
        "every layer's rate falls by its own half cosine from train.learning_rate; train.lr_scheduler_type is not used",
    )


def test_freezeout_linear_and_unscaled():
    """Oracle: by hand, t0 0.5, linear, 5 layers: .5 .625 .75 .875 1 of 8 steps; 0.625 is exact, so no step too many."""
    anatomy = anatomies.llama(depth=5)
    plan = plan_of(anatomy, 8, strategy="freezeout", t0=0.5, power=1, scale_rates=False)
    assert [row[0] for row in active(anatomy, plan)] == [0, 4, 5, 6, 7]
    assert {rate.scale for rate in plan.rates} == {1.0}
    assert plan_of(anatomy, 8, strategy="freezeout", t0=1.0).phases[0].num_steps == 8


def test_freezeout_of_few_layers():
    """Oracle: by hand: of two layers the first stops at 0.5 of the run, and a single one never does."""
    two = plan_of(anatomies.llama(depth=2), 8, strategy="freezeout", t0=0.5, power=1)
    assert {rate.layer: rate.ends for rate in two.rates if rate.layer.startswith("layers")} == {
        "layers.0": 4,
        "layers.1": 8,
    }
    assert two.notes[0] == "layers.0 stops after 4 of 8 steps, the last but one after 4"
    one = plan_of(anatomies.llama(depth=1), 8, strategy="freezeout", t0=0.5)
    assert one.notes[0] == "layers.0 stops after 8 of 8 steps, the last but one after 8"
    assert [phase.num_steps for phase in one.phases] == [8]
    assert {rate.ends for rate in one.rates} == {8}


def test_freezeout_with_an_embedding_that_goes_on():
    anatomy = anatomies.llama()
    plan = plan_of(anatomy, 1000, strategy="freezeout", embed="train")
    assert Rate("embed", 1.0, 1000) in plan.rates
    assert all(row[2][0] == "E" for row in active(anatomy, plan))


def test_freezeout_is_monotone_on_every_model():
    for anatomy in anatomies.everything().values():
        sets = [set(phase.trainable) for phase in plan_of(anatomy, strategy="freezeout").phases]
        assert len(sets) > 1
        assert all(before > after for before, after in pairwise(sets))


# -- step ranges ---------------------------------------------------------------------------------------------------


def test_step_ranges_mean_what_nemo_means():
    """Oracle: NeMo's documentation of freeze_updates: N the first N steps, [a, b] with both ends, -1 the end."""
    anatomy = anatomies.llama()
    ranges = {"embed": 20, "layers.0": [5, -1], "layers.1": [10, 12], "layers.2": -1, "head": [[0, 1], [30, -1]]}
    plan = plan_of(anatomy, None, step_ranges=ranges)
    assert plan.strategy == "step_ranges"
    assert active(anatomy, plan) == [
        (0, 2, "013N"), (2, 3, "013NH"), (5, 5, "13NH"), (10, 3, "3NH"), (13, 7, "13NH"), (20, 10, "E13NH"), (30, None, "E13N"),
    ]  # fmt: skip


def test_a_range_of_one_step_and_ranges_that_meet():
    """Oracle: by hand. With `[5, 5]` step 5 alone; `[0, 4]` and `[5, 9]` hold together, in whatever order they are written."""
    anatomy = anatomies.llama()
    plan = plan_of(anatomy, 20, step_ranges={"layers.0": [5, 5], "layers.1": [[5, 9], [0, 4]]})
    assert active(anatomy, plan) == [(0, 5, "E023NH"), (5, 1, "E23NH"), (6, 4, "E023NH"), (10, None, "E0123NH")]
    assert plan.state == "keep"
    assert "what no range freezes trains" in plan.notes


def test_step_ranges_beyond_the_run():
    anatomy = anatomies.llama()
    plan = plan_of(anatomy, 10, step_ranges={"embed": 5, "layers.0": [10, 20]})
    assert [phase.first_step for phase in plan.phases] == [0, 5]
    assert any("'layers.0' would freeze after the run's 10 steps" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"layrs.0": 5}, r"'layrs.0' matches no tensor.*Did you mean 'layers.0'"),
        ({"layers.7": 5}, r"layers.0 to layers.3"),
        ({"embed": 0}, r"'embed' is 0. Write a number N"),
        ({"embed": -2}, r"'embed' is -2"),
        ({"embed": "5"}, r"'embed' is '5'. Write a number N"),
        ({"embed": True}, r"'embed' is True"),
        ({"embed": [1, 2, 3]}, r"\[1, 2, 3\]. Write"),
        ({"embed": [9, 3]}, r"\[9, 3\], which holds no step"),
        ({"embed": [-3, 3]}, r"steps count from 0"),
        ({"embed": [[0, 9], [9, 20]]}, r"overlap: the one from step 0 still holds at step 9"),
        ({"embed": [[0, -1], [9, 20]]}, r"overlap"),
        ({"embed": [[5, -1], [5, 8]]}, r"overlap: the one from step 5 still holds at step 5"),
        ({"embed.": 5}, r"^freeze.step_ranges: 'embed\.' has an empty component"),
        ({"embed": 10, "layers": [5, -1], "norm": [7, 8], "head": 9}, r"trains nothing from step 7 to step 8"),
    ],
)
def test_step_ranges_that_make_no_sense(ranges, message):
    with pytest.raises(UserError, match=message):
        plan_of(anatomies.llama(), 100, step_ranges=ranges)


def test_step_ranges_on_the_command_line(capsys):
    """Oracle: the JSON's phases, by hand."""
    words = ["plan", "model=smollm2-135m", "freeze.step_ranges={embed: 10, layers.3: [5, -1]}", "--json"]
    assert run(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert [(p["first_step"], p["num_steps"]) for p in plan["phases"]] == [(0, 5), (5, 5), (10, None)]
    assert run(["plan", "model=smollm2-135m", "freeze.strategy=step_ranges"]) == 2
    assert "needs freeze.step_ranges" in " ".join(capsys.readouterr().err.split())
