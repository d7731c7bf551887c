"""LISA, OwLore, BAdam and HiFT against schedules written down by hand, and against the laws of their draws."""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from random import Random

import anatomies
import pytest

from dsfreeze.anatomy import Anatomy
from dsfreeze.cli import run
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import FreezeOptions
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.strategies import make_plan
from dsfreeze.strategies.rotating import draw


def plan_of(anatomy: Anatomy, steps: int | None = 100, **options) -> FreezePlan:
    return make_plan(anatomy, FreezeOptions(**options), steps)


def active(anatomy: Anatomy, plan: FreezePlan, phase: Phase) -> set[str]:
    """The layers, ends included, of which something trains."""
    adapted = plan.adapted(anatomy)
    return {adapted.layer_of[name].name for name in phase.trainable}


def blocks(anatomy: Anatomy, plan: FreezePlan, step: int) -> list[int]:
    """The numbers of the transformer layers that train at a step."""
    names = active(anatomy, plan, plan.phase_at(step))
    return [index for index, layer in enumerate(anatomy.blocks) if layer.name in names]


@pytest.fixture
def scores(tmp_path):
    def write(values: dict[str, float] | str) -> str:
        path = tmp_path / "scores.json"
        path.write_text(values if isinstance(values, str) else json.dumps({"scores": values}))
        return str(path)

    return write


# -- LISA ----------------------------------------------------------------------------------------------------------


def test_lisa_draws_two_every_twenty_steps_and_the_ends_always_train():
    """Oracle: the published gamma 2 and K 20; embedding, norm and head always."""
    anatomy = anatomies.llama(depth=12)
    plan = plan_of(anatomy, 1000, strategy="lisa")
    assert plan.state == "keep"
    for first in range(0, 1000, 20):
        drawn = {tuple(blocks(anatomy, plan, step)) for step in range(first, first + 20)}
        assert [len(one) for one in drawn] == [2], "the set holds for 20 steps"
        assert {"embed", "norm", "head"} <= active(anatomy, plan, plan.phase_at(first))
    assert all(phase.first_step % 20 == 0 for phase in plan.phases)


def test_lisa_draws_are_uniform_without_replacement():
    """Oracle: each of the 6 pairs of 4 layers has probability 1/6; five standard deviations of 3000 draws."""
    anatomy = anatomies.llama(depth=4)
    plan = plan_of(anatomy, 3000, strategy="lisa", switch_every=1)
    pairs = Counter(tuple(blocks(anatomy, plan, step)) for step in range(3000))
    assert set(pairs) == set(combinations(range(4), 2))
    assert all(abs(n - 500) < 5 * (3000 * 1 / 6 * 5 / 6) ** 0.5 for n in pairs.values())


@pytest.mark.parametrize("strategy", ["lisa", "badam", "hift"])
def test_a_draw_depends_on_seed_and_round_alone(strategy):
    """Oracle: a longer run's plan cut to the shorter; another seed."""
    anatomy = anatomies.llama(depth=12)
    given = {"strategy": strategy, "order": "random"} if strategy != "lisa" else {"strategy": strategy}
    short, long = plan_of(anatomy, 333, **given), plan_of(anatomy, 1000, **given)
    assert long.until(333).digest == short.digest
    assert plan_of(anatomy, 333, **given, seed=1).digest != short.digest


@pytest.mark.parametrize(("strategy", "at_once"), [("lisa", 2), ("badam", 1), ("hift", 1)])
def test_a_longer_run_has_the_same_adapters(strategy, at_once):
    """Oracle: the adapters of every layer, whether or not its turn comes; else a resumed run would have new ones."""
    anatomy = anatomies.llama(depth=12)
    short, long = (plan_of(anatomy, n, strategy=strategy, adapter={"categories": ["q"]}) for n in (10, 1000))
    assert short.adapter == long.adapter
    assert len(short.adapter.targets) == 12
    assert long.until(10).digest == short.digest
    assert len(blocks(anatomy, short, 0)) == at_once
    assert all(".lora_" in name for name in short.phases[0].trainable)


