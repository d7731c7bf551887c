"""SALF without a model: gains, ends of freezing, cuts and plans.

Oracles: planted jumps; `reference`, the algorithm of the method's card written out once more in plain loops; the sets of
layers that a plan must then train.
"""

from __future__ import annotations

import json
import math
from random import Random

import anatomies
import pytest

from dsfreeze.anatomy import load_shipped
from dsfreeze.errors import UserError
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan
from dsfreeze.strategies.salf import GAINS, batch_cuts, dataset_cut, end_of_freezing


def options(**more) -> FreezeOptions:
    return FreezeOptions(strategy="salf", scores="-", **more)


def end(trace, **more) -> int:
    return end_of_freezing(trace, options(**more))


def reference(d, gain="a", tau=0.9, flat="min_layers", min_layers=1, max_layers=None, padding="none"):
    """The algorithm of docs/methods/salf.md, line by line."""
    number = len(d) - 1
    logs = [math.log(value if value > 1e-6 else 1e-6) for value in d]
    inverted = gain == "d" and not d[0] > d[number]
    best, best_gain, any_gain, share, reached = 0, -math.inf, False, 0.0, None
    for k in range(1, number + 1):
        if gain == "b":
            g = logs[k - 1] - logs[k]
        elif gain == "c":
            g = (logs[k - 1] - logs[k]) / (math.log(k + 1) - math.log(k))
        elif gain == "d" and not inverted:
            g = (d[k - 1] - d[k]) / (d[0] - d[number])
        else:
            g = d[k - 1] - d[k]
        any_gain = any_gain or g != 0
        share += g
        if reached is None and share >= tau:
            reached = k
        if g >= best_gain:
            best, best_gain = k, g
    if not any_gain:
        eof = 0 if flat == "train_all" else number
    elif gain == "d" and not inverted:
        eof = number if reached is None else reached
    else:
        eof = best
    if eof > number - min_layers:
        eof = number - min_layers
    if max_layers is not None and (padding == "fill" or number - eof > max_layers):
        eof = max(0, number - max_layers)
    return eof


# -- one example ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gain", "abcd")
@pytest.mark.parametrize("where", [1, 2, 5, 11])
def test_a_planted_jump_is_found(gain, where):
    """Oracle: the layer at which the deviation falls from 1 to a tenth while it hardly moves elsewhere."""
    trace = [(1.0 if k < where else 0.1) - 1e-5 * k for k in range(13)]
    assert end(trace, gain=gain, tau=0.5) == where


@pytest.mark.parametrize("gain", "abcd")
def test_a_jump_in_the_last_layer_leaves_it_to_train(gain):
    """Oracle: min_layers, 1 by default, from the top."""
    trace = [1.0] * 8 + [0.2]
    assert end(trace, gain=gain) == 7
    assert end(trace, gain=gain, min_layers=3) == 5


def test_gains_by_hand():
    """Oracle: the four formulas on d = 1, 1/2, 1/8, with pencil and paper."""
    trace = [1.0, 0.5, 0.125]
    assert GAINS["a"](trace) == [0.5, 0.375]
    assert GAINS["b"](trace) == pytest.approx([math.log(2), math.log(4)])
    assert GAINS["c"](trace) == pytest.approx([1, math.log(4) / math.log(1.5)])
    assert GAINS["d"](trace) == pytest.approx([0.5 / 0.875, 0.375 / 0.875])
    assert [end([1.0, 0.5, 0.125, 0.125], gain=gain) for gain in "abc"] == [1, 2, 2]


def test_gain_c_is_the_exponent_of_a_power_law():
    """Oracle: d = (k + 1)^-g has the local exponent g everywhere."""
    assert GAINS["c"]([(k + 1) ** -0.7 for k in range(9)]) == pytest.approx([0.7] * 8)


def test_logarithms_are_floored():
    """Oracle: below 1e-6 (and below 0, where rounding may leave a cosine) there is nothing left to gain."""
    assert GAINS["b"]([1e-6, 1e-9, 0.0, -1e-17]) == [0, 0, 0]


@pytest.mark.parametrize("gain", "abc")
def test_a_monotone_trace_ends_where_it_falls_most(gain):
    steps = [0.01, 0.02, 0.30, 0.02, 0.01]
    trace = [1 - sum(steps[:k]) for k in range(6)]
    assert end(trace, gain=gain) == 3


