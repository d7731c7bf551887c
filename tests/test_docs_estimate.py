"""docs/estimate.md: the tests that it names exist, and its worked example is what the code gives, and what a hand gives."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from dsfreeze.estimate.caching import CacheCost
from dsfreeze.estimate.price import PlanCost, Price
from dsfreeze.hardware import find_device
from dsfreeze.planner.caching import cache_of
from dsfreeze.recipe import FreezeOptions
from dsfreeze.setting import Workload
from dsfreeze.shapes import known_activations, known_anatomy
from dsfreeze.strategies import make_plan

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "estimate.md").read_text(encoding="utf-8")
NAMED = re.findall(r"(tests/[\w/]+\.py)::(\w+)", PAGE)
H200 = find_device("h200")


@cache
def cost_of(*, prefix_cache: bool = False) -> PlanCost:
    anatomy, activations = known_anatomy("llama-3-8b", "causal_lm", None), known_activations("llama-3-8b")
    assert anatomy is not None
    assert activations is not None
    return PlanCost(
        anatomy, make_plan(anatomy, FreezeOptions(fraction=0.5)), activations.of("causal_lm", None, 2),
        Workload(gradient_checkpointing=True, prefix_cache=prefix_cache), sequence_length=4096,
    )  # fmt: skip


def price_of(*, prefix_cache: bool = False) -> Price:
    return cost_of(prefix_cache=prefix_cache).at(2, 8)


def a_million_tokens() -> CacheCost:
    cost = cost_of()
    found = cache_of(cost.anatomy, cost.plan, storage="auto", dtype_bytes=2, sequence_length=4096, device=H200, ranks=8)
    assert found is not None
    return found


@cache
def figures() -> dict[str, float]:
    """The worked example's figures by the page's names."""
    price, cached = price_of(), price_of(prefix_cache=True)
    states, items, sent = price.states, price.items, price.sent
    seconds, read, states_read = price.on(H200), cached.on(H200), a_million_tokens()
    return {
        "P": states.total,
        "P_t": states.trainable,
        "weights": states.weights,
        "gradients": states.gradients,
        "masters": states.masters,
        "moments": states.optimizer_state,
        "reduce bucket and copy": items["reduce bucket"],
        "step gradient": items["step gradient"],
        "stored": items["activations"],
        "logits and loss": items["logits and loss"],
        "peak of forward": price.peaks.forward,
        "peak of backward": price.peaks.backward,
        "peak of the step": price.peaks.step,
        "gradients sent": sent.gradients,
        "updated weights sent": sent.updated_weights,
        "FLOPs forward": states.forward_flops,
        "FLOPs recomputed": price.recomputed_flops,
        "FLOPs backward": states.backward_flops,
        "products": seconds.products,
        "memory": seconds.memory,
        "optimizer": seconds.optimizer,
        "links": seconds.links,
        "step": seconds.total,
        "tokens a second": 8 * price.tokens / seconds.total,
        "FLOPs that a cache spares": cached.spared_flops,
        "reading the cache": read.host,
        "step with the cache": read.total,
        "states of a million tokens": states_read.size,
        "recomputing a token": 1e6 * states_read.recompute_seconds,
        "reading it from disk": 1e6 * states_read.disk_seconds,
        "reading it from memory": 1e6 * states_read.memory_seconds,
        "bandwidth from which reading pays": states_read.needed_bandwidth,
        "break-even from memory": states_read.break_even("memory"),
    }


def shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value > 1000 else f"{value:.4f}"


@pytest.mark.parametrize(("file", "name"), sorted(set(NAMED)))
def test_a_named_test_exists(file, name):
    """Oracle: the sources."""
    assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_every_formula_names_its_test():
    """Oracle: the page's own sections; symbols and the example need none."""
    sections = re.split(r"\n##+ ", PAGE)[1:]
    assert len(sections) == 12
    for section in sections[:-1]:
        assert "**Held by** tests/" in section, section.partition("\n")[0]


def test_the_worked_example_is_what_the_code_gives():
    """Oracle: the code today. Where a formula changes, the page does."""
    rows = dict(re.findall(r"^\| ([^|]+?) \|.*\| ([\d,.]+) \|$", PAGE.partition("## A worked example")[2], re.M))
    assert rows == {name: shown(value) for name, value in figures().items()}


