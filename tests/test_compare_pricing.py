"""Ranks that match. Oracles: every rank tried one by one; the parameters of a run's plan counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
from marks import some_fast

from dsfreeze.cli.known import anatomy_of
from dsfreeze.compare.pricing import Match, Prices
from dsfreeze.errors import UserError
from dsfreeze.recipe import Recipe


def recipe(model: str = "minilm-l6", **freeze: Any) -> Recipe:
    values = {
        "model": model, "task": "classification", "data": {"num_labels": 3, "max_length": 64}, "freeze": freeze,
        "train": {"max_steps": 100, "per_device_train_batch_size": 8},
    }  # fmt: skip
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def prices() -> Prices:
    return Prices(anatomy_of)


def match(prices: Prices, by: Any, other: Recipe, **freeze: Any) -> Match:
    return Match(prices, recipe(strategy="lora", **freeze), other, by, ("mine", "other"))


def test_parameters_are_those_of_the_plan(prices: Prices) -> None:
    """LoRA of rank r on MiniLM: 6 layers of 4 d x d and 2 d x 4d matrices bring 18 d r each, beside the pooler and the head."""
    width, head = 384, 384 * 3 + 3
    pooler = prices.trainable(recipe(strategy="lora")) - 6 * 18 * width * 8 - head
    assert pooler in (0, width * width + width)
    assert prices.trainable(recipe(strategy="lora", adapter={"r": 3})) == 6 * 18 * width * 3 + head + pooler


@pytest.mark.parametrize("other", [{"strategy": "bottom", "fraction": 0.75}, {"strategy": "bottom", "fraction": 0.5}])
def test_parameters_match_as_nearly_as_a_rank_can(prices: Prices, other: dict[str, Any]) -> None:
    wanted = prices.trainable(recipe(**other))
    one = match(prices, "parameters", recipe(**other))
    away = {rank: abs(prices.trainable(one.recipe_at(rank)) - wanted) for rank in range(1, one.most + 1)}
    adapter = one.matched().freeze.adapter
    assert adapter is not None
    assert adapter.r == min(away, key=lambda rank: away[rank])
    assert adapter.alpha / adapter.r == 2  # the default's scale


@pytest.mark.parametrize("other", some_fast([{"strategy": "full"}, {"strategy": "top", "fraction": 0.5}]))
def test_memory_matches_from_below(prices: Prices, other: dict[str, Any]) -> None:
    limit = prices.peak(recipe(**other))
    one = match(prices, "memory", recipe(**other), adapter={"r": 4, "alpha": 4})
    within = [rank for rank in range(1, one.most + 1) if prices.peak(one.recipe_at(rank)) <= limit]
    adapter = one.matched().freeze.adapter
    assert adapter is not None
    assert (adapter.r, adapter.alpha / adapter.r) == (max(within), 1)
    assert within == list(range(1, max(within) + 1))


def test_what_cannot_match_says_why(prices: Prices) -> None:
    with pytest.raises(UserError, match="above the model's width of 384"):
        match(prices, "parameters", recipe(strategy="full")).matched()
    with pytest.raises(UserError, match="no rank has so few"):
        match(prices, "parameters", recipe(strategy="head")).matched()
    with pytest.raises(UserError, match="rank 1 takes"):
        match(prices, "memory", recipe(strategy="head")).matched()


def test_a_prefix_cache_spares_no_memory_while_it_is_filled(prices: Prices) -> None:
    cached = recipe(strategy="bottom", fraction=0.5, prefix_cache="disk")
    assert prices.peak(cached) == prices.peak(recipe(strategy="bottom", fraction=0.5))


def test_a_model_that_cannot_be_read_is_told_once_and_again() -> None:
    calls = []

    def read(recipe: Recipe) -> Any:
        calls.append(recipe.model.name)
        raise OSError("no\n  such disk")

    mine = Prices(read)
    for _ in range(2):
        with pytest.raises(UserError, match="'minilm-l6' cannot be read: no such disk"):
            mine.plan(recipe(strategy="full"))
    assert calls == ["minilm-l6"]
