"""Adaptive strategies on planted measurements. Oracles: sets worked out by hand from the formulas in docs/methods/*.md,
frequencies over many seeds, and the contract of dsfreeze/strategies/evidence.py and plan.py on random measurements."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import anatomies
import pytest
import yaml

from dsfreeze.anatomy import Anatomy, load_shipped
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.ranking import spearman
from dsfreeze.recipe import FREEZE_KEYS, FreezeOptions
from dsfreeze.strategies import ADAPTIVE, STRATEGIES, make_plan
from dsfreeze.strategies.adaptive import needs
from dsfreeze.strategies.adaptive.autofreeze import percentile
from dsfreeze.strategies.adaptive.common import draw
from dsfreeze.strategies.adaptive.grass import probabilities, scaled
from dsfreeze.strategies.evidence import Change, Evidence, Gradient, Revision, Similarity

LLAMA = anatomies.llama()
SMALL = anatomies.everything()
MONOTONE = ("adt_h", "adt_l", "autofreeze", "tang_like", "smartfrz")
#: What makes each rule decide often.
QUICK: dict[str, dict[str, Any]] = {
    "adt_h": {"track_steps": 4, "stability_check": True},
    "adt_l": {"track_steps": 4},
    "autofreeze": {"switch_every": 2},
    "tang_like": {"switch_every": 2, "threshold": 0.6},
    "egeria_like": {"switch_every": 2, "window": 2, "hits": 1, "slope": 0.3, "thaw_factor": 2.0},
    "smartfrz": {"switch_every": 2, "window": 2, "variance": 0.02},
    "adagradselect": {"switch_every": 2},
    "grass": {"switch_every": 2},
    "blockllm": {"switch_every": 2, "patience": 3, "sparsity": 0.7},
}


@dataclass
class Run:
    """A strategy at work: what it has planned, and the measurements it is given."""

    anatomy: Anatomy
    options: FreezeOptions
    num_steps: int | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)
    revision: Revision | None = None

    def __post_init__(self) -> None:
        self.plan = make_plan(self.anatomy, self.options, self.num_steps)

    def decide(self, evidence: Evidence) -> set[int]:
        """Let it decide; the numbers of the layers that are frozen from here on."""
        rule = ADAPTIVE[self.options.strategy]
        self.revision = rule.revise(self.anatomy, self.options, self.num_steps, self.plan, evidence, self.memory)
        self.plan, self.memory = self.revision.plan, self.revision.memory
        return self.frozen

    @property
    def frozen(self) -> set[int]:
        return set(range(len(self.anatomy.blocks))) - self.active

    @property
    def active(self) -> set[int]:
        trained = set(self.plan.phases[-1].trainable)
        blocks = self.plan.adapted(self.anatomy).blocks
        return {i for i, layer in enumerate(blocks) if any(t.name in trained for t in layer.tensors)}

    @property
    def trained(self) -> set[str]:
        return set(self.plan.phases[-1].trainable)

    def layers(self, **planted) -> Evidence:
        """Evidence of planted numbers, one for each layer (None: not measured): l1, squared (sums over the steps,
        gradients), change, start (squared), cka, plasticity; the first tensor of the layer has it all."""
        blocks, steps = self.anatomy.blocks, planted.pop("steps", 1)
        first = [layer.tensors[0].name for layer in blocks]
        extra = {key: planted.pop(key) for key in ("losses", "learning_rate") if key in planted}

        def column(key: str) -> list[float]:
            return [0.0 if value is None else float(value) for value in planted.get(key, [0.0] * len(blocks))]

        gradients = {
            name: Gradient(l1, 0.0, squared, steps)
            for name, l1, squared in zip(first, column("l1"), column("squared"), strict=True)
        }
        changes = {t.name: Change(0.0, 0.0) for t in self.anatomy.tensors}
        changes |= {n: Change(c, s) for n, c, s in zip(first, column("change"), column("start"), strict=True)}
        pairs = zip(column("cka"), column("plasticity"), strict=True)
        likeness = {layer.name: Similarity(*pair) for layer, pair in zip(blocks, pairs, strict=True)}
        return Evidence(self.plan.decide_at, gradients=gradients, changes=changes, similarities=likeness, **extra)


def run(strategy: str, anatomy: Anatomy = LLAMA, num_steps: int | None = None, **options) -> Run:
    return Run(anatomy, FreezeOptions(strategy=strategy, **options), num_steps)


# -- ADT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "most"),
    [("abs_l2", 3), ("rel_l2", 0), ("grad_l2", 1)],
)
def test_adt_measures_differ(measure, most):
    """By hand: distances 1 2 3 4, starts 1 8 30 160 (ratios 1, 1/4, 1/10, 1/40), gradients largest in layer 1."""
    planted = {"change": [1, 4, 9, 16], "start": [1, 64, 900, 25600], "squared": [3, 5, 1, 2]}
    tracked = run("adt_h", count=1, measure=measure)
    assert tracked.active == {0, 1, 2, 3}
    assert tracked.plan.decide_at == 5
    assert tracked.decide(tracked.layers(**planted)) == {most}
    assert tracked.plan.decide_at is None
    assert [(p.first_step, p.num_steps) for p in tracked.plan.phases] == [(0, 5), (5, None)]
    assert tracked.plan.state == "clear"


def test_adt_scores_are_what_was_measured():
    """By hand, from the same numbers."""
    planted = {"change": [1, 4, 9, 16], "start": [1, 64, 900, 25600], "squared": [3, 5, 1, 2]}
    expected = {"abs_l2": 4, "rel_l2": 1 / 40, "rms": 4 / math.sqrt(LLAMA.blocks[3].numel), "grad_l2": math.sqrt(2)}
    for measure, value in expected.items():
        tracked = run("adt_l", measure=measure)
        tracked.decide(tracked.layers(**planted))
        assert tracked.revision.scores["layers.3"] == pytest.approx(value)


def test_adt_rms_is_per_element():
    """T5's decoder layers have 1048 elements, its encoder's 784: 110/1048 < 100/784, though 110 > 100."""
    anatomy = anatomies.t5()
    assert [layer.numel for layer in anatomy.blocks] == [784, 792, 1048, 1048]
    for measure, most in (("abs_l2", 3), ("rms", 0)):
        tracked = run("adt_h", anatomy, count=1, measure=measure)
        assert tracked.decide(tracked.layers(change=[100, 1, 1, 110])) == {most}


def test_adt_l_freezes_what_moved_least_and_ties_from_the_bottom():
    tracked = run("adt_l")
    assert tracked.decide(tracked.layers(change=[2, 1, 2, 9])) == {0, 1}
    assert not any("embed" in name for name in tracked.trained), "with layers.0 the embedding freezes"


def test_adt_checks_its_ranking_halfway():
    """By hand: rankings 0 1 2 3 and 3 2 1 0 have Spearman -1; the second measurement decides."""
    tracked = run("adt_h", count=1, stability_check=True)
    assert tracked.plan.decide_at == 3
    assert tracked.decide(tracked.layers(change=[1, 2, 3, 4])) == set()
    assert (tracked.plan.decide_at, len(tracked.plan.phases)) == (5, 1)
    assert tracked.decide(tracked.layers(change=[8, 7, 6, 5])) == {0}
    assert tracked.plan.notes[-1] == (
        "the ranking of layers is not stable: Spearman -1.00 between the steps 3 and 5, below 0.8; a larger "
        "freeze.track_steps may help"
    )
    steady = run("adt_h", count=1, stability_check=True)
    steady.decide(steady.layers(change=[1, 2, 3, 4]))
    steady.decide(steady.layers(change=[2, 3, 5, 4]))  # 0.8: stable, just
    assert not any("Spearman" in note for note in steady.plan.notes)


def test_adt_adds_up_gradients_over_both_halves():
    """By hand: 1+4, 9+0: gradients are measured since the last decision, weight changes since the start."""
    tracked = run("adt_h", anatomies.llama(depth=2), measure="grad_l2", stability_check=True)
    tracked.decide(tracked.layers(squared=[1, 9]))
    tracked.decide(tracked.layers(squared=[4, 0]))
    assert tracked.revision.scores == {"layers.0": pytest.approx(5**0.5), "layers.1": 3.0}
    assert tracked.frozen == {1}


def test_spearman():
    """By hand, 1 - 6 sum d^2 / n(n^2-1) without ties; with ties scipy's."""
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [30, 20, 10]) == pytest.approx(-1)
    assert spearman([1, 1], [2, 2]) == 1
    assert spearman([1, 1], [1, 2]) == 0
    scipy = pytest.importorskip("scipy.stats")
    random = Random(0)
    for _ in range(20):
        first, second = ([random.randrange(5) for _ in range(8)] for _ in range(2))
        assert spearman(first, second) == pytest.approx(scipy.spearmanr(first, second).statistic)


