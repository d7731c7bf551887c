"""What a comparison's sections hold and refuse. Oracles: recipes' own strategies, and the protocols as their papers have them."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dsfreeze.anatomy import load_shipped
from dsfreeze.compare.methods import METHODS
from dsfreeze.compare.spec import PROTOCOLS, MethodSpec, Spec, TuneOptions
from dsfreeze.errors import UserError
from dsfreeze.recipe import DataOptions, FreezeOptions, TrainOptions
from dsfreeze.scores import SCORES
from dsfreeze.strategies import make_plan

BASE = {"models": ["m"], "tasks": [{"name": "t"}], "methods": ["full"]}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_a_plan(name: str) -> None:
    """Of MiniLM, in 100 steps; one that needs an analysis names a score that there is."""
    method = METHODS[name]
    if method.analyze is not None:
        assert method.analyze in SCORES
        FreezeOptions.model_validate({**method.freeze, "scores": "scores.json"})
        return
    plan = make_plan(load_shipped("minilm-l6").for_task("classification", 3), FreezeOptions(**method.freeze), 100)
    assert plan.ever_trained


@pytest.mark.parametrize(("name", "frozen"), [
    ("bottom25", {0}), ("bottom50", {0, 1, 2}), ("bottom75", {0, 1, 2, 3}), ("top25", {5}), ("top50", {3, 4, 5}), ("interval2", {1, 3, 5}),
    ("interval4", {3}),
])  # fmt: skip
def test_what_the_fixed_methods_freeze(name: str, frozen: set[int]) -> None:
    """By hand, of six layers: floor(6 x 0.25) = 1, floor(6 x 0.75) = 4; every second, every fourth."""
    anatomy = load_shipped("minilm-l6").for_task("classification", 3)
    plan = make_plan(anatomy, FreezeOptions(**METHODS[name].freeze), 100)
    still = {layer.name for layer in anatomy.blocks if not {t.name for t in layer.tensors} & plan.ever_trained}
    assert still == {f"layers.{index}" for index in frozen}


def test_the_protocols_name_keys_of_recipes() -> None:
    for sections in PROTOCOLS.values():
        DataOptions(**sections["data"])
        TrainOptions(**sections["train"])
    paper = PROTOCOLS["paper"]
    steps, batch = (paper["train"][key] for key in ("max_steps", "per_device_train_batch_size"))
    assert steps * batch == paper["data"]["max_train_examples"] == 3200
    assert paper["train"]["learning_rate"] == 5e-5


def test_names_and_sizes() -> None:
    spec = Spec.model_validate({**BASE, "models": ["org/Model-1", "minilm-l6"], "sizes": [100, "all", 100], "seeds": 3})
    assert [(m.name, m.source) for m in spec.models] == [("Model-1", "org/Model-1"), ("minilm-l6", "minilm-l6")]
    assert (spec.sizes, spec.seeds) == ([100, None], [3])
    assert Spec.model_validate(spec.model_dump(mode="json")) == spec


def test_a_method_of_ones_own() -> None:
    own = MethodSpec.model_validate({"name": "middle", "freeze": {"strategy": "middle"}})
    assert own.kind.freeze == {}
    with pytest.raises(ValidationError, match="Another one gives its"):
        MethodSpec(name="middle")


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": ["full", "full"]}, "'full' is given twice"),
    ({"methods": [{"name": "l", "method": "lora", "match": "memory"}]}, "match or to alone"),
    ({"methods": ["full", {"name": "bottom50", "match": "memory", "to": "full"}]}, "no adapter whose rank"),
    ({"methods": [{"name": "l", "method": "lora", "match": "memory", "to": "ful"}, "full"]}, "Did you mean 'full'"),
    ({"methods": ["lora", {"name": "l", "method": "lora", "match": "memory", "to": "l"}]}, "no other method"),
    ({"methods": ["full", {"name": "a", "method": "lora", "match": "memory", "to": "full"},
                  {"name": "b", "method": "lora", "match": "memory", "to": "a"}]}, "which matches another itself"),
    ({"tune": {"trials": 3}}, "protocol converged alone"),
    ({"protocol": "converged", "tune": {"low": 1, "high": 1}}, "low must be below high"),
    ({"memory": "50%"}, "is a share; write the bytes"),
    ({"memory": "lots"}, "is no limit"),
    ({"jobs": 0}, "greater than or equal to 1"),
])  # fmt: skip
def test_mistakes(changes: dict, message: str) -> None:
    with pytest.raises((ValidationError, UserError), match=message):
        Spec.model_validate({**BASE, **changes})


def test_tuning_belongs_to_converged() -> None:
    assert not Spec.model_validate(BASE).tuned
    assert Spec.model_validate({**BASE, "protocol": "converged"}).tuned
    assert not Spec.model_validate({**BASE, "protocol": "converged", "tune": {"trials": 0}}).tuned
    assert TuneOptions().sampler == "grid"
