"""The budget: limits as they are written, the exact choice, and plans that keep their limits.

Oracles: the spellings' meaning as fractions; every subset, tried one by one; `estimate` for what a plan costs, through plans of
strategy `patterns`, which name what trains outright.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import chain, combinations, product
from random import Random
from time import process_time

import anatomies
import pytest
from marks import some_fast

from dsfreeze.anatomy import Anatomy, load_shipped
from dsfreeze.budget import NO_LIMIT, Item, best_choice, parse_limit
from dsfreeze.errors import UserError
from dsfreeze.estimate import Estimate, estimate
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.setting import Setting
from dsfreeze.strategies import make_plan
from dsfreeze.strategies.budgeted import Balance
from dsfreeze.strategies.scores_file import model_digest
from dsfreeze.strategies.selection import units

# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("0.5x", "1/2"), (".5X", "1/2"), ("1x", "1"), ("1.x", "1"), ("50%", "1/2"), ("100%", "1"), ("0.1%", "1/1000"),
        ("-40%", "3/5"), ("- 40 %", "3/5"), ("-0.25x", "3/4"), (" 33.3 % ", "333/1000"), ("-0%", "1"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["memory", "time", "flops", "trainable"])
def test_shares_of_full_tuning(kind, text, share):
    limit = parse_limit(kind, text)
    assert (limit.amount, limit.relative) == (Fraction(share), True)
    assert limit.of(1000) == 1000 * Fraction(share)


@pytest.mark.parametrize(
    ("kind", "text", "amount"),
    [
        ("memory", "40GiB", 40 * 2**30), ("memory", "1.5 gib", 3 * 2**29), ("memory", "7kib", 7 * 2**10),
        ("memory", "2TiB", 2**41), ("memory", "3 MB", 3_000_000), ("memory", "80GB", 80 * 10**9), ("memory", "1TB", 10**12),
        ("memory", "9KB", 9000), ("memory", "5MiB", 5 * 2**20),
        ("trainable", "10M", 10**7), ("trainable", "1.5b", 1_500_000_000), ("trainable", "8K", 8000),
    ],
)  # fmt: skip
def test_amounts(kind, text, amount):
    limit = parse_limit(kind, text)
    assert (limit.amount, limit.relative) == (amount, False)
    assert limit.of(3) == amount


@pytest.mark.parametrize(
    ("kind", "text", "told"),
    [
        ("flops", "150%", "is 150 % of full tuning; write a share above 0 % and up to 100 %"),
        ("flops", "1.01x", "is 101 % of full tuning"), ("flops", "0%", "is 0 % of full tuning"),
        ("time", "-100%", "is 0 % of full tuning"), ("time", "-2x", "is -100 % of full tuning"),
        ("flops", "40GiB", "is no limit; write a share of full tuning such as 0.5x, 50% or -40%"),
        ("time", "10M", "is no limit"), ("time", "2h", "is no limit"), ("trainable", "40GiB", "or a number of parameters such as 10M"),
        ("memory", "10M", "or an amount such as 40GiB"), ("memory", "-40GiB", "is no limit"), ("memory", "0GiB", "is no limit"),
        ("memory", "40", "is no limit"), ("trainable", "0.5", "is no limit"), ("trainable", "0M", "is no limit"),
        ("flops", "", "is no limit"), ("flops", "half", "is no limit"), ("flops", "50 % %", "is no limit"),
        ("flops", "+50%", "is no limit"), ("flops", "1e-1x", "is no limit"), ("flops", "nan%", "is no limit"),
        ("flops", "9" * 400 + "%", "is no limit"), ("memory", "9" * 5000 + "GiB", "is no limit"),
    ],
)  # fmt: skip
def test_what_is_no_limit(kind, text, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        parse_limit(kind, text)
    assert str(caught.value).startswith(f"{kind}: '{text}'")


# -- the exact choice ----------------------------------------------------------------------------------------------


def subsets(things) -> Iterator[tuple]:
    """All but the empty one."""
    return chain.from_iterable(combinations(things, size) for size in range(1, len(things) + 1))


def brute(items, base, limit) -> tuple[float, int] | None:
    """(gain, minus FLOPs) of the best subset of all."""
    found = []
    for chosen in subsets(items):
        elements, flops = base(min(item.place for item in chosen))
        elements += sum(item.elements for item in chosen)
        flops += sum(item.flops for item in chosen)
        if elements <= limit[0] and flops <= limit[1]:
            found.append((sum(item.gain for item in chosen), -flops))
    return max(found, default=None)


def problem(random: Random, kind: str):
    """(items, base, limit): whole gains, so that sums are exact and ties occur."""
    floors = random.randint(1, 6)
    places = [(floor, stage) for floor in range(floors) for stage in (0.0, 1.0, 2.5)]
    dear = sorted((random.randint(0, 40) for _ in places), reverse=True)  # the lower, the dearer
    heavy = sorted((random.choice([0, 0, 7]) for _ in places), reverse=True)
    base = dict(zip(places, zip(heavy, dear, strict=True), strict=True))
    costs = {"alike": [(3, 5)], "two kinds": [(3, 5), (1, 0)], "own": [(a, b) for a in range(6) for b in range(6)]}[
        kind
    ]
    items = [
        Item(f"unit {n}", random.choice(places), *random.choice(costs), float(random.randint(-2, 6)))
        for n in range(random.randint(1, 9))
    ]
    limit = (random.choice([NO_LIMIT, random.randint(0, 40)]), random.choice([NO_LIMIT, random.randint(0, 80)]))
    return items, base.__getitem__, limit


@pytest.mark.parametrize("kind", ["alike", "two kinds", "own"])
def test_no_other_subset_is_better(kind):
    """Oracle: every subset: the most gain, and among those that bring it the fewest FLOPs; gain and order as told."""
    random = Random(kind)
    outcomes = set()
    for _ in range(250):
        items, base, limit = problem(random, kind)
        choice = best_choice(items, base, limit)
        # what brings nothing is left out; beside something useful it could only cost
        best = brute([item for item in items if item.gain > 0], base, limit)
        outcomes.add(choice is None)
        assert (choice is None) == (best is None)
        if choice is None or best is None:
            continue
        assert brute(choice.items, base, limit) == best, "the choice itself is within the limits"
        assert choice.gain == sum(item.gain for item in choice.items) == best[0]
        assert list(choice.items) == [item for item in items if item in choice.items], "in the order given"
        everything = brute(items, base, limit)
        assert everything is not None
        assert everything[0] == best[0], "nor does anything without gain help"
    assert outcomes == {True, False}, "both happen"


def test_fractional_gains():
    """Oracle: every subset, up to rounding."""
    random = Random(7)
    for _ in range(60):
        items, base, limit = problem(random, "own")
        items = [replace(item, gain=random.uniform(-0.1, 1)) for item in items]
        choice, best = best_choice(items, base, limit), brute([i for i in items if i.gain > 0], base, limit)
        assert (choice and choice.gain) == (best and pytest.approx(best[0]))


@pytest.mark.parametrize("kind", ["alike", "two kinds", "own"])
def test_bounds_leave_out_nothing_that_could_win(kind):
    """Oracle: every subset; gains in proportion to costs, where sets are hard to tell apart, or far apart in size."""
    random = Random(f"close {kind}")
    for number in range(80):
        items, base, limit = problem(random, kind)
        spread = 10.0 ** random.randint(-200, 200) if number % 2 else 1.0
        items = [replace(i, gain=spread * (i.flops + 2 * i.elements + random.choice([0, 1e-3]))) for i in items]
        choice, best = best_choice(items, base, limit), brute([i for i in items if i.gain > 0], base, limit)
        assert (choice and choice.gain) == (best and pytest.approx(best[0], rel=1e-12, abs=0))


def test_many_matrices_take_no_time(options):
    """Oracle: the clock, on 270 units whose scores go with their sizes (without bounds: 50 s)."""
    scores = {
        name: random * SMOLLM.by_name[name].numel
        for name, random in random_scores(SMOLLM).items()
        if name in SMOLLM.by_name
    }
    given = options(scores, budget={"trainable": "10%"}, granularity="matrix")
    start = process_time()
    assert make_plan(SMOLLM, given, None, Setting()).phases
    assert process_time() - start < 5


def test_nothing_to_choose_from():
    item = Item("unit", (0, 0.0), 1, 1, 0.0)
    assert best_choice([], lambda place: (0, 0), (NO_LIMIT, NO_LIMIT)) is None
    assert best_choice([item, replace(item, gain=-1.0)], lambda place: (0, 0), (NO_LIMIT, NO_LIMIT)) is None
    assert best_choice([replace(item, gain=1.0)], lambda place: (0, 0), (0, NO_LIMIT)) is None
    assert best_choice([replace(item, gain=1.0)], lambda place: (0, 5), (1, 5)) is None


# -- plans ---------------------------------------------------------------------------------------------------------


def uneven(depth: int = 6) -> Anatomy:
    """A Llama whose layers differ in width."""
    kinds = [anatomies.llama(depth=depth, d=16, vocab=64, mlp=mlp) for mlp in (2, 4, 7)]
    blocks = [kinds[i % 3].blocks[i] for i in range(depth)]
    return replace(kinds[0], layers=(kinds[0].layers[0], *blocks, *kinds[0].layers[-2:]))


MODELS = {
    "llama": anatomies.llama(depth=6), "tied": anatomies.llama(depth=6, tied=True), "classifier": anatomies.llama(depth=6, labels=3),
    "bert": anatomies.bert(depth=5), "gpt2": anatomies.gpt2(depth=6), "t5": anatomies.t5(depth=3), "uneven": uneven(),
}  # fmt: skip
MINILM = load_shipped("minilm-l6").for_task("classification", 2)
SMOLLM = load_shipped("smollm2-135m").for_task("classification", 2)
#: Where a plan may run.
SETTINGS = [
    Setting(stage, ranks, dtype_bytes, offload, 128)
    for stage, ranks, dtype_bytes, offload in product((2, 3), (1, 4), (2, 4), (False, True))
]


def random_scores(anatomy: Anatomy, seed: int = 0) -> dict[str, float]:
    random = Random(seed)
    names = [layer.name for layer in anatomy.blocks] + [t.name for t in anatomy.tensors]
    return {name: random.uniform(-0.1, 1) for name in names}


@pytest.fixture
def options(tmp_path):
    def make(scores, **more) -> FreezeOptions:
        path = tmp_path / "scores.json"
        path.write_text(json.dumps({"scores": scores}))
        return FreezeOptions(strategy="budget", scores=path, **more)

    return make


def cost(anatomy: Anatomy, plan: FreezePlan, at: Setting = Setting()) -> Estimate:
    return estimate(
        anatomy, plan, stage=at.stage, world_size=at.world_size, dtype_bytes=at.dtype_bytes, offload=at.offload,
        sequence_length=at.sequence_length,
    )  # fmt: skip


def on_device(price: Estimate) -> int:
    return price.weights + price.gradients + price.masters + price.optimizer_state + price.parked - price.on_host


def training(anatomy: Anatomy, chosen) -> FreezePlan:
    """The plan that trains these units and the ends that go with them by the rule of freeze.embed, norm and head: auto."""
    names = [name for unit in chosen for name in unit.tensors]
    first = {t.name for t in anatomy.blocks[0].tensors}
    tied = any("head" in alias for t in anatomy.tied for alias in t.aliases)
    ends = {"norm"} | ({"head"} if not tied else set()) | ({"embed"} if first & set(names) else set())
    here = [layer.name for layer in anatomy.layers if layer.name in ends]
    return make_plan(anatomy, FreezeOptions(trainable=[*names, *here]))


def keeps(price: Estimate, full: Estimate, limits: dict[str, str]) -> bool:
    for kind, text in limits.items():
        took, all_of_it = {
            "flops": (price.flops_per_token, full.flops_per_token), "time": (price.flops_per_token, full.flops_per_token),
            "memory": (on_device(price), on_device(full)), "trainable": (price.trainable, full.trainable),
        }[kind]  # fmt: skip
        limit = parse_limit(kind, text)
        if took > (limit.amount * all_of_it if limit.relative else limit.amount):
            return False
    return True


LIMITS = [
    {"flops": "50%"}, {"time": "0.7x"}, {"trainable": "25%"}, {"memory": "-40%"}, {"flops": "-30%", "trainable": "40%"},
    {"memory": "60%", "time": "60%"},
]  # fmt: skip


@cache
def prices_of_layers(name: str) -> dict[frozenset[str], Estimate]:
    anatomy = MODELS[name]
    sets = subsets(units(anatomy, "layer"))
    return {frozenset(unit.name for unit in s): cost(anatomy, training(anatomy, s)) for s in sets}


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("name", some_fast(MODELS, 2))
def test_no_other_set_of_layers_brings_more_within_the_limits(name, limits, options):
    """Oracle: every set of layers (63 of six), each as a plan of its own, priced by `estimate`."""
    anatomy, prices = MODELS[name], prices_of_layers(name)
    full = max(prices.values(), key=lambda price: price.flops_per_token)
    plans = {chosen: price for chosen, price in prices.items() if keeps(price, full, limits)}
    for seed in range(4):
        scores = random_scores(anatomy, seed)
        gains = {chosen: sum(scores[unit] for unit in chosen) for chosen in plans}
        given = options(scores, budget=limits)
        if not any(gain > 0 for gain in gains.values()):
            with pytest.raises(UserError, match="nothing that trains fits"):
                make_plan(anatomy, given, None, Setting())
            continue
        plan = make_plan(anatomy, given, None, Setting())
        trained = {anatomy.layer_of[t].name for t in plan.phases[0].trainable}
        chosen = frozenset(name for name in trained if name.startswith("layers."))
        assert chosen in plans
        assert gains[chosen] == pytest.approx(max(gains.values()))
        assert cost(anatomy, plan) == plans[chosen], "what trains beside the layers is by the rule of the ends"


@pytest.mark.parametrize(
    "limits", [{"flops": "60%"}, {"trainable": "30%"}, {"flops": "80%", "trainable": "45%"}], ids=str
)
@pytest.mark.parametrize(
    "anatomy", [anatomies.llama(depth=1), anatomies.bert(depth=1), anatomies.gpt2(depth=1), anatomies.t5(depth=1)],
    ids=lambda anatomy: anatomy.name,
)  # fmt: skip
def test_no_other_set_of_matrices_brings_more_within_the_limits(anatomy, limits, options):
    """Oracle: all sets of a layer's matrices (of the last seven), priced by `estimate`."""
    pool = units(anatomy, "matrix")[-7:]
    scores = dict.fromkeys((t.name for t in anatomy.tensors), 0.0)
    scores.update({unit.name: score for unit, score in zip(pool, random_scores(anatomy).values(), strict=False)})
    full = cost(anatomy, make_plan(anatomy, FreezeOptions(strategy="full")))
    found = [
        sum(scores[unit.name] for unit in chosen)
        for chosen in subsets(pool)
        if keeps(cost(anatomy, training(anatomy, chosen)), full, limits)
    ]
    given = options(scores, budget=limits, granularity="matrix")
    if not found or max(found) <= 0:
        with pytest.raises(UserError, match="nothing that trains fits"):
            make_plan(anatomy, given)
        return
    names = set(make_plan(anatomy, given).phases[0].trainable)
    assert sum(scores[unit.name] for unit in pool if unit.name in names) == pytest.approx(max(found))


