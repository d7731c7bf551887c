"""Every strategy over random models and random options. Oracles: what every plan must be, whoever makes it (a tiling of the run by sets of
the model's own tensors, in its order); for choices by position the definition, written out here; for those that move, who has had a turn."""

from __future__ import annotations

import json
import math
import tempfile
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any

import anatomies
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from marks import some_fast
from pydantic import ValidationError

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import FreezeOptions
from dsfreeze.recipe_freeze import FREEZE_KEYS
from dsfreeze.strategies import STRATEGIES, make_plan
from dsfreeze.strategies.adaptive import ADAPTIVE

pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # an anatomy is long to print
SETTINGS = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
numbers = st.integers(0, 14)


@st.composite
def models(draw: Any) -> Anatomy:
    depth, size = draw(st.integers(1, 9)), draw(st.sampled_from([4, 8, 12]))
    flag = draw(st.booleans())
    kinds = {
        "llama": lambda: anatomies.llama(depth, size, tied=flag, labels=draw(st.sampled_from([0, 0, 3])), mlp=draw(st.integers(1, 5))),
        "qwen2": lambda: anatomies.llama(depth, size, qkv_bias=True, kv=size // 2),
        "gpt2": lambda: anatomies.gpt2(depth, size), "phi3": lambda: anatomies.phi3(depth, size, kv=size // 2 if flag else None),
        "bert": lambda: anatomies.bert(depth, size), "t5": lambda: anatomies.t5(depth, size, tied=flag),
    }  # fmt: skip
    return kinds[draw(st.sampled_from(sorted(kinds)))]()


#: Values of each key that strategies read.
VALUES: dict[str, Any] = {
    "fraction": st.decimals(0, 1, places=2).map(float), "count": numbers, "rounding": st.sampled_from(["floor", "nearest", "ceil"]),
    "offset": numbers, "granularity": st.sampled_from(["layer", "matrix", "category", "bias"]), "seed": st.integers(0, 2**31),
    "level": st.sampled_from(["category", "layer", "model", "element"]), "round": st.integers(0, 4),
    "masks": st.sampled_from(["fresh", "same", "complement"]), "depth": st.sampled_from(["uniform", "bottom", "top"]),
    "balanced": st.booleans(), "count_by": st.sampled_from(["numel", "matrices"]), "budget": st.sampled_from([{"flops": "80%"}, {"trainable": "50%"}]),
    "trace": st.just("deviation"), "gain": st.sampled_from(list("abcd")), "tau": st.floats(0.01, 1), "cut": st.sampled_from(["median", "mode", "q25"]),
    "min_layers": st.integers(1, 6), "max_layers": st.integers(1, 9), "padding": st.sampled_from(["none", "fill"]),
    "flat": st.sampled_from(["min_layers", "train_all"]), "active_layers": st.integers(1, 10), "switch_every": st.integers(1, 30),
    "order": st.sampled_from(["auto", "ascending", "descending", "random"]), "state": st.sampled_from(["auto", "keep", "clear", "offload"]),
    "drop_master": st.booleans(), "rewarmup_steps": st.integers(0, 5), "discriminative_factor": st.floats(1, 4), "t0": st.floats(0.01, 1),
    "power": st.integers(1, 3), "scale_rates": st.booleans(), "track_steps": st.integers(1, 9), "stability_check": st.booleans(),
    "freeze_trainable_layers": st.integers(-9, 9), "temperature": st.floats(0.1, 9), "epsilon": st.floats(0, 1), "sparsity": st.floats(0, 0.99),
}  # fmt: skip
ENDS = st.sampled_from(["auto", "auto", "freeze", "train"])


@st.composite
def options_for(draw: Any, strategy: str, anatomy: Anatomy, folder: Path) -> FreezeOptions:
    """Any that the recipe takes."""
    keys = [key for key, readers in FREEZE_KEYS.items() if strategy in readers and key in VALUES]
    values = {key: draw(VALUES[key]) for key in keys if draw(st.booleans())}
    values |= {key: draw(ENDS) for key in ("embed", "norm", "head")}
    if "scores" in [key for key, readers in FREEZE_KEYS.items() if strategy in readers] and strategy != "half":
        values["scores"] = draw(scores(anatomy, folder))
    if strategy == "budget":
        values.setdefault("budget", {"flops": "80%"})
    if strategy == "step_ranges":
        names = st.sampled_from([layer.name for layer in anatomy.blocks])
        values["step_ranges"] = draw(
            st.dictionaries(names, st.integers(1, 40) | st.just([2, 9]) | st.just(-1), min_size=1, max_size=4)
        )
    if strategy == "patterns":
        names = st.sampled_from([layer.name for layer in anatomy.layers] + [tensor.name for tensor in anatomy.tensors])
        values = {key: value for key, value in values.items() if key != "freeze_trainable_layers"}
        values[draw(st.sampled_from(["trainable", "frozen"]))] = draw(
            st.lists(names, min_size=1, max_size=5, unique=True)
        )
    try:
        return FreezeOptions(strategy=strategy, **values)
    except ValidationError:
        assume(False)
        raise


@st.composite
def scores(draw: Any, anatomy: Anatomy, folder: Path) -> Path:
    """A file as `dsfreeze analyze` leaves it: of layers, matrices and traces."""
    names = [layer.name for layer in anatomy.blocks] + [tensor.name for tensor in anatomy.block_tensors]
    value = st.floats(0, 10, allow_nan=False)
    depth = len(anatomy.blocks) + 1
    traces = draw(st.lists(st.lists(st.floats(0.01, 2), min_size=depth, max_size=depth), min_size=1, max_size=4))
    content = {"scores": {name: draw(value) for name in names}, "traces": {"deviation": traces}}
    path = folder / "scores.json"
    path.write_text(json.dumps(content))
    return path


def check(anatomy: Anatomy, plan: FreezePlan, num_steps: int | None) -> None:
    """What every plan is."""
    order = {tensor.name: number for number, tensor in enumerate(plan.adapted(anatomy).tensors)}
    for phase in plan.phases:
        places = [order[name] for name in phase.trainable]
        assert places == sorted(set(places)), "in the model's order, each once"
        assert places, "something trains"
    assert [phase.first_step for phase in plan.phases] == [0, *(phase.end for phase in plan.phases[:-1])]
    if num_steps is not None:
        assert plan.phases[-1].end is None or plan.phases[-1].end >= num_steps, "to the end of the run"
        for step in {0, num_steps // 2, num_steps - 1}:
            phase = plan.phase_at(step)
            assert phase.first_step <= step < (phase.end or math.inf)
    again = FreezePlan.from_json(plan.to_json())
    assert (again, again.digest) == (plan, plan.digest)
    for mask in plan.masks:
        assert mask.tensor in plan.ever_trained
        assert 0 < mask.trained < anatomy.by_name[mask.tensor].numel


@pytest.mark.parametrize("strategy", some_fast(sorted(STRATEGIES), 12))
@SETTINGS
@given(data=st.data(), anatomy=models(), num_steps=st.none() | st.integers(1, 60))
def test_a_plan_or_an_error_of_ours(strategy: str, data: Any, anatomy: Anatomy, num_steps: int | None) -> None:
    """And the same one twice."""
    with tempfile.TemporaryDirectory() as folder:
        options = data.draw(options_for(strategy, anatomy, Path(folder)))
        try:
            plan = make_plan(anatomy, options, num_steps)
        except UserError:
            event("refused")
            with pytest.raises(UserError):
                make_plan(anatomy, options, num_steps)
            return
        assert make_plan(anatomy, options, num_steps).digest == plan.digest
    check(anatomy, plan, num_steps)
    assert strategy not in ADAPTIVE or plan.decide_at is not None
    frozen_end = [name for name in ("embed", "norm", "head") if getattr(options, name) == "freeze"]
    for layer in anatomy.layers:
        own = {tensor.name for tensor in layer.tensors}
        if layer.name in frozen_end and strategy not in ADAPTIVE:
            assert not own & plan.ever_trained, f"{layer.name} was to be frozen"


def whole(anatomy: Anatomy, plan: FreezePlan) -> list[int]:
    """Numbers of the layers that train; each of them whole, or not at all."""
    trained = plan.phases[0].trainable
    numbers = []
    for number, layer in enumerate(anatomy.blocks):
        own = [tensor.name in trained for tensor in layer.tensors]
        assert all(own) or not any(own)
        numbers += [number] if own[0] else []
    return numbers


def rounded(value: Decimal, how: str) -> int:
    return {"floor": math.floor, "ceil": math.ceil, "nearest": lambda v: math.floor(v + Decimal("0.5"))}[how](value)


@SETTINGS
@given(
    anatomy=models(), fraction=st.decimals(0, 1, places=2), how=VALUES["rounding"], seed=VALUES["seed"],
    strategy=st.sampled_from(["bottom", "top", "middle", "random"]),
)  # fmt: skip
def test_layers_by_position(anatomy: Anatomy, fraction: Decimal, how: str, seed: int, strategy: str) -> None:
    """n = fraction x L, rounded as told: the first n, the last n, n at both ends, any n."""
    size = len(anatomy.blocks)
    number = rounded(fraction * size, how)
    options = FreezeOptions(
        strategy=strategy,
        fraction=float(fraction),
        rounding=how,
        norm="train",
        **({"seed": seed} if strategy == "random" else {}),
    )
    try:
        trained = whole(anatomy, make_plan(anatomy, options))
    except UserError:
        assert number == size or not any(layer.name == "norm" for layer in anatomy.layers)
        return
    below = number - number // 2
    expected = {
        "bottom": list(range(number, size)), "top": list(range(size - number)), "middle": list(range(below, size - number // 2)),
    }  # fmt: skip
    assert trained == expected.get(strategy, trained)
    assert len(trained) == size - number
    if fraction in (0, 1) or strategy == "random":
        return
    more = FreezeOptions(strategy=strategy, fraction=min(1.0, float(fraction) + 0.2), rounding=how, norm="train")
    with suppress(UserError):
        larger = whole(anatomy, make_plan(anatomy, more))
        assert set(larger) <= set(trained), "what a smaller share freezes, a larger one does"


@SETTINGS
@given(
    anatomy=models(),
    active=st.integers(1, 4),
    every=st.integers(1, 7),
    seed=VALUES["seed"],
    strategy=st.sampled_from(["lisa", "badam", "hift"]),
)
def test_turns(anatomy: Anatomy, active: int, every: int, seed: int, strategy: str) -> None:
    """Phases last `switch_every` steps and train `active_layers` layers, or what is left of a sweep; in a sweep of badam and hift every unit
    has one turn."""
    size = len(anatomy.blocks)
    assume(active <= size)
    steps = 2 * every * (size + 3)
    plan = make_plan(
        anatomy,
        FreezeOptions(strategy=strategy, active_layers=active, switch_every=every, seed=seed, state="clear"),
        steps,
    )
    blocks = {tensor.name: layer.name for layer in anatomy.blocks for tensor in layer.tensors}
    turns: list[set[str]] = []
    for phase in plan.phases:
        assert phase.first_step % every == 0
        own = {blocks[name] for name in phase.trainable if name in blocks}
        turns += [own] * math.ceil(((phase.end or steps) - phase.first_step) / every)
    if strategy == "lisa":
        assert all(len(own) == active for own in turns)
        return
    assert all(len(own) <= active for own in turns)
    sweep = math.ceil(size / active) if strategy == "badam" else None
    if sweep is not None:
        for start in range(0, len(turns) - sweep + 1, sweep):
            assert set.union(*turns[start : start + sweep]) == set(blocks.values())
    else:
        assert set.union(*turns) == set(blocks.values()), "within two sweeps and more"