# -- AutoFreeze ----------------------------------------------------------------------------------------------------


def test_autofreeze_by_hand():
    """eta = |before - now| / before. 10 10 10 10 -> 9 5 9 5: .1 .5 .1 .5, median .3, first at or above it: layer 1.
    Then, layer 0 frozen, 5 9 5 -> 4.5 7.2 3.5: .1 .2 .3, median .2: layer 2."""
    frozen = run("autofreeze", num_steps=40)
    assert frozen.decide(frozen.layers(l1=[10, 10, 10, 10])) == set(), "two intervals are needed"
    assert frozen.plan.decide_at == 8
    assert frozen.decide(frozen.layers(l1=[9, 5, 9, 5])) == {0}
    assert frozen.revision.scores == pytest.approx({"layers.0": 0.1, "layers.1": 0.5, "layers.2": 0.1, "layers.3": 0.5})
    assert not any("embed" in name for name in frozen.trained)
    assert frozen.decide(frozen.layers(l1=[None, 4.5, 7.2, 3.5])) == {0, 1}
    assert [p.first_step for p in frozen.plan.phases] == [0, 8, 12]
    assert "layers.0" not in frozen.revision.scores


@pytest.mark.parametrize(("steps", "every"), [(15, 1), (29, 2), (5, 1)])
def test_autofreeze_divides_the_run_in_ten(steps, every):
    assert run("autofreeze", num_steps=steps).plan.decide_at == every