def plan_or_none(anatomy: Anatomy, given: FreezeOptions, setting: Setting) -> FreezePlan | None:
    try:
        return make_plan(anatomy, given, None, setting)
    except UserError:
        return None


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("granularity", some_fast(["layer", "matrix"]))
def test_plans_keep_their_limits_wherever_they_run(granularity, setting, options):
    """Oracle: `estimate` of the plan and of full tuning, in that setting; where there is no plan, of every unit alone."""
    scores = random_scores(MINILM)
    alone = [cost(MINILM, training(MINILM, [u]), setting) for u in units(MINILM, granularity) if scores[u.name] > 0]
    full = cost(MINILM, make_plan(MINILM, FreezeOptions(strategy="full")), setting)
    for limits in (*LIMITS, {"memory": "100MiB"}, {"memory": "70MB", "trainable": "3M"}):
        plan = plan_or_none(MINILM, options(scores, budget=limits, granularity=granularity), setting)
        if plan is None:
            assert not any(keeps(price, full, limits) for price in alone), limits
        else:
            assert keeps(cost(MINILM, plan, setting), full, limits), limits


@pytest.mark.parametrize(
    "anatomy", [SMOLLM, load_shipped("smollm2-135m"), load_shipped("qwen2.5-0.5b")], ids=["classifier", "tied", "qwen"]
)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_shipped_models_keep_their_limits(anatomy, limits, options):
    """Oracle: `estimate`; on a tied model the head's matrix trains with layers.0 alone."""
    setting = Setting(3, 4, 2)
    full = cost(anatomy, make_plan(anatomy, FreezeOptions(strategy="full")), setting)
    plan = make_plan(anatomy, options(random_scores(anatomy), budget=limits), None, setting)
    assert keeps(cost(anatomy, plan, setting), full, limits)
    names = plan.phases[0].trainable
    first = any(anatomy.layer_of[name].name == "layers.0" for name in names)
    assert ("model.embed_tokens.weight" in names) == first


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_model_states_are_those_of_the_estimate(setting, options):
    balance = Balance(MINILM, options(random_scores(MINILM), budget={"memory": "50%"}), setting)
    for trained in ({"strategy": "full"}, {"count": 3}):
        plan = make_plan(MINILM, FreezeOptions(**trained))
        price = cost(MINILM, plan, setting)
        assert balance.memory(price.trainable) == on_device(price)