def test_lisa_with_a_frozen_embedding():
    """Oracle: the note's number, (L - gamma) / (gamma + 1) = 10/3 of 12."""
    anatomy = anatomies.llama(depth=12)
    assert any("3.3 of 12" in note for note in plan_of(anatomy, strategy="lisa").notes)
    plan = plan_of(anatomy, strategy="lisa", embed="freeze")
    assert "embed" not in active(anatomy, plan, plan.phases[0])
    assert not any("3.3 of 12" in note for note in plan.notes)


def test_matrices_take_turns_too():
    anatomy = anatomies.llama(depth=2)
    plan = plan_of(anatomy, strategy="badam", granularity="matrix", order="ascending", switch_every=10)
    assert [phase.trainable for phase in plan.phases[:2]] == [
        ("model.layers.0.self_attn.q_proj.weight",), ("model.layers.0.self_attn.k_proj.weight",),
    ]  # fmt: skip


# -- OwLore --------------------------------------------------------------------------------------------------------


def test_a_weighted_draw_has_the_law_of_successive_draws():
    """Oracle: p(i then j) = w_i w_j / (1 - w_i), summed over both orders, computed here; five standard deviations."""
    weights, number = [0.5, 0.3, 0.2, 0.0], 6000
    pairs = Counter(tuple(draw(weights, 2, Random(f"law/{i}"))) for i in range(number))
    for i, j in combinations(range(3), 2):
        p = weights[i] * weights[j] * (1 / (1 - weights[i]) + 1 / (1 - weights[j]))
        assert abs(pairs[i, j] - number * p) < 5 * (number * p * (1 - p)) ** 0.5
    assert sum(pairs.values()) == sum(pairs[pair] for pair in combinations(range(3), 2)), "weight 0 is never drawn"


def test_owlore_is_lisa_with_five_layers_fifty_steps_and_weights(scores):
    """Oracle: the published gamma and K; layers of weight 0 never train, the heaviest most often."""
    anatomy = anatomies.llama(depth=12)
    weights = {f"layers.{i}": float(i) for i in range(12)}
    plan = plan_of(anatomy, 5000, strategy="owlore", scores=scores(weights))
    drawn = [blocks(anatomy, plan, step) for step in range(0, 5000, 50)]
    assert {len(one) for one in drawn} == {5}
    assert all(plan.phase_at(50 * i).trainable == plan.phase_at(50 * i + 49).trainable for i in range(100))
    counts = Counter(i for one in drawn for i in one)
    assert counts[0] == 0
    assert counts[11] > counts[1]
    assert {"embed", "norm", "head"} <= active(anatomy, plan, plan.phases[0])
    just_enough = scores({f"layers.{i}": float(i < 5) for i in range(12)})
    assert blocks(anatomy, plan_of(anatomy, strategy="owlore", scores=just_enough), 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers.0": -1.0, "layers.1": 1.0}, "weight of a draw"),
        ({"layers.0": 1.0}, "no score for layers.1"),
        ({"layers.0": 1.0, "layers.1": 0.0}, "only 1 of 2 units"),
        ('{"scores": {"layers.0": NaN, "layers.1": 1.0}}', "cannot be ranked"),
    ],
)
def test_weights_that_cannot_be_drawn_from(values, message, scores):
    with pytest.raises(UserError, match=message):
        plan_of(anatomies.llama(depth=2), strategy="owlore", scores=scores(values), active_layers=2)


def test_weights_are_of_this_model_and_named_by_their_file(scores):
    anatomy = anatomies.llama(depth=6)
    other = scores(json.dumps({"model": "another", "scores": {f"layers.{i}": 1.0 for i in range(5)}}))
    with pytest.raises(UserError, match=rf"'{other}' has no score for layers.5"):
        plan_of(anatomy, strategy="owlore", scores=other)
    model = {"name": "mine", "layers": 6, "digest": "of another"}
    named = scores(json.dumps({"model": model, "scores": {f"layers.{i}": 1.0 for i in range(6)}}))
    with pytest.raises(UserError, match="was made for mine with 6 layers"):
        plan_of(anatomy, strategy="owlore", scores=named)
    with pytest.raises(UserError, match="only 4 of 6 units"):
        plan_of(anatomy, strategy="owlore", scores=scores({f"layers.{i}": float(i < 4) for i in range(6)}))


# -- BAdam ---------------------------------------------------------------------------------------------------------