def test_autofreeze_percentiles():
    """By hand, same eta: at 0 everything goes on, at 100 all in front of the first largest freezes."""
    for percent, expected in ((0, set()), (100, {0, 1, 2})):
        frozen = run("autofreeze", switch_every=3, percentile=percent)
        frozen.decide(frozen.layers(l1=[10, 10, 10, 10]))
        assert frozen.decide(frozen.layers(l1=[9, 5, 9, 1])) == expected


def test_autofreeze_with_gradients_that_vanish():
    """0 -> 0 has not changed (and may freeze), 0 -> 1 has changed wholly."""
    frozen = run("autofreeze", switch_every=3)
    frozen.decide(frozen.layers(l1=[0, 0, 1, 1]))
    assert frozen.decide(frozen.layers(l1=[0, 1, 1, 1])) == set()
    assert frozen.revision.scores["layers.0"] == 0
    assert frozen.revision.scores["layers.1"] == 1


def test_percentile():
    """Oracle: numpy's."""
    numpy = pytest.importorskip("numpy")
    random = Random(1)
    for percent in (0, 10, 33.3, 50, 90, 100):
        values = [random.random() for _ in range(random.randrange(1, 9))]
        assert percentile(values, percent) == pytest.approx(numpy.percentile(values, percent))


# -- the other front-first rules -----------------------------------------------------------------------------------


def test_tang_freezes_one_layer_when_its_gradient_is_small():
    """By hand: shares of the largest so far 1 1 1 1; .1 .1 1 1; then of layer 1 .15, of the last one .01."""
    frozen = run("tang_like", anatomies.llama(depth=3), switch_every=10)
    assert frozen.decide(frozen.layers(l1=[10, 10, 10], steps=10)) == set()
    assert frozen.decide(frozen.layers(l1=[1, 1, 20], steps=10)) == {0}, "one layer a decision"
    assert frozen.revision.scores == pytest.approx({"layers.0": 0.1, "layers.1": 0.1, "layers.2": 1.0})
    assert frozen.decide(frozen.layers(l1=[None, 2.5, 20], steps=10)) == {0}, "0.25 is not below 0.2"
    assert frozen.decide(frozen.layers(l1=[None, 1.5, 0.2], steps=10)) == {0, 1}
    assert frozen.decide(frozen.layers(l1=[None, None, 0.0], steps=10)) == {0, 1}, "the last layer always trains"


@pytest.mark.parametrize("steps", [1, 10])
def test_tang_is_per_step(steps):
    """The same sum over twice the steps is half the mean."""
    frozen = run("tang_like", switch_every=10, threshold=0.6)
    frozen.decide(frozen.layers(l1=[10, 10, 10, 10], steps=steps))
    assert frozen.decide(frozen.layers(l1=[10, 10, 10, 10], steps=2 * steps)) == {0}


def test_tang_knows_nothing_of_a_layer_without_gradients():
    frozen = run("tang_like", switch_every=10)
    assert frozen.decide(frozen.layers(l1=[0, 0, 10, 10])) == set()
    assert frozen.revision.scores == {f"layers.{i}": 1.0 for i in range(4)}


def test_egeria_by_hand():
    """Window 3, 2 hits, slope below .01: .1 .2 .3 rises by .1; .2 .3 .3 by .05; then .3 .3 .3 is flat, twice."""
    frozen = run("egeria_like", window=3, slope=0.01, switch_every=5)
    for value in (0.1, 0.2, 0.3, 0.3, 0.3):
        assert frozen.decide(frozen.layers(plasticity=[value] * 4, learning_rate=1.0)) == set()
    assert frozen.decide(frozen.layers(plasticity=[0.3] * 4, learning_rate=1.0)) == {0}
    assert frozen.revision.scores["layers.0"] == 0.3
    for _ in range(3):
        assert frozen.decide(frozen.layers(plasticity=[0.3] * 4, learning_rate=0.5)) == {0}, "a window of its own"
    assert frozen.decide(frozen.layers(plasticity=[0.3] * 4, learning_rate=0.5)) == {0, 1}
    assert frozen.decide(frozen.layers(plasticity=[0.3] * 4, learning_rate=0.11)) == {0, 1}
    assert frozen.decide(frozen.layers(plasticity=[0.3] * 4, learning_rate=0.1)) == set(), (
        "a tenth of the first freeze's"
    )


def test_egeria_needs_its_hits_in_a_row():
    frozen = run("egeria_like", window=2, slope=0.01)
    for value in (0.1, 0.1, 0.9, 0.9, 0.1, 0.1, 0.9):
        assert frozen.decide(frozen.layers(plasticity=[value] * 4)) == set()


def test_egeria_may_never_thaw():
    frozen = run("egeria_like", window=2, hits=1, thaw_factor=None)
    for _ in range(12):
        frozen.decide(frozen.layers(plasticity=[0.3] * 4, learning_rate=1e-9))
    assert frozen.frozen == {0, 1, 2}


