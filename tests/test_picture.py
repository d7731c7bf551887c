"""The picture: what a terminal shows at 80 columns without colour, and the dict for programs."""

from __future__ import annotations

import io
import json

import anatomies
import pytest
from rich.console import Console

from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate import estimate
from dsfreeze.picture import draw, layer_states, plan_as_dict, steps_trained
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import FREEZE_KEYS, FreezeOptions
from dsfreeze.strategies import STRATEGIES, make_plan


def plan_of(anatomy: Anatomy, **options) -> FreezePlan:
    return make_plan(anatomy, FreezeOptions(**options), 100)


def shown(anatomy: Anatomy, plan: FreezePlan, encoding: str = "utf-8") -> str:
    """What a terminal without colour shows, 80 columns wide."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    Console(file=stream, width=80, color_system=None).print(draw(anatomy, plan))
    stream.flush()
    return raw.getvalue().decode(encoding)


def test_bottom_is_a_bar():
    """Oracle: drawn by hand."""
    anatomy = anatomies.llama(depth=12)
    text = shown(anatomy, plan_of(anatomy, fraction=0.75))
    assert "  layers     ·········███" in text
    assert "embed      ·" in text
    assert "head       █" in text


def test_frozen_above_something_trainable_looks_different():
    """Oracle: only the prefix saves backward, so the picture must tell the two apart."""
    anatomy = anatomies.llama(depth=12)
    text = shown(anatomy, plan_of(anatomy, strategy="middle", count=6))
    assert "···██████░░░" in text
    assert "frozen prefix" in text
    assert "the gradient crosses it" in text


def test_layers_that_train_in_part_show_their_categories():
    anatomy = anatomies.llama(depth=4)
    text = shown(anatomy, plan_of(anatomy, trainable=["layers.[23].self_attn.q_proj"]))
    assert "layers     ··▒▒" in text
    assert "    q        ··██" in text
    assert "    k        ··░░" in text


def test_adapters():
    anatomy = anatomies.llama(depth=4)
    assert "layers     ··◆◆" in shown(anatomy, plan_of(anatomy, strategy="lora", fraction=0.5))


def test_many_layers_wrap():
    anatomy = anatomies.llama(depth=126)
    lines = shown(anatomy, plan_of(anatomy, fraction=0.5)).splitlines()
    assert [line.count("·") + line.count("█") for line in lines if "layers  " in line or "from " in line] == [60, 60, 6]


def test_figures_are_there():
    anatomy = anatomies.llama(depth=4)
    plan = plan_of(anatomy, fraction=0.5)
    cost = estimate(anatomy, plan)
    text = shown(anatomy, plan)
    assert f"{cost.trainable:,} of {cost.total:,} parameters ({cost.percent:.2f} %)" in text
    assert "optimizer state" in text
    assert "% of full tuning" in text
    assert "note: 2 of 4 layers frozen" in text


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {*FREEZE_KEYS["scores"], "patterns", "step_ranges"}))
def test_every_picture_fits_80_columns(strategy):
    for anatomy in (anatomies.bert(), anatomies.llama(depth=80, labels=2, qkv_bias=True)):
        lines = shown(anatomy, make_plan(anatomy, FreezeOptions(strategy=strategy), 233)).splitlines()
        assert max(map(len, lines)) <= 80


def test_a_terminal_with_ascii_alone():
    anatomy = anatomies.llama(depth=4)
    assert "layers     ..##" in shown(anatomy, plan_of(anatomy, fraction=0.5), encoding="ascii")


def test_a_moving_plan_shows_each_phase():
    anatomy = anatomies.llama(depth=2)
    phases = tuple(
        Phase(5 * i, 5 if i == 0 else None, tuple(t.name for t in anatomy.layer(f"layers.{i}").tensors)) for i in (0, 1)
    )
    text = shown(anatomy, FreezePlan("sweep", phases))
    assert "steps 0 to 4" in text
    assert "steps 5 to the end" in text
    assert "layers     █░" in text
    assert "layers     ·█" in text


def test_many_phases_are_counted():
    """Oracle: counted by hand: 4 layers of 25 turns of 4 steps, descending, so layers.3 has one turn more."""
    anatomy = anatomies.llama(depth=4, labels=2)
    plan = plan_of(anatomy, strategy="badam", order="descending", switch_every=4, active_layers=1)
    text = shown(anatomy, plan)
    assert text.count("steps ") - text.count("more phases. Steps") >= 3
    assert "steps 8 to 11" in text
    assert "steps 12 to 15" not in text
    assert "and 22 more phases. Steps that each layer trains, of 100:" in text
    assert "layers       24  24  24  28" in text
    assert "head        100" in text


def test_an_end_that_is_not_known_is_said():
    """Oracle: by hand; the last of many phases is open, and what trains in it has no number."""
    anatomy = anatomies.llama(depth=4)
    ranges = {f"layers.{i}": [10 * i, 10 * i + 4] for i in range(4)} | {"norm": -1}
    plan = make_plan(anatomy, FreezeOptions(step_ranges=ranges))
    assert steps_trained(anatomy, plan) == {
        **dict.fromkeys(["embed", *(f"layers.{i}" for i in range(4)), "head"]),
        "norm": 0,
    }
    text = shown(anatomy, plan)
    assert "to the end" in text
    assert max(map(len, text.splitlines())) <= 80


def test_ten_thousand_phases_are_written_once_a_set():
    """Oracle: HiFT's sets are its units, however long the run; the JSON stays small."""
    anatomy = anatomies.llama(depth=4)
    plan = make_plan(anatomy, FreezeOptions(strategy="hift"), 10_000)
    value = plan_as_dict(anatomy, plan, estimate(anatomy, plan))
    assert len(value["sets"]) == 6
    assert len(value["phases"]) == 10_000
    assert len(json.dumps(value)) < 1_000_000
    assert sum(value["steps_trained"].values()) == 10_000 + value["steps_trained"]["norm"]


@pytest.mark.parametrize("strategy", ["bottom", "lora", "norms"])
def test_dict_is_json_and_adds_up(strategy):
    """Oracle: the parts sum to the whole, and JSON takes every value."""
    for anatomy in anatomies.everything().values():
        plan = plan_of(anatomy, strategy=strategy)
        cost = estimate(anatomy, plan)
        value = json.loads(json.dumps(plan_as_dict(anatomy, plan, cost)))
        layers = value["sets"][value["phases"][0]["set"]]
        assert sum(layer["trainable"] for layer in layers) == value["trainable"] == cost.trainable
        assert sum(layer["total"] for layer in layers) == value["total"]
        assert value["digest"] == plan.digest
        assert value["bytes_per_rank"]["optimizer_state"] == cost.optimizer_state


def test_prefix_state_is_the_anatomys_prefix():
    for anatomy in anatomies.everything().values():
        plan = plan_of(anatomy, fraction=0.5)
        phase = plan.phases[0]
        prefix = [layer.name for layer in anatomy.prefix(phase.trainable)]
        assert [name for name, state in layer_states(anatomy, plan, phase).items() if state == "prefix"] == prefix


def test_an_adaptive_plan_says_when_it_decides():
    anatomy = anatomies.llama(depth=4)
    text = shown(anatomy, plan_of(anatomy, strategy="adt_l", track_steps=7))
    assert "after 7 steps what trains is decided anew" in " ".join(text.split())