def test_badam_trains_every_layer_once_a_sweep_for_exactly_k_steps():
    """Oracle: the paper's rule; its own code gives the first block K - 1 steps."""
    anatomy = anatomies.llama(depth=12)
    plan = plan_of(anatomy, 7 * 12 * 3, strategy="badam", switch_every=7)
    orders = []
    for sweep in range(3):
        start = sweep * 84
        turns = [[blocks(anatomy, plan, start + 7 * turn + i) for i in range(7)] for turn in range(12)]
        assert all(turn == [turn[0]] * 7 for turn in turns)
        orders.append([turn[0][0] for turn in turns])
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3, "a fresh permutation each sweep"
    assert plan.state == "clear"
    assert active(anatomy, plan, plan.phases[0]) <= {f"layers.{i}" for i in range(12)}


def test_a_sweep_is_shuffled_by_seed_and_its_number():
    """Oracle: `random.Random("SEED/SWEEP")` shuffles the layers' numbers; what a run of an older release did is done again."""
    anatomy = anatomies.llama(depth=4)
    plan = plan_of(anatomy, 30, strategy="badam", switch_every=1, seed=7)
    expected = []
    for sweep in range(8):
        order = list(range(4))
        Random(f"7/{sweep}").shuffle(order)
        expected += order
    assert [blocks(anatomy, plan, step) for step in range(30)] == [[index] for index in expected[:30]]


def test_what_is_told_of_turns():
    """Oracle: the notes by hand: 12 layers, 5 at a time, are 3 turns a sweep."""
    anatomy = anatomies.llama(depth=12)

    def told(steps: int, **options) -> str:
        return "; ".join(plan_of(anatomy, steps, strategy="badam", order="ascending", active_layers=5, **options).notes)

    assert "5 of 12 units for 20 steps each, ascending: a sweep takes 60 steps" in told(60, switch_every=20)
    assert "5 of 12 units for 1 step each, ascending: a sweep takes 3 steps" in told(60, switch_every=1)
    assert "the run's 59 steps end within the first sweep: some units never train" in told(59, switch_every=20)
    assert "first sweep" not in told(60, switch_every=20)
    assert "head" not in told(60, switch_every=20)
    hift = plan_of(anatomies.llama(depth=4), 14, strategy="hift").notes
    assert hift[0] == "1 of 6 units for 1 step each, ascending: a sweep takes 6 steps"
    new_head = plan_of(anatomies.llama(labels=3), 60, strategy="badam").notes
    assert "the task's new head trains in every phase, since it starts from random numbers" in new_head


@pytest.mark.parametrize(("order", "expected"), [("ascending", [0, 1, 2, 3, 0]), ("descending", [3, 2, 1, 0, 3])])
def test_badam_in_a_fixed_order(order, expected):
    anatomy = anatomies.llama(depth=4)
    plan = plan_of(anatomy, 250, strategy="badam", order=order)
    assert [blocks(anatomy, plan, step) for step in range(0, 250, 50)] == [[i] for i in expected]
    assert [phase.num_steps for phase in plan.phases] == [50] * 5


def test_a_layer_drawn_twice_running_goes_on():
    """Oracle: one phase where sweeps meet on the same layer, so that its state is not cleared in between."""
    anatomy = anatomies.llama(depth=2)
    plan = plan_of(anatomy, 4000, strategy="badam", switch_every=10)
    assert {phase.num_steps for phase in plan.phases} == {10, 20}
    assert all(a.trainable != b.trainable for a, b in pairwise(plan.phases))


@pytest.mark.parametrize("strategy", ["badam", "hift", "lisa"])
def test_a_new_head_trains_in_every_phase(strategy):
    for anatomy in (anatomies.llama(labels=3), anatomies.bert()):
        plan = plan_of(anatomy, strategy=strategy, switch_every=3)
        head = {t.name for t in anatomy.layer("head").tensors}
        assert all(head <= set(phase.trainable) for phase in plan.phases)


def test_ends_asked_for_train_beside_the_blocks():
    anatomy = anatomies.llama()
    plan = plan_of(anatomy, strategy="badam", embed="train", norm="train")
    assert all({"embed", "norm"} <= active(anatomy, plan, phase) for phase in plan.phases)