def test_smartfrz_by_hand():
    """Window 3: layers 0 and 1 hold still, 2 varies by (.1)^2 x 2/9 = .0022, 3 holds still but is behind 2; layer 0 of
    the second run holds still too low."""
    frozen = run("smartfrz", window=3)
    assert frozen.decide(frozen.layers(cka=[0.9, 0.8, 0.7, 0.9])) == set()
    assert frozen.decide(frozen.layers(cka=[0.9, 0.8, 0.6, 0.9])) == set()
    assert frozen.decide(frozen.layers(cka=[0.9, 0.8, 0.7, 0.9])) == {0, 1}
    assert frozen.revision.scores["layers.2"] == pytest.approx(0.01 * 2 / 9)
    frozen.decide(frozen.layers(cka=[None, None, 0.7, 0.9]))
    assert frozen.decide(frozen.layers(cka=[None, None, 0.7, 0.9])) == {0, 1, 2}
    low = run("smartfrz", window=2)
    for _ in range(3):
        assert low.decide(low.layers(cka=[0.3, 0.9, 0.9, 0.9])) == set()
    fallen = run("smartfrz", window=3, variance=1.0, min_cka=0.5)
    for value in (0.9, 0.9, 0.1):
        assert fallen.decide(fallen.layers(cka=[value] * 4)) == set(), "the latest counts"


# -- rules that come and go ----------------------------------------------------------------------------------------


def test_adagradselect_explores_by_gradient():
    """By hand, epsilon 1 throughout: two layers at a time until all four are known, then the two largest, with the
    norm of idle ones from when they last trained."""
    chosen = run("adagradselect", epsilon_decay=1.0)
    first = chosen.active
    norms = {0: 5.0, 1: 9.0, 2: 1.0, 3: 7.0}
    chosen.decide(chosen.layers(squared=[norms[i] ** 2 for i in range(4)]))
    assert chosen.active == {0, 1, 2, 3} - first, "those never trained come first"
    chosen.decide(chosen.layers(squared=[norms[i] ** 2 for i in range(4)]))
    assert chosen.active == {1, 3}
    assert chosen.revision.scores == {f"layers.{i}": value for i, value in norms.items()}
    chosen.decide(chosen.layers(squared=[0, 16, 0, 49], steps=1))
    assert chosen.active == {0, 3}, "layer 1 fell to 4, layer 0 is remembered at 5"
    assert chosen.plan.state == "keep"


def test_adagradselect_exploits_by_past_updates():
    """Dirichlet(counts + 1): the mean share of a layer is (count + 1) / (sum + L). Counts 3 0 0 0: 4/7, 1/7, 1/7, 1/7."""
    seen: Counter[int] = Counter()
    for seed in range(2000):
        chosen = run("adagradselect", active_layers=1, epsilon=0.0, seed=seed)
        chosen.memory = {"norms": {}, "counts": {}, "decision": 3}
        (only,) = chosen.active
        chosen.memory["counts"] = {f"layers.{only}": 2}
        chosen.decide(chosen.layers())
        seen[(next(iter(chosen.active)) - only) % 4] += 1
    assert [seen[i] / 2000 for i in range(4)] == pytest.approx([4 / 7, 1 / 7, 1 / 7, 1 / 7], abs=0.04)


def test_adagradselect_counts_how_often_a_layer_trained():
    """Oracle: counted here, over decisions that never explore: the scores are those counts."""
    chosen, often = run("adagradselect", epsilon=0.0), Counter()
    for _ in range(5):
        often.update(f"layers.{i}" for i in chosen.active)
        chosen.decide(chosen.layers())
        assert chosen.revision.scores == {f"layers.{i}": float(often[f"layers.{i}"]) for i in range(4)}


def test_adagradselect_explores_less_and_less():
    """Oracle: epsilon x decay^(n-1) at decision n, as a frequency: exploration compares norms, which are not counts."""
    explored: Counter[int] = Counter()
    for seed in range(1000):
        chosen = run("adagradselect", epsilon=0.8, epsilon_decay=0.5, seed=seed)
        for number in range(1, 4):
            chosen.decide(chosen.layers(squared=[0.25] * 4))
            explored[number] += 0.5 in chosen.revision.scores.values()
    assert [explored[n] / 1000 for n in (1, 2, 3)] == pytest.approx([0.8, 0.4, 0.2], abs=0.05)


def test_grass_visits_every_layer_once_then_draws():
    chosen = run("grass", anatomies.llama(depth=5), active_layers=2)
    seen = [chosen.active]
    for _ in range(2):
        chosen.decide(chosen.layers(squared=[1] * 5))
        seen.append(chosen.active)
    assert set().union(*seen) == {0, 1, 2, 3, 4}
    assert not seen[0] & seen[1]
    assert [len(layers) for layers in seen] == [2, 2, 2]
    assert chosen.plan.state == "offload"


def test_grass_probabilities():
    """Softmax of m / tau, m = sqrt(||g||^2 / N): m = 1 and 1 + ln 3 at tau 1 give 1/4 and 3/4, and so often it is drawn."""
    anatomy = anatomies.llama(depth=2)
    numel = anatomy.blocks[0].numel
    second: int = 0
    for seed in range(2000):
        chosen = run("grass", anatomy, active_layers=1, temperature=1.0, seed=seed)
        planted = {"squared": [numel * 1.0 * 10, numel * (1 + math.log(3)) ** 2 * 10], "steps": 10}
        chosen.decide(chosen.layers(**planted))
        chosen.decide(chosen.layers(**planted))
        assert chosen.revision.scores == pytest.approx({"layers.0": 0.25, "layers.1": 0.75})
        second += chosen.active == {1}
    assert second / 2000 == pytest.approx(0.75, abs=0.03)