def test_the_setting_matters(options):
    """Oracle: 400 MiB hold fewer of SmolLM2's layers in fp32 on one rank than in bf16 on four."""
    given = options(dict.fromkeys(SMOLLM.layer_names, 1.0), budget={"memory": "1GiB"})
    small, large = (make_plan(SMOLLM, given, None, setting) for setting in (Setting(2, 1, 4), Setting(3, 4, 2)))
    assert len(small.phases[0].trainable) < len(large.phases[0].trainable) == len(SMOLLM.tensors)


@pytest.mark.parametrize(
    ("ends", "trains"),
    [({"embed": "train"}, True), ({"head": "train"}, True), ({"embed": "freeze"}, False), ({"head": "freeze"}, False)],
)
def test_a_tie_goes_by_the_options(ends, trains, options):
    """Oracle: one tensor with two names: either option decides, and `estimate` holds it against the limit."""
    anatomy = anatomies.llama(depth=6, vocab=64, tied=True)
    setting = Setting(sequence_length=4)
    plan = make_plan(anatomy, options(random_scores(anatomy), budget={"flops": "90%"}, **ends), None, setting)
    assert ("model.embed_tokens.weight" in plan.phases[0].trainable) == trains
    assert cost(anatomy, plan, setting).flops_ratio <= 0.9