def test_short_turns_with_cleared_state_are_remarked_upon():
    """Oracle: 1 / (1 - beta1) = 10 steps."""
    anatomy = anatomies.llama()

    def warned(**options) -> bool:
        return any("lr * sign" in note for note in plan_of(anatomy, **options).notes)

    assert warned(strategy="badam", switch_every=9)
    assert not warned(strategy="badam", switch_every=10)
    assert not warned(strategy="badam", switch_every=9, state="keep")
    assert warned(strategy="lisa", switch_every=9, state="clear")


# -- HiFT ----------------------------------------------------------------------------------------------------------


def test_hift_goes_from_the_embedding_to_the_head_at_one_rate_a_sweep():
    """Oracle: by hand: 6 units (the norm with the head), one step each; the rate is read at each sweep's first step."""
    anatomy = anatomies.llama(depth=4)
    plan = plan_of(anatomy, 14, strategy="hift")
    sweep = [{"embed"}, {"layers.0"}, {"layers.1"}, {"layers.2"}, {"layers.3"}, {"norm", "head"}]
    assert [active(anatomy, plan, phase) for phase in plan.phases] == (sweep * 3)[:14]
    assert [phase.lr_step for phase in plan.phases] == [0] * 6 + [6] * 6 + [12] * 2
    assert plan.state == "offload"


def test_hift_in_groups_the_last_one_smaller():
    """Oracle: by hand, from the output: 6 units in groups of 4, 5 steps each."""
    anatomy = anatomies.llama(depth=4)
    plan = plan_of(anatomy, 20, strategy="hift", order="descending", active_layers=4, switch_every=5)
    top = {"head", "norm", "layers.3", "layers.2", "layers.1"}
    assert [active(anatomy, plan, phase) for phase in plan.phases] == [top, {"embed", "layers.0"}] * 2
    assert [phase.lr_step for phase in plan.phases] == [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("anatomy", "first", "last"),
    [
        (anatomies.llama(tied=True), {"embed"}, {"layers.3", "norm"}),  # the tied matrix is one unit
        (anatomies.llama(labels=3), {"embed", "head"}, {"layers.3", "norm", "head"}),  # a new head always trains
        (anatomies.bert(), {"embed", "head"}, {"layers.3", "head"}),
    ],
)
def test_hift_where_no_head_takes_turns(anatomy, first, last):
    plan = plan_of(anatomy, 5, strategy="hift")
    assert [active(anatomy, plan, phase) for phase in (plan.phases[0], plan.phases[-1])] == [first, last]
    assert len(plan.phases) == 5


def test_hift_ends_that_the_options_settle_take_no_turn():
    anatomy = anatomies.llama(depth=2)
    frozen = plan_of(anatomy, 4, strategy="hift", embed="freeze", head="freeze")
    assert [active(anatomy, frozen, p) for p in frozen.phases] == [{"layers.0"}, {"layers.1", "norm"}] * 2
    trained = plan_of(anatomy, 2, strategy="hift", embed="train", norm="freeze", head="freeze")
    assert [active(anatomy, trained, p) for p in trained.phases] == [{"embed", "layers.0"}, {"embed", "layers.1"}]


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["lisa", "badam", "hift", "sweep", "gradual_unfreezing", "freezeout"])
def test_the_runs_length_must_be_known(strategy):
    with pytest.raises(UserError, match=f"strategy '{strategy}' must know how long the run is; set train.max_steps"):
        plan_of(anatomies.llama(), None, strategy=strategy)


@pytest.mark.parametrize("strategy", ["lisa", "badam", "sweep", "gradual_unfreezing"])
def test_more_layers_at_once_than_there_are(strategy):
    with pytest.raises(UserError, match=r"active_layers is 9.*only 4.*1 to 4"):
        plan_of(anatomies.llama(), strategy=strategy, active_layers=9)