def test_grass_draws_anew_at_every_decision():
    """Oracle: layers alike in gradient; 40 decisions that drew with the same numbers would all choose the same one."""
    anatomy = anatomies.llama(depth=2)
    chosen = run("grass", anatomy, active_layers=1)
    seen = set()
    for number in range(1, 41):
        chosen.decide(chosen.layers(squared=[1.0, 1.0]))
        assert chosen.memory["decision"] == number
        seen |= chosen.active if number > 2 else set()
    assert seen == {0, 1}


def test_grass_averages_over_time():
    """By hand: .75 x 2 + .25 x 4 = 2.5."""
    chosen = run("grass", anatomies.llama(depth=1), ema=0.75)
    numel = anatomies.llama(depth=1).blocks[0].numel
    for size in (2.0, 4.0):
        chosen.decide(chosen.layers(squared=[size**2 * numel]))
    assert chosen.memory["sizes"] == pytest.approx({"layers.0": 2.5})


def test_grass_without_a_temperature_knows_no_unit():
    """Gradients of 1e-6 are told apart as those of 1: ratios count, where a fixed temperature of 1 would draw evenly."""
    small, large = ({"a": scale, "b": 3 * scale} for scale in (1e-6, 1.0))
    assert probabilities(scaled(small, None)) == pytest.approx(probabilities(scaled(large, None)))
    assert probabilities(scaled(large, None))["b"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_draw_without_replacement_follows_the_weights():
    """Weights 1 2 5: first 5/8; the pair without the heaviest (1/8)(2/7) + (2/8)(1/6) = 0.0774."""
    logs = {name: math.log(weight) for name, weight in (("a", 1), ("b", 2), ("c", 5))}
    draws = [draw(logs, 2, Random(seed)) for seed in range(4000)]
    assert sum(d[0] == "c" for d in draws) / 4000 == pytest.approx(5 / 8, abs=0.025)
    assert sum("c" not in d for d in draws) / 4000 == pytest.approx(0.0774, abs=0.015)
    assert draw({"a": 0.0, "b": -1e9}, 2, Random(0)) == ["a", "b"], "no weight is too small"


def test_blockllm_goes_on_while_the_loss_falls():
    chosen = run("blockllm", switch_every=3, patience=2)
    chosen.decide(chosen.layers(losses=(3.0, 2.0, 1.0)))
    assert len(chosen.plan.phases) == 1
    chosen.decide(chosen.layers(losses=(0.9, 0.8, 0.7)))
    assert len(chosen.plan.phases) == 1
    chosen.decide(chosen.layers(losses=(2.0, 4.0, 4.0)))
    assert [p.first_step for p in chosen.plan.phases] == [0, 9]
    assert chosen.memory["number"] == 0
    assert chosen.plan.state == "clear"


def test_blockllm_does_not_judge_before_it_has_more_losses_than_its_patience():
    chosen = run("blockllm", switch_every=2, patience=4)
    for phases in (1, 1, 2):
        chosen.decide(chosen.layers(losses=(1.0, 1.5)) if phases == 1 else chosen.layers(losses=(9.0, 9.0)))
        assert len(chosen.plan.phases) == phases


def test_blockllm_remembers_losses_and_rounds():
    """Oracle: by hand. The mean of all losses since the last choice, 4, against that of the latest three, (1 + 1 + 10) / 3 = 4: it stalls,
    though the step's own loss is above both; the first choice is round 1, this one round 2, and a tensor's second round is its second visit."""
    chosen = run("blockllm", anatomies.llama(depth=1), switch_every=1, patience=3, sparsity=0.5)
    names = {t.name for t in chosen.anatomy.blocks[0].tensors}
    for losses in ((4.0,), (1.0,), (1.0,)):
        chosen.decide(
            Evidence(chosen.plan.decide_at, losses, gradients=dict.fromkeys(names, Gradient(1.0, 1.0, 1.0, 1)))
        )
        assert chosen.memory["rounds"] == 1
    assert (chosen.memory["total"], chosen.memory["number"], chosen.memory["latest"]) == (6.0, 3, [4.0, 1.0, 1.0])
    first = chosen.trained & names
    chosen.decide(Evidence(4, (10.0,), gradients=dict.fromkeys(names, Gradient(1.0, 1.0, 1.0, 1))))
    assert chosen.memory["rounds"] == 2
    second = chosen.trained & names
    assert chosen.memory["visits"] == {name: (name in first) + (name in second) for name in first | second}
    assert (chosen.memory["total"], chosen.memory["number"], chosen.memory["latest"]) == (0.0, 0, [])


def test_blockllm_takes_its_share_and_never_the_embedding_or_the_words():
    """By hand: tensors join until they hold the share, so the sum without the largest is below it."""
    for anatomy in (LLAMA, anatomies.gpt2(), anatomies.t5()):
        total = sum(layer.numel for layer in anatomy.blocks)
        chosen = run("blockllm", anatomy, sparsity=0.8)
        taken = [t for layer in anatomy.blocks for t in layer.tensors if t.name in chosen.trained]
        assert sum(t.numel for t in taken) >= 0.2 * total
        assert sum(t.numel for t in taken) - max(t.numel for t in taken) < 0.2 * total
        outside = chosen.trained - {t.name for t in taken}
        assert outside == {t.name for t in anatomy.layer("norm").tensors}
    classifier = anatomies.llama(labels=3)
    assert "score.weight" in run("blockllm", classifier).trained


def test_blockllm_ranks_by_norm_over_visits():
    """By hand: of two idle tensors, norm 6 in two of two rounds is worth 6, norm 4 in one of two is worth 8."""
    anatomy = anatomies.llama(depth=1)
    chosen = run("blockllm", anatomy, sparsity=0.99, switch_every=1, patience=1)
    names = [t.name for t in anatomy.blocks[0].tensors]
    often, seldom, *_ = (name for name in names if name not in chosen.trained)
    chosen.memory = {
        "norms": {**dict.fromkeys(names, 0.5), often: 6.0, seldom: 4.0}, "visits": {**dict.fromkeys(names, 2), seldom: 1},
        "rounds": 2, "total": 1.0, "number": 1, "latest": [1.0],
    }  # fmt: skip
    chosen.decide(Evidence(1, (2.0,)))
    assert chosen.trained & set(names) == {seldom}
    assert chosen.revision.scores[often] == 6.0
    assert chosen.revision.scores[seldom] == 8.0
    assert chosen.memory["visits"][seldom] == 2


def test_blockllm_visits_every_tensor_before_any_again():
    """Oracle: on a loss that never falls, who is chosen again is so beside all that were never chosen."""
    anatomy = anatomies.llama(depth=2)
    tensors = {t.name for layer in anatomy.blocks for t in layer.tensors}
    chosen = run("blockllm", anatomy, switch_every=2, patience=1, sparsity=0.8)
    for _ in range(9):
        chosen.decide(random_evidence(chosen, losses=(1.0, 2.0)))
        known = set(chosen.memory["norms"])
        if chosen.trained & known & tensors:
            assert tensors - known <= chosen.trained
            break
        assert chosen.trained & tensors
    assert tensors == known | (chosen.trained & tensors)


# -- every rule ----------------------------------------------------------------------------------------------------


def random_evidence(subject: Run, **fixed) -> Evidence:
    """Measurements out of nothing but the step, for every tensor and layer that may be asked about."""
    step = subject.plan.decide_at
    random = Random(step)
    adapted = subject.plan.adapted(subject.anatomy)
    steps = step - subject.plan.phases[-1].first_step
    some = {name: random.random() for name in subject.plan.phases[-1].trainable}
    return Evidence(
        step,
        **{"losses": tuple(random.random() for _ in range(2)), "learning_rate": random.random(), **fixed},
        gradients={name: Gradient(r, r, r * r, steps) for name, r in some.items()},
        changes={t.name: Change(random.random(), 1.0) for t in adapted.tensors},
        similarities={layer.name: Similarity(random.random(), random.random()) for layer in adapted.blocks},
    )


SETTINGS: list[dict[str, Any]] = [{}, {"adapter": {"categories": ["q", "o"]}}, {"embed": "freeze", "norm": "freeze"}]


@pytest.mark.parametrize("strategy", ADAPTIVE)
@pytest.mark.parametrize("name", SMALL)
def test_promises(strategy, name):
    """Oracle: the contract. Phases tile (the plan itself asserts it) and are never empty, the past stays, names are the
    adapted ones in model order, the digest and the next decision come again, also from memory and plan out of JSON."""
    anatomy = SMALL[name]
    for more in SETTINGS:
        subject = run(strategy, anatomy, num_steps=40, **QUICK[strategy], **more)
        for _ in range(20):
            if subject.plan.decide_at is None:
                break
            before, memory, evidence = subject.plan, subject.memory, random_evidence(subject)
            args = (anatomy, subject.options, subject.num_steps)
            again = ADAPTIVE[strategy].revise(
                *args, FreezePlan.from_json(before.to_json()), evidence, json.loads(json.dumps(memory))
            )
            subject.decide(evidence)
            assert again == subject.revision
            check(subject, before, strategy)
        assert subject.plan.decide_at is None
        assert strategy in ("adt_h", "adt_l") or evidence.step == 38, "it decided to the end of the run"
        assert len(subject.plan.phases) > 1, "it did something"


def check(subject: Run, before: FreezePlan, strategy: str) -> None:
    plan, step = subject.plan, before.decide_at
    adapted = plan.adapted(subject.anatomy)
    assert plan.until(step).phases == before.until(step).phases
    assert plan.phases[-1].num_steps is None
    assert (plan.adapter, plan.state) == (before.adapter, before.state)
    assert FreezePlan.from_json(plan.to_json()) == plan
    names = plan.phases[-1].trainable
    assert names == adapted.in_order(names)
    assert subject.active, "at least one layer trains"
    if plan.adapter is not None:
        layers = [t for layer in adapted.blocks for t in layer.tensors if t.name in names]
        assert {t.category for t in layers} == {"adapter"}
    if strategy in MONOTONE:
        assert set(names) <= set(before.phases[-1].trainable), "what is frozen stays frozen"
    if len(plan.phases) > 1:
        assert plan.phases[-1].trainable != plan.phases[-2].trainable, "no phase for a set that did not change"
    assert plan.decide_at is None or step < plan.decide_at < 40
    known = {*adapted.layer_names, *(t.name for t in adapted.tensors)}
    assert subject.revision.scores
    assert set(subject.revision.scores) <= known
    assert all(map(math.isfinite, subject.revision.scores.values()))


def test_every_adaptive_name_is_a_strategy_that_starts_with_its_rule():
    assert set(ADAPTIVE) <= set(STRATEGIES)
    for name, rule in ADAPTIVE.items():
        options = FreezeOptions(strategy=name, **QUICK[name])
        assert make_plan(LLAMA, options, 50) == rule.initial(LLAMA, options, 50)


def test_what_must_be_measured():
    """Oracle: what each rule reads of the evidence; tracking gradients needs no copy of the start weights."""
    assert needs(FreezeOptions(strategy="adt_h")) == {"change"}
    assert needs(FreezeOptions(strategy="adt_h", measure="grad_l2")) == {"gradient"}
    assert needs(FreezeOptions(strategy="egeria_like")) == {"activations"}
    assert needs(FreezeOptions(strategy="bottom")) == set()
    fields = {"gradient": "gradients", "change": "changes", "activations": "similarities"}
    for strategy in ADAPTIVE:
        options = FreezeOptions(strategy=strategy, **QUICK[strategy])
        subject = run(strategy, **QUICK[strategy])
        whole = random_evidence(subject)
        given = {fields[measure]: getattr(whole, fields[measure]) for measure in needs(options)}
        alone = Evidence(whole.step, whole.losses, whole.learning_rate, **given)
        args = (LLAMA, options, None, subject.plan)
        revise = ADAPTIVE[strategy].revise
        assert revise(*args, alone, {}) == revise(*args, whole, {})


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_the_snippet_of_its_card(strategy):
    """Oracle: the recipe takes it; where the card says that these are the defaults, they are."""
    card = (Path(__file__).parents[1] / "docs" / "methods" / f"{strategy}.md").read_text(encoding="utf-8")
    snippet = card.split("```yaml\n")[1].split("```")[0]
    subjects = [Run(LLAMA, FreezeOptions(**yaml.safe_load(snippet)["freeze"]), 500), run(strategy, num_steps=500)]
    assert subjects[0].options.strategy == strategy
    for _ in range(6):
        assert "the defaults" not in snippet or subjects[0].plan == subjects[1].plan
        for subject in subjects:
            if subject.plan.decide_at is not None:
                subject.decide(random_evidence(subject))


#: Two values of each key that make a difference on the random measurements.
TOLD: dict[str, tuple[Any, Any]] = {
    "fraction": (0.25, 0.75), "count": (1, 2), "rounding": ("floor", "ceil"), "seed": (1, 2), "active_layers": (1, 3),
    "switch_every": (2, 3), "state": ("keep", "offload"), "drop_master": (False, True), "rewarmup_steps": (0, 3),
    "track_steps": (3, 4), "measure": ("abs_l2", "grad_l2"), "stability_check": (False, True), "percentile": (0, 100),
    "threshold": (0.01, 0.99), "window": (2, 3), "slope": (1e-9, 0.9), "hits": (1, 2), "thaw_factor": (1.1, None),
    "variance": (1e-9, 0.9), "min_cka": (0.0, 0.99), "epsilon": (0.0, 1.0), "epsilon_decay": (0.0, 1.0),
    "temperature": (1e-4, 1e4), "ema": (0.0, 0.99), "sparsity": (0.3, 0.9), "patience": (1, 9),
}  # fmt: skip


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_the_table_of_keys_is_what_the_rules_do(strategy):
    """Oracle: the plans, scores and last memory of a run, which a key changes exactly where FREEZE_KEYS says it is read."""
    for key, values in TOLD.items():
        base = {"rounding": {"fraction": 0.4}, "drop_master": {"state": "clear"}}.get(key, {})
        traces = []
        for value in values:
            plain = FreezeOptions(strategy=strategy, **QUICK[strategy])
            subject = Run(anatomies.llama(), plain.model_copy(update=base | {key: value}), 61)
            trace: list[Any] = [subject.plan]
            while subject.plan.decide_at is not None:
                subject.decide(random_evidence(subject))
                trace.append((subject.plan, subject.revision.scores))
            traces.append((trace, subject.memory))
        assert (traces[0] != traces[1]) == (strategy in FREEZE_KEYS[key]), key


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_a_run_that_ends_before_the_first_decision(strategy):
    """Oracle: the shortest run that is taken, whose last step is after the first switch that may come."""
    earliest = {"adt_h": 4, "adt_l": 4, "autofreeze": 4, "tang_like": 4, "egeria_like": 4, "smartfrz": 4, "blockllm": 4}
    first = earliest.get(strategy, 2)
    assert run(strategy, num_steps=first + 1, **QUICK[strategy]).plan.decide_at is not None
    keys = {
        "adt_h": "freeze.track_steps", "adt_l": "freeze.track_steps", "blockllm": "freeze.switch_every or freeze.patience",
        "egeria_like": "freeze.switch_every, freeze.window or freeze.hits", "smartfrz": "freeze.switch_every or freeze.window",
    }.get(strategy, "freeze.switch_every")  # fmt: skip
    told = (
        rf"after step {first}, and the run has only {first} steps\. Lengthen it \(train\.max_steps\), or lower {keys}\."
    )
    with pytest.raises(UserError, match=told):
        run(strategy, num_steps=first, **QUICK[strategy])


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_what_is_told_of_ends_and_adapters(strategy):
    """Oracle: the note of a tied head, and that of packed experts."""
    tied = run(strategy, anatomies.llama(tied=True), **QUICK[strategy]).plan
    whether = "train" if "model.embed_tokens.weight" in tied.phases[0].trainable else "are frozen"
    assert f"lm_head.weight is tied to model.embed_tokens.weight: they {whether} as one" in tied.notes
    experts = load_shipped("qwen3-235b-a22b")
    plan = run(strategy, experts, adapter={}, **QUICK[strategy]).plan
    assert (plan.strategy, plan.adapter.kind) == (strategy, "lora")
    assert sum("packed expert tensors take no adapter" in note for note in plan.notes) == 1


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_what_becomes_of_the_state_of_what_freezes(strategy):
    """Oracle: the cards."""
    state = {"adagradselect": "keep", "grass": "offload"}.get(strategy, "clear")
    assert run(strategy, **QUICK[strategy]).plan.state == state
    assert run(strategy, **QUICK[strategy] | {"state": "offload"}).plan.state == "offload"


def test_autofreeze_must_know_the_length():
    with pytest.raises(UserError, match=r"train\.max_steps"):
        run("autofreeze")


@pytest.mark.parametrize("strategy", ["grass", "adagradselect"])
def test_more_layers_than_there_are(strategy):
    with pytest.raises(UserError, match="active_layers is 5, but there are only 4 units"):
        run(strategy, active_layers=5)
    assert run(strategy, active_layers=4).active == {0, 1, 2, 3}
    assert run(strategy, anatomies.llama(depth=1)).active == {0}


@pytest.mark.parametrize("number", [{"count": 4}, {"fraction": 1.0}, {"count": 5}])
def test_adt_leaves_a_layer(number):
    told = r"freeze all 4 layers|freeze.count is 5, but the model's list of layers has only 4 to freeze"
    with pytest.raises(UserError, match=told):
        run("adt_h", **number)


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "adt_h", "track_steps": 0}, {"strategy": "autofreeze", "percentile": 101},
        {"strategy": "autofreeze", "percentile": -1}, {"strategy": "grass", "active_layers": 0},
        {"strategy": "grass", "temperature": 0}, {"strategy": "blockllm", "sparsity": 1.0},
        {"strategy": "egeria_like", "thaw_factor": 1.0}, {"strategy": "adt_h", "measure": "l2"},
        {"strategy": "grass", "track_steps": 3},
        {"strategy": "bottom", "switch_every": 3},
    ],
)  # fmt: skip
def test_values_that_cannot_be(wrong):
    """Oracle: the recipe's bounds; a key that the strategy does not read is refused."""
    with pytest.raises(ValueError, match=r"should be|does not read"):
        FreezeOptions(**wrong)