@pytest.mark.parametrize("gain", "abcd")
def test_a_constant_trace(gain):
    """Oracle: `flat`: the fewest layers allowed train, or all of them (as far as max_layers allows)."""
    trace = [0.7] * 7
    assert end(trace, gain=gain) == 5
    assert end(trace, gain=gain, min_layers=2) == 4
    assert end(trace, gain=gain, flat="train_all") == 0
    assert end(trace, gain=gain, flat="train_all", max_layers=2) == 4


@pytest.mark.parametrize("gain", "abc")
def test_a_rising_trace_ends_where_it_rises_least(gain):
    """Oracle: the largest gain is the negative one nearest 0."""
    trace = [0.1, 0.3, 0.5, 0.501, 0.8, 1.0]
    assert end(trace, gain=gain) == 3


def test_the_higher_of_equals():
    """Oracle: two equal jumps; the later one freezes more, and so is cheaper."""
    assert end([1.0, 0.5, 0.5, 0.0, 0.0, 0.0]) == 3


@pytest.mark.parametrize("tau", [0.5, 0.9, 1.0])
def test_gain_d_falls_back_where_the_whole_reduction_is_none(tau):
    """Oracle: A's end; D's own quotient would turn the order round where d_0 < d_L and divide by 0 where they are equal."""
    for trace in ([0.5, 0.6, 0.2, 0.7, 0.8], [0.5, 0.6, 0.2, 0.7, 0.5]):
        assert end(trace, gain="d", tau=tau) == end(trace) == 2


def test_gain_d_freezes_until_the_share_is_reached():
    """Oracle: reductions of 50, 30, 15, 5 percent, added up."""
    trace = [1.0, 0.5, 0.2, 0.05, 0.0]
    assert [end(trace, gain="d", tau=tau) for tau in (0.3, 0.5, 0.51, 0.8, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3, 3]


def test_min_layers_max_layers_and_padding():
    """Oracle: six layers whose largest reduction is the third's."""
    trace = [1.0, 0.95, 0.9, 0.3, 0.28, 0.26, 0.25]
    assert [end(trace, min_layers=n) for n in (1, 3, 4, 6)] == [3, 3, 2, 0]
    assert [end(trace, max_layers=n) for n in (1, 2, 3, 5, 6, 99)] == [5, 4, 3, 3, 3, 3]
    assert [end(trace, max_layers=n, padding="fill") for n in (1, 2, 3, 5, 6, 99)] == [5, 4, 3, 1, 0, 0]
    assert end(trace, padding="fill") == 3, "without a budget there is nothing to fill"


@pytest.mark.parametrize("gain", "abcd")
def test_the_plain_reference_agrees(gain):
    """Oracle: `reference` on random traces: smooth, coarse (ties), rising and constant ones, with every option."""
    random = Random(f"salf {gain}")
    for _ in range(1500):
        number = random.randint(1, 14)
        grain = random.choice([1, 4, 10**6])
        trace = [random.randint(0, 2 * grain) / grain for _ in range(number + 1)]
        least = random.randint(1, number)
        chosen = {
            "tau": random.choice([0.1, 0.5, 0.9, 1.0]), "flat": random.choice(["min_layers", "train_all"]),
            "min_layers": least, "max_layers": random.choice([None, random.randint(least, number + 3)]),
            "padding": random.choice(["none", "fill"]),
        }  # fmt: skip
        assert end(trace, gain=gain, **chosen) == reference(trace, gain, **chosen), (trace, chosen)


# -- many examples -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "median", "mode", "quarter"),
    [
        ([4], 4, 4, 4), ([1, 5], 5, 5, 1), ([3, 1, 1, 7, 7], 3, 7, 1), ([2, 2, 9, 9, 9], 9, 9, 2),
        ([1, 2, 3, 4, 5, 6, 7, 8], 5, 8, 2), ([1, 2, 3, 4, 5, 6, 7, 8, 9], 5, 9, 3), ([1, 9, 1, 5, 1, 5], 5, 1, 1),
    ],
)  # fmt: skip
def test_dataset_cuts(ends, median, mode, quarter):
    """Oracle: sorted by hand; of two medians and of several modes the higher; the quartile is the item at a quarter of the way."""
    assert [dataset_cut(ends, rule) for rule in ("median", "mode", "q25")] == [median, mode, quarter]


@pytest.mark.parametrize("rule", ["median", "mode", "q25"])
def test_the_order_of_examples_changes_no_dataset_cut(rule):
    random = Random(rule)
    for _ in range(50):
        ends = [random.randrange(6) for _ in range(random.randint(1, 12))]
        cut = dataset_cut(ends, rule)
        for _ in range(5):
            random.shuffle(ends)
            assert dataset_cut(ends, rule) == cut