# -- limits that nothing meets -------------------------------------------------------------------------------------

TOO_LITTLE = [
    {"flops": "1%"}, {"time": "1%"}, {"trainable": "0.0001%"}, {"memory": "1KiB"}, {"memory": "1%", "flops": "90%"},
    {"flops": "1%", "trainable": "0.0001%"}, {"memory": "1KiB", "time": "20%", "trainable": "0.01K"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("anatomy", "granularity"), [(MINILM, "layer"), (MINILM, "matrix"), (MODELS["uneven"], "matrix"), (SMOLLM, "layer")],
    ids=["minilm", "minilm-matrix", "uneven-matrix", "smollm"],
)  # fmt: skip
@pytest.mark.parametrize("limits", TOO_LITTLE, ids=str)
def test_the_nearest_that_would_do_is_told_and_does(anatomy, limits, granularity, options):
    """Oracle: the same question once more, with what the message says."""
    scores = random_scores(anatomy)
    with pytest.raises(UserError) as caught:
        make_plan(anatomy, options(scores, budget=limits, granularity=granularity))
    message = str(caught.value)
    asked = ", ".join(f"{kind}: {text}" for kind, text in limits.items())
    assert f"nothing that trains fits within {asked}" in message
    nearest = dict(
        re.findall(r"(memory|time|flops|trainable): ([\d.]+(?:%|MiB))", message.partition("nearest takes")[2])
    )
    assert set(nearest) == set(limits)
    assert make_plan(anatomy, options(scores, budget=nearest, granularity=granularity)).phases
    if len(nearest) == 1:
        ((kind, text),) = nearest.items()
        less = f"{float(text.removesuffix('%')) - 0.1:.1f}%" if text.endswith("%") else f"{int(text[:-3]) - 1}MiB"
        if float(less.strip("%MiB")) > 0:
            with pytest.raises(UserError, match="nothing that trains fits"):
                make_plan(anatomy, options(scores, budget={kind: less}, granularity=granularity))


@pytest.mark.parametrize("setting", [Setting(2, 4, 2), Setting(3, 1, 4)], ids=str)
def test_the_room_that_an_amount_of_memory_leaves(setting, options):
    """Oracle: the model states themselves: so many elements fit, and one more does not; of too little not even none."""
    balance = Balance(MINILM, options(random_scores(MINILM), budget={"memory": "50%"}), setting)
    for elements in (0, 1, 2, 12_345, MINILM.numel // 2, MINILM.numel - 1):
        room = balance.memory(elements)
        found = balance._elements_within(room)
        assert found >= elements
        assert balance.memory(found) <= room
        assert found == MINILM.numel or room < balance.memory(found + 1)
    assert balance._elements_within(balance.memory(0) - 1) == -1
    assert balance._elements_within(balance.memory(MINILM.numel)) == MINILM.numel


def test_the_score_that_is_asked_for_and_of_this_model(tmp_path):
    """Oracle: the score that the file has beside its own choice; then the refusal of another model's file."""
    anatomy, path = MODELS["llama"], tmp_path / "scores.json"
    own = {"scores": {f"layers.{i}": float(i == 0) for i in range(6)}}
    other = {"scores": {f"layers.{i}": float(i == 5) for i in range(6)}}
    model = {"name": "mine", "layers": 6, "digest": model_digest(anatomy)}
    for score, layer in ((None, "layers.0"), ("other", "layers.5")):
        path.write_text(json.dumps({"model": model, **own, "all": {"other": other}}))
        chosen = FreezeOptions(strategy="budget", scores=path, score=score, budget={"flops": "100%"})
        plan = make_plan(anatomy, chosen)
        assert {f"layers.{i}" for i in range(6)} & {anatomy.layer_of[t].name for t in plan.phases[0].trainable} == {
            layer
        }
    path.write_text(json.dumps({"model": {**model, "digest": "another"}, **own}))
    with pytest.raises(UserError, match="was made for mine with 6 layers"):
        make_plan(anatomy, FreezeOptions(strategy="budget", scores=path, budget={"flops": "100%"}))


def test_nothing_gains_by_training(options):
    scores = {f"layers.{i}": -float(i) for i in range(6)}
    with pytest.raises(
        UserError, match=r"no score of .* is above 0.*Choose another freeze\.score, or strategy 'ranked'"
    ):
        make_plan(MODELS["llama"], options(scores, budget={"flops": "50%"}))


# -- what is told --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["layer", "matrix"])
def test_notes_tell_gain_cost_and_the_next_units(granularity, options):
    """Oracle: the scores, and `estimate` of the plan without and with each unit named."""
    scores, pool = random_scores(MINILM), {unit.name: unit for unit in units(MINILM, granularity)}
    plan = make_plan(MINILM, options(scores, budget={"flops": "60%", "trainable": "9%"}, granularity=granularity))
    names = set(plan.phases[0].trainable)
    chosen = [unit for unit in pool.values() if set(unit.tensors) <= names]
    total = sum(max(0, scores[name]) for name in pool)
    price = cost(MINILM, plan)
    count = r"([\d.,]+(?: M)?) parameters"
    told = re.match(rf"(\d+) of (\d+) units bring (\d+)% .* at (\d+)% of full tuning's FLOPs, {count}", plan.notes[0])
    assert told
    assert (int(told[1]), int(told[2])) == (len(chosen), len(pool))
    assert int(told[3]) == pytest.approx(100 * sum(scores[unit.name] for unit in chosen) / total, abs=0.51)
    assert int(told[4]) == pytest.approx(100 * price.flops_ratio, abs=0.51)
    assert number(told[5]) == pytest.approx(price.trainable, abs=5001)
    following = [note for note in plan.notes if note.startswith("next would be")]
    assert len(following) == 3
    for note in following:
        told = re.match(rf"next would be (\S+): \+([\d.]+)% .* for \+([\d.]+)% of the FLOPs and {count}", note)
        assert told
        assert told[1] not in names
        more = cost(MINILM, training(MINILM, [*chosen, pool[told[1]]]))
        assert float(told[2]) == pytest.approx(100 * scores[told[1]] / total, abs=0.051)
        assert float(told[3]) == pytest.approx(100 * (more.flops_ratio - price.flops_ratio), abs=0.051)
        assert number(told[4]) == pytest.approx(more.trainable - price.trainable, abs=5001)


def number(text: str) -> float:
    value = float(text.removesuffix(" M").replace(",", ""))
    return 1e6 * value if text.endswith("M") else value


@pytest.mark.parametrize("granularity", ["layer", "matrix"])
def test_next_units_cost_exactly_what_is_said(granularity, options):
    """Oracle: `estimate`, for every useful unit left out; most gain per FLOP first, and first of all what costs none."""
    anatomy = anatomies.llama(depth=4, labels=2)
    scores = random_scores(anatomy, 5) | {"layers.2": 0.0, anatomy.block_tensors[3].name: 0.0}
    balance = Balance(anatomy, options(scores, budget={"trainable": "40%"}, granularity=granularity), Setting())
    choice = balance.solve()
    taken = [balance.units[item.name] for item in choice.items]
    before = cost(anatomy, training(anatomy, taken))
    following = balance.next_units(choice)
    left = {name for name in balance.units if scores[name] > 0} - {unit.name for unit in taken}
    assert {unit.name for unit in following} == left
    for unit in following:
        after = cost(anatomy, training(anatomy, [*taken, balance.units[unit.name]]))
        assert unit.flops == pytest.approx(after.flops_ratio - before.flops_ratio, abs=1e-12)
        assert unit.elements == after.trainable - before.trainable
    rates = [unit.gain / unit.flops if unit.flops else float("inf") for unit in following]
    assert rates == sorted(rates, reverse=True)


def test_a_norm_that_costs_no_flops_can_be_next(options):
    """Oracle: room for one norm of a layer, and the lower one's score is higher; the upper would then be free of FLOPs."""
    anatomy = anatomies.llama(depth=2, labels=2)  # norm 8, head 16, and each of a layer's norms 8
    scores = dict.fromkeys((t.name for t in anatomy.tensors), 0.0)
    lower, upper = (f"model.layers.1.{name}_layernorm.weight" for name in ("input", "post_attention"))
    plan = make_plan(
        anatomy, options({**scores, lower: 2.0, upper: 1.0}, budget={"trainable": "0.035K"}, granularity="matrix")
    )
    assert lower in plan.phases[0].trainable
    assert f"next would be {upper}: +33.3% of the gain for +0.0% of the FLOPs and 8 parameters" in plan.notes