def test_a_model_without_layers():
    bare = Anatomy("bare", "none", tuple(layer for layer in LLAMA.layers if not layer.is_block))
    with pytest.raises(UserError, match="bare has none"):
        run("grass", bare)


@pytest.mark.parametrize("strategy", ADAPTIVE)
def test_measurements_that_are_no_numbers(strategy):
    """Training that has diverged is said to have, not ranked."""
    subject = run(strategy, **QUICK[strategy])
    nan = float("nan")
    names = subject.trained
    broken = Evidence(
        subject.plan.decide_at, gradients=dict.fromkeys(names, Gradient(nan, nan, nan, 1)),
        changes=dict.fromkeys(names, Change(nan, 1.0)),
        similarities={layer.name: Similarity(nan, nan) for layer in LLAMA.blocks},
    )  # fmt: skip
    subjects = [*LLAMA.layer_names, *(t.name for t in LLAMA.tensors)]
    with pytest.raises(UserError, match="diverged") as caught:
        subject.decide(broken)
    assert any(f"of {name} by step {broken.step} is not finite (nan)" in str(caught.value) for name in subjects)


@pytest.mark.parametrize("field", ["l1", "l2", "squared"])
def test_a_gradient_of_which_one_figure_is_no_number(field):
    subject = run("tang_like", **QUICK["tang_like"])
    whole = Gradient(1.0, 1.0, 1.0, 1)
    measured = dict.fromkeys(subject.trained, whole) | {
        LLAMA.blocks[1].tensors[0].name: replace(whole, **{field: math.inf})
    }
    with pytest.raises(UserError, match=r"What was measured of model\.layers\.1\..* is not finite"):
        subject.decide(Evidence(subject.plan.decide_at, gradients=measured))


def test_masters_are_dropped_where_state_is():
    with pytest.raises(UserError, match=r"drop_master goes with freeze\.state 'clear'"):
        run("grass", drop_master=True)
    with pytest.raises(ValueError, match="drop_master"):
        run("autofreeze", drop_master=True, state="keep", switch_every=5)
    assert run("blockllm", drop_master=True).plan.drop_master


def test_rel_l2_of_a_layer_that_starts_at_zero():
    tracked = run("adt_h", measure="rel_l2")
    with pytest.raises(UserError, match=r"layers\.0 starts at zero"):
        tracked.decide(tracked.layers(change=[1, 1, 1, 1]))