def test_the_worked_example_by_hand():
    """Oracle: the page's formulas with a layer's elements written out. The profile's own figures are taken as they are: the loss's
    bytes, and what a layer could store."""
    layer, matrices, down, head, norm, tokens, ranks = 218_112_000, 218_103_808, 58_720_256, 525_336_576, 4096, 4096, 8
    found = figures()
    trained, kernel = 16 * layer + norm + head, 4 * 4096 * 4096
    total = 32 * layer + 2 * head + norm
    assert (found["P"], found["P_t"]) == (total, trained)
    states = [2 * total, 2 * trained // ranks, 4 * trained // ranks, 8 * trained // ranks]
    assert [found[name] for name in ("weights", "gradients", "masters", "moments")] == states
    assert found["reduce bucket and copy"] == 2 * 50_000_000 + 2 * head
    assert found["step gradient"] == 6 * head // ranks
    assert found["stored"] == 16 * 2 * tokens * 4096 + 2 * tokens * 128 * 2 + 8 * tokens
    assert found["logits and loss"] == pytest.approx(tokens * 128_256 * (2 + 2 + 4 + 4), rel=0.01)
    resident = states[0] + states[2] + states[3]
    fullest = found["stored"] + found["logits and loss"]
    assert found["peak of backward"] == resident + found["reduce bucket and copy"] + fullest
    assert found["peak of the step"] == resident + states[1] + found["step gradient"]
    assert found["peak of forward"] == resident + max(cost_of().phases[0].passes.forward)
    assert (found["gradients sent"], found["updated weights sent"]) == (4 * trained * 7 // 8, 2 * trained * 7 // 8)
    assert found["FLOPs forward"] == 2 * (32 * matrices + head) + 32 * kernel
    assert found["FLOPs backward"] == 4 * (16 * matrices + head) + 2 * 16 * kernel
    assert found["FLOPs recomputed"] == 16 * (2 * (matrices - down) + kernel)
    flops = found["FLOPs forward"] + found["FLOPs backward"] + found["FLOPs recomputed"]
    assert found["products"] == pytest.approx(tokens * flops / (0.5 * 989.5e12))
    busy = cost_of().activations.busy(1, 4096)
    moved = 2 * sum(busy) + 3 * sum(busy[17:]) + 2 * sum(busy[17:-1])
    moved += 2 * (total - head + 3 * trained) + 10 * 2 * trained  # recomputing reads what is above the cut once more
    assert found["memory"] == pytest.approx(moved / (0.8 * 4.8e12))
    assert found["optimizer"] == pytest.approx(52 * trained / ranks / (0.8 * 4.8e12))
    assert found["links"] == pytest.approx((found["gradients sent"] + found["updated weights sent"]) / 450e9)
    assert found["step"] == pytest.approx(sum(found[name] for name in ("products", "memory", "optimizer", "links")))
    assert found["FLOPs that a cache spares"] == 16 * (2 * matrices + kernel)
    assert found["reading the cache"] == pytest.approx(tokens * 4096 * 2 * ranks / 3.5e9)
    assert found["states of a million tokens"] == 8192 * 10**6
    recomputed = 16 * (2 * matrices + kernel) / (0.5 * 989.5e12)
    assert found["recomputing a token"] == pytest.approx(1e6 * recomputed)
    assert found["reading it from disk"] == pytest.approx(1e6 * 8192 * ranks / 3.5e9)
    assert found["reading it from memory"] == pytest.approx(1e6 * 8192 / 64e9)
    assert found["bandwidth from which reading pays"] == pytest.approx(8192 / recomputed)
    assert found["break-even from memory"] == 2  # 8192 / 64e9 written once is less than one epoch's saving a token
    assert a_million_tokens().break_even("disk") is None  # 18.7 to read, 16.3 to recompute


def test_a_scale_multiplies_what_the_device_does_itself():
    """Oracle: the formula; products, memory and optimizer twice, links and host once."""
    once, twice = price_of(prefix_cache=True).on(H200), price_of(prefix_cache=True).on(H200, 2.0)
    assert (twice.products, twice.memory, twice.optimizer) == (2 * once.products, 2 * once.memory, 2 * once.optimizer)
    assert (twice.links, twice.host) == (once.links, once.host)


if __name__ == "__main__":  # the example's values, for the page
    print("\n".join(f"{name}: {shown(value)}" for name, value in figures().items()))