def test_nothing_left_in_a_phase():
    """Oracle: every tensor is frozen by a range or by an end's option during the first ten steps."""
    anatomy = anatomies.llama(depth=2)
    with pytest.raises(UserError, match=r"'step_ranges' trains nothing from step 0 to step 9"):
        plan_of(anatomy, step_ranges={"layers": 10}, embed="freeze", norm="freeze", head="freeze")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["freeze.strategy=lisa", "freeze.switch_every=0"], "whole number from 1 up"),
        (["freeze.strategy=lisa", "freeze.granularity=category"], "layer or matrix"),
        (["freeze.strategy=owlore"], "needs freeze.scores"),
        (["freeze.strategy=badam", "freeze.drop_master=true", "freeze.state=keep"], "write state: clear"),
        (["freeze.strategy=hift", "freeze.drop_master=true", "train.max_steps=9"], "'offload' here"),
        (["freeze.strategy=sweep", "freeze.order=random"], "slides its window"),
        (["freeze.strategy=bottom", "freeze.active_layers=2"], "does not read it"),
        (["freeze.strategy=freezeout", "freeze.state=keep"], "does not read it"),
        (["freeze.strategy=lisa"], "set train.max_steps"),
        (["freeze.strategy=lsia"], "'lisa'"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    """Oracle: exit code 2 and the mend in the message."""
    assert run(["plan", "model=smollm2-135m", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


# -- other trainers' spellings, the command line -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{lisa_activated_layers: 3, lisa_step_interval: 10}", ("lisa", 3, 10, "auto")),
        ("{lisa_n_layers: 3, lisa_interval_steps: 10}", ("lisa", 3, 10, "auto")),
        ("{badam_switch_interval: 5, badam_switch_mode: descending}", ("badam", None, 5, "descending")),
        ("{strategy: owlore, scores: s.json, lisa_n_layers: 3}", ("owlore", 3, None, "auto")),
    ],
)
def test_spellings_of_other_trainers(given, expected, tmp_path):
    """Oracle: the same values under our names, from a file and from the command line."""
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\nfreeze: {given}\n")
    words = [f"freeze.{word.replace(': ', '=')}" for word in given.strip("{}").split(", ")]
    for recipe in (load_recipe(path), load_recipe(None, ["model=m", *words])):
        freeze = recipe.freeze
        assert (freeze.strategy, freeze.active_layers, freeze.switch_every, freeze.order) == expected


def test_an_override_beats_a_spelling_in_the_file_and_two_spellings_are_a_mistake(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nfreeze:\n  lisa_n_layers: 3\n")
    assert load_recipe(path, ["freeze.active_layers=1"]).freeze.active_layers == 1
    assert load_recipe(path, ["freeze.lisa_activated_layers=4"]).freeze.active_layers == 4
    path.write_text("model: m\nfreeze:\n  active_layers: 2\n  lisa_n_layers: 3\n")
    with pytest.raises(UserError, match=r"recipe.yaml:4: freeze.lisa_n_layers: is another spelling of freeze.active"):
        load_recipe(path)
    path.write_text("model: m\nfreeze:\n  lisa_n_layers: 0\n")
    with pytest.raises(
        UserError, match=r"recipe.yaml:3: freeze.active_layers: is 0; it takes a whole number from 1 up"
    ):
        load_recipe(path)


@pytest.mark.parametrize("strategy", ["lisa", "badam", "hift", "sweep", "gradual_unfreezing", "freezeout"])
def test_dsfreeze_plan_shows_it(strategy, capsys):
    """Oracle: the phases of the JSON add up to the run; the picture counts steps and stays short."""
    words = ["plan", "model=smollm2-135m", f"freeze.strategy={strategy}", "train.max_steps=600"]
    assert run([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert sum(phase["num_steps"] for phase in plan["phases"]) == 600
    assert plan["strategy"] == strategy
    assert run(words) == 0
    shown = capsys.readouterr().out
    assert "more phases. Steps that each layer trains, of 600:" in shown
    assert len(shown.splitlines()) < 60


def test_every_method_has_its_card():
    """Oracle: the folder, and its index."""
    folder = Path(__file__).parents[1] / "docs" / "methods"
    index = (folder / "README.md").read_text(encoding="utf-8")
    for name in ("lisa", "badam", "hift", "owlore", "sweep", "gradual_unfreezing", "freezeout", "step_ranges"):
        card = (folder / f"{name}.md").read_text(encoding="utf-8")
        assert f"strategy: {name}" in card
        assert f"({name}.md)" in index