def test_a_batch_freezes_what_all_of_its_examples_freeze():
    """Oracle: the lowest end of each batch by hand; the last batch may be short."""
    assert batch_cuts([5, 3, 8, 8, 2, 9, 7], 3) == [3, 2, 7]
    assert batch_cuts([5, 3], 8) == [3]


# -- plans ---------------------------------------------------------------------------------------------------------

TRACES = [[1.0, 0.9, 0.4, 0.35, 0.3], [1.0, 0.4, 0.35, 0.3, 0.3], [1.0, 0.9, 0.5, 0.4, 0.3]]  # ends 2, 1, 2


@pytest.fixture
def planned(tmp_path):
    """(plan, names of the layers with something that trains) for these traces."""

    def make(anatomy, traces, **more):
        path = tmp_path / "scores.json"
        path.write_text(json.dumps({"scores": {}, "traces": {"deviation": traces, "logit_lens": [traces[1]]}}))
        plan = make_plan(anatomy, FreezeOptions(strategy="salf", scores=path, **more))
        adapted = plan.adapted(anatomy)
        return plan, {adapted.layer_of[name].name for phase in plan.phases for name in phase.trainable}

    return make


@pytest.mark.parametrize(
    ("name", "ends"),
    [("llama", {"norm", "head"}), ("llama-tied", {"norm"}), ("llama-classifier", {"norm", "head"}), ("bert", {"head"}),
     ("gpt2", {"norm"}), ("phi3", {"norm", "head"})],
)  # fmt: skip
def test_the_prefix_and_the_embedding_freeze_and_the_rest_trains_whole(name, ends, planned):
    """Oracle: four layers, freezing ends after the second; a tied head freezes with the embedding."""
    anatomy = anatomies.everything()[name]
    plan, layers = planned(anatomy, TRACES)
    assert layers == {"layers.2", "layers.3", *ends}
    expected = {t.name for layer in anatomy.layers if layer.name in layers for t in layer.tensors}
    assert set(plan.phases[0].trainable) == expected
    assert [phase.num_steps for phase in plan.phases] == [None]


def test_options_of_the_strategy_reach_the_cut(planned):
    anatomy = anatomies.llama(labels=2)
    cut = {"layers.3", "norm", "head"}
    assert planned(anatomy, TRACES, max_layers=1)[1] == cut
    assert planned(anatomy, TRACES, cut="q25")[1] == cut | {"layers.1", "layers.2"}
    assert planned(anatomy, TRACES, trace="logit_lens")[1] == cut | {"layers.1", "layers.2"}
    assert planned(anatomy, TRACES, gain="d", tau=0.99)[1] == cut
    assert planned(anatomy, TRACES, norm="freeze", max_layers=1)[1] == cut - {"norm"}
    assert "embed" in planned(anatomy, TRACES, embed="train")[1]


def test_nothing_frozen_trains_the_embedding_too(planned):
    """Oracle: a constant trace with flat train_all: everything."""
    plan, _ = planned(anatomies.llama(), [[0.5] * 5] * 3, flat="train_all")
    assert len(plan.phases[0].trainable) == len(anatomies.llama().tensors)


def test_adapters_sit_on_the_suffix_and_the_task_head_trains(planned):
    """Oracle: seven matrices in each of two layers, two tensors of an adapter on each, and the fresh head; no norm."""
    anatomy = anatomies.llama(labels=2)
    plan, layers = planned(anatomy, TRACES, adapter={"r": 2})
    assert layers == {"layers.2", "layers.3", "head"}
    assert len(plan.phases[0].trainable) == 2 * 7 * 2 + 1
    assert all(".lora_" in name or name == "score.weight" for name in plan.phases[0].trainable)


def test_the_note_says_where_the_examples_end(planned):
    plan, _ = planned(anatomies.llama(), TRACES)
    assert plan.notes[0] == (
        "freezing ends after 2 of 4 layers, the median of 3 examples (gain a; 2 of them end there, the others between 1 and 2)"
    )


def test_a_shipped_model(planned):
    """Oracle: a jump planted in layer 20 of the 30."""
    anatomy = load_shipped("smollm2-135m").for_task("classification", 2)
    _, layers = planned(anatomy, [[1.0] * 20 + [0.2] * 11] * 3)
    assert layers == {f"layers.{i}" for i in range(20, 30)} | {"norm", "head"}


def test_more_layers_than_there_are(planned):
    with pytest.raises(UserError, match=r"min_layers is 5, but tiny-llama has 4 layers.*from 1 to 4"):
        planned(anatomies.llama(), TRACES, min_layers=5)
