"""The whole price of a plan: closed forms on a toy whose activations are made by hand, and monotony."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import anatomies
import pytest

from dsfreeze.activations import INPUT, Ends, Part, Stored, TaskActivations
from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate.price import PlanCost, Price
from dsfreeze.hardware import find_device
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import FreezeOptions
from dsfreeze.setting import Workload
from dsfreeze.shapes import known_activations, known_anatomy
from dsfreeze.strategies import make_plan
from dsfreeze.zero_config import bucket_of

DEPTH, D, VOCAB, TOKENS = 8, 16, 1000, 2 * 32
TOY = anatomies.llama(depth=DEPTH, d=D, vocab=VOCAB)
STAGES = (0, 1, 2, 3)
H100 = find_device("h100")


def a_token(size: int) -> tuple[int, int, int, int, int]:
    return 0, 0, 0, size, 0


def activations(anatomy: Anatomy) -> TaskActivations:
    """Bytes a token: a layer that is passed stores 320, one that trains 200 more; the end 4000. Working sets: 100 and more."""
    layer = anatomy.blocks[0]
    weights = frozenset(t.name.removeprefix(layer.path + ".") for t in layer.tensors)
    block = Part(
        (Stored(a_token(320), weights | {INPUT}), Stored(a_token(200), weights)),
        idle=(a_token(400),), forward=(a_token(560),), backward=(a_token(240),),
        unrepeated=("mlp.down_proj.weight",),
    )  # fmt: skip
    embed = Part((), idle=(a_token(64),), forward=(a_token(64),), backward=(a_token(64),))
    last = frozenset([INPUT, "model.norm.weight", "lm_head.weight"])
    end = Part(
        (Stored(a_token(4000), last),), idle=(a_token(8000),), forward=(a_token(8000),), backward=(a_token(4000),)
    )
    return TaskActivations((block,) * len(anatomy.blocks), Ends(embed, end), "sdpa", 2)


def plan_of(anatomy: Anatomy = TOY, steps: int | None = None, **options) -> FreezePlan:
    return make_plan(anatomy, FreezeOptions(**options), steps)


def cost_of(anatomy: Anatomy = TOY, *, work: dict | None = None, dtype_bytes: int = 2, **options) -> PlanCost:
    """2 sequences of 32 of a plan by its options."""
    workload = Workload(micro_batch_size=2, **(work or {}))
    plan = plan_of(anatomy, **options)
    return PlanCost(anatomy, plan, activations(anatomy), workload, dtype_bytes=dtype_bytes, sequence_length=32)


def peaks_of(price: Price) -> tuple[int, int, int]:
    return price.peaks.forward, price.peaks.backward, price.peaks.step


@pytest.mark.parametrize("dtype_bytes", [2, 4])
def test_items_by_hand(dtype_bytes):
    """Oracle: closed forms at stage 2 on one rank, half of the layers trained: what is stored and the end's
    working set on top of states without gradients; the step holds states and a layer's gradient."""
    b, layer, end = dtype_bytes, 16 * D * D + 2 * D, D + VOCAB * D
    price = cost_of(count=4, dtype_bytes=b).at(2, 1)
    trained, frozen = 4 * layer + end, 4 * layer + VOCAB * D
    assert price.items == {
        "frozen weights": b * frozen, "trainable weights": b * trained,
        "gradients": b * trained, "masters": 4 * trained, "moments": 8 * trained, "parked state": 0,
        "reduce bucket": b * bucket_of(trained), "gathered weights": 0, "offload staging": 0,
        "step gradient": (6 if b == 2 else 4) * VOCAB * D,
        "activations": TOKENS * 4 * 520, "logits and loss": TOKENS * 8000, "prefix cache": 0,
    }  # fmt: skip
    states = ("frozen weights", "trainable weights", "gradients", "masters", "moments")
    assert price.peaks.step == sum(price.items[name] for name in (*states, "step gradient"))
    before = sum(price.items[name] for name in states if name != "gradients")
    assert price.peaks.forward == before + TOKENS * (4 * 520 + 8000)
    assert price.peaks.backward == before + price.items["reduce bucket"] + TOKENS * (4 * 520 + 4000)
    assert price.peaks.most == max(peaks_of(price))
    assert sum(price.items.values()) >= price.peaks.most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize(("stage", "ranks"), product(STAGES, (1, 8)))
def test_freezing_more_never_costs_more(stage, ranks, dtype_bytes, checkpointing):
    """Oracle: monotony of every peak, of FLOPs, of bytes sent and of seconds."""
    work = {"gradient_checkpointing": checkpointing}
    costs = [cost_of(count=n, work=work, dtype_bytes=dtype_bytes).at(stage, ranks) for n in range(DEPTH + 1)]
    for more, less in pairwise(costs):
        assert all(a >= b for a, b in zip(peaks_of(more), peaks_of(less), strict=True))
        assert less.flops_per_step <= more.flops_per_step
        assert less.sent.sent <= more.sent.sent
        assert less.on(H100).total <= more.on(H100).total
        assert less.host == more.host == 0


@pytest.mark.parametrize("stage", STAGES)
def test_more_ranks_never_cost_more(stage):
    """Oracle: monotony; what one rank alone is spared is the copy that is sent."""
    costs = [cost_of(count=4).at(stage, ranks) for ranks in (1, 2, 4, 8, 64)]
    for fewer, more in pairwise(costs):
        copied = 2 * fewer.states.trainable if fewer.setting.world_size == 1 else 0
        assert all(a + copied >= b for a, b in zip(peaks_of(fewer), peaks_of(more), strict=True))
        assert fewer.flops_per_step == more.flops_per_step


@pytest.mark.parametrize("stage", STAGES)
def test_one_rank_sends_nothing(stage):
    assert cost_of(count=4).at(stage, 1).sent.sent == 0
    assert cost_of(count=4).at(stage, 2).sent.sent > 0


@pytest.mark.parametrize(("stage", "ranks"), product((2, 3), (1, 8)))
def test_offload(stage, ranks):
    """Oracle: masters and moments (12 bytes an element) lie on the host, and only staging grows on the device."""
    kept, moved = (cost_of(count=4).at(stage, ranks, offload=offload) for offload in (False, True))
    assert moved.host >= 12 * (moved.states.trainable // ranks)
    assert (kept.host, moved.items["masters"], moved.items["moments"]) == (0, 0, 0)
    assert {n for n in kept.items if moved.items[n] > kept.items[n]} <= {"offload staging"}
    staged = moved.items["offload staging"]
    assert all(less <= more + staged for more, less in zip(peaks_of(kept), peaks_of(moved), strict=True))
    assert moved.on(H100).optimizer != kept.on(H100).optimizer
    assert (moved.on(H100).host > 0, kept.on(H100).host) == (True, 0)


def test_checkpointing_by_hand():
    """Oracle: a layer that trains stores its input (2 D bytes a token) in place of 520; each runs again but for its down product."""
    plain, again = (cost_of(count=4, work={"gradient_checkpointing": on}).at(2, 1) for on in (False, True))
    assert plain.items["activations"] - again.items["activations"] == TOKENS * 4 * (520 - 2 * D)
    a_layer = 2 * (16 - 4) * D * D + 4 * 32 * D
    assert again.flops_per_token - plain.flops_per_token == again.recomputed_flops == 4 * a_layer
    assert again.peaks.most <= plain.peaks.most
    assert again.on(H100).total > plain.on(H100).total


def test_a_cached_prefix_by_hand():
    """Oracle: four layers' forward is spared, their output read once a step from storage."""
    plain, cached = (cost_of(count=4, work={"prefix_cache": on}).at(2, 1) for on in (False, True))
    spared = 4 * (2 * 16 * D * D + 4 * 32 * D)
    assert plain.flops_per_token - cached.flops_per_token == cached.spared_flops == spared
    assert plain.work.forward_flops - cached.work.forward_flops == TOKENS * spared
    assert plain.work.backward_flops == cached.work.backward_flops
    assert cached.items["prefix cache"] == 2 * TOKENS * D
    assert cached.on(H100).host == 2 * TOKENS * D / H100.storage_bandwidth
    assert plain.on(H100).host == 0


@pytest.mark.parametrize("options", [{"strategy": "full"}, {"strategy": "lora"}, {"strategy": "top", "count": 4}])
@pytest.mark.parametrize("stage", STAGES)
def test_without_a_prefix_a_cache_costs_nothing(stage, options):
    """Oracle: the same plan without one, to the byte and the second."""
    plain, cached = (cost_of(work={"prefix_cache": on}, **options).at(stage, 8) for on in (False, True))
    assert plain == cached
    assert cached.cache_bandwidth(H100) is None


@pytest.mark.parametrize(("work", "seconds"), [
    ({}, 2 * D * 8 / 3.5e9), ({"prefix_cache_dtype": "int8"}, (D + 4) * 8 / 3.5e9), ({"prefix_cache_dtype": "fp32"}, 4 * D * 8 / 3.5e9),
    ({"cache_in_memory": True}, 2 * D / 64e9), ({"cache_in_memory": True, "prefix_cache_dtype": "int8"}, (D + 4) / 64e9),
])  # fmt: skip
def test_what_a_cache_reads_by_hand(work, seconds):
    """Oracle: bytes of a stored token over an eighth of the node's storage, or over PCIe; on the device a state has two bytes an
    element however it is stored. Three micro-steps read three times as much."""
    price = cost_of(count=4, work={"prefix_cache": True, "gradient_accumulation_steps": 3, **work}).at(2, 8)
    assert price.items["prefix cache"] == TOKENS * 2 * D
    assert price.on(H100).host == pytest.approx(3 * TOKENS * seconds)
    others = price.on(H100).total - price.on(H100).host
    assert price.cache_bandwidth(H100) == pytest.approx(price.work.cache_bytes / others)


def test_ranks_of_a_cpu_share_the_way_to_memory():
    """Oracle: two ranks of a two-core machine read at half its bandwidth."""
    cpu = replace(find_device("cpu"), per_node=2, host_bandwidth=12e9)
    price = cost_of(count=4, work={"prefix_cache": True, "cache_in_memory": True}, dtype_bytes=4).at(2, 2)
    assert price.on(cpu).host == pytest.approx(TOKENS * 4 * D / 6e9)


@pytest.mark.parametrize("dtype_bytes", [2, 4])
@pytest.mark.parametrize("stage", STAGES)
def test_an_evicted_prefix_by_hand(stage, dtype_bytes):
    """Oracle: of 8 layers and an untied embedding four and that are gone, at stage 3 an eighth of each; every peak is lower by as
    much (and by the small tensors that persist there, of a toy all), and nothing else changes."""
    work = {"prefix_cache": True}
    kept, gone = (
        cost_of(count=4, work={**work, "evict_prefix": on}, dtype_bytes=dtype_bytes).at(stage, 8)
        for on in (False, True)
    )
    elements = 4 * (16 * D * D + 2 * D) + VOCAB * D
    evicted = dtype_bytes * elements // (8 if stage == 3 else 1)
    persistent = dtype_bytes * elements if stage == 3 else 0
    assert kept.states.weights - gone.states.weights == evicted
    assert kept.items["frozen weights"] - gone.items["frozen weights"] == evicted
    assert gone.items["frozen weights"] == 0
    for before, after in zip(peaks_of(kept), peaks_of(gone), strict=True):
        assert before - after == evicted + persistent
    assert kept.sent.sent - gone.sent.sent == persistent * 7 // 8
    assert (kept.states.total, kept.flops_per_step, kept.host) == (gone.states.total, gone.flops_per_step, gone.host)


def test_an_evicted_prefix_whose_embedding_is_the_head():
    """Oracle: the embedding stays; four layers go, and no more where the lowest of all phases trains lower."""
    tied = anatomies.llama(depth=DEPTH, d=D, vocab=VOCAB, tied=True)
    layer = 16 * D * D + 2 * D
    for options, layers in (({"count": 4}, 4), ({"strategy": "gradual_unfreezing", "steps": 80}, 0)):
        plan = plan_of(tied, **options)
        kept, gone = (
            PlanCost(tied, plan, activations(tied), Workload(prefix_cache=True, evict_prefix=on))
            .at(2, 1)
            .states.weights
            for on in (False, True)
        )
        assert kept - gone == 2 * layers * layer


def test_at_stage_3_a_cached_prefix_is_not_gathered():
    """Oracle: Llama-3-8B at width: all but the persistent norms of 16 layers and the embedding is gathered once less a pass."""
    anatomy, known = known_anatomy("llama-3-8b", "causal_lm", None), known_activations("llama-3-8b")
    assert anatomy is not None
    assert known is not None
    plan = plan_of(anatomy, fraction=0.5)
    plain, cached = (
        PlanCost(anatomy, plan, known.of("causal_lm", None, 2), Workload(prefix_cache=on), sequence_length=4096).at(
            3, 8
        )
        for on in (False, True)
    )
    assert plain.sent.forward_weights - cached.sent.forward_weights == pytest.approx(
        2 * (16 * 218_103_808 + 525_336_576) * 7 / 8, rel=0.01
    )
    assert plain.sent.persistent_weights == cached.sent.persistent_weights
    assert plain.states.weights == cached.states.weights


def test_micro_steps():
    """Oracle: three of them do the passes thrice and the step once."""
    one, three = (cost_of(count=4, work={"gradient_accumulation_steps": n}).at(2, 8) for n in (1, 3))
    assert three.tokens == 3 * one.tokens
    for name in ("forward_flops", "backward_flops", "pass_bytes"):
        assert getattr(three.work, name) == 3 * getattr(one.work, name)
    assert three.work.stepped == one.work.stepped


@pytest.mark.parametrize(("stage", "ranks", "times"), [(0, 1, 0), (0, 8, 1), (1, 8, 1), (2, 8, 3), (3, 8, 3)])
def test_gradients_on_their_way(stage, ranks, times):
    """Oracle: five copies, each read and written, of bf16 gradients; three micro-steps, of which stages 0 and 1 send once."""
    cost = cost_of(count=4, work={"gradient_accumulation_steps": 3})
    alone, price = cost.at(0, 1), cost.at(stage, ranks)
    assert price.work.pass_bytes - alone.work.pass_bytes == times * 5 * 2 * 2 * price.states.trainable


def test_seconds_by_hand():
    """Oracle: the formula written out; four of eight layers and the end train, bf16, stage 2 on 8 ranks, 64 tokens each."""
    trained = 4 * 4128 + 16016  # a layer 16 D^2 + 2 D, the final norm and the head D + 1000 D
    forward = 8 * (2 * 16 * D * D + 4 * 32 * D) + 2 * VOCAB * D
    backward = 4 * (4 * 16 * D * D + 8 * 32 * D) + 4 * VOCAB * D
    passes = 2 * (8 * 520 + 4000) + 3 * (4 * 520 + 4000)
    weights = (8 * 4128 + 16016) + trained + 11 * trained
    price = cost_of(count=4).at(2, 8)
    seconds = price.on(H100)
    assert seconds.products == pytest.approx(TOKENS * (forward + backward) / (0.5 * 989.5e12))
    assert seconds.memory == pytest.approx((TOKENS * passes + 2 * weights) / (0.8 * 3.35e12))
    assert seconds.optimizer == pytest.approx(52 * (trained / 8) / (0.8 * 3.35e12))
    assert seconds.links == pytest.approx((2 + 1) * 7 / 8 * 2 * trained / 450e9)
    assert seconds.host == 0
    assert seconds.total == pytest.approx(
        seconds.products + seconds.memory + seconds.optimizer + seconds.links, rel=1e-12
    )


def test_traffic_of_adapters_by_hand():
    """Oracle: sides of a layer's seven matrices, in 6 D + 4 D and out 5 D + 2 x 4 D: 1 in + 6 out forward, 5 in + 4 out backward."""
    inner, outer = 10 * D, 13 * D
    adapters = 8 * TOKENS * 2 * ((inner + 6 * outer) + (5 * inner + 4 * outer))
    trained = 8 * 8 * (inner + outer)
    weights = 2 * (8 * 4128 + 16016 + trained) + 11 * trained
    passes = TOKENS * 5 * (8 * 520 + 4000)
    assert cost_of(strategy="lora").at(2, 1).work.pass_bytes == passes + adapters + 2 * weights


@pytest.mark.parametrize("stage", [2, 3])
def test_scale_is_of_the_device_alone(stage):
    """Oracle: products, memory and the optimizer take four times as long, links (none hides at stage 2) and the host do not."""
    price = cost_of(count=4, work={"prefix_cache": True}).at(stage, 8)
    one, four = price.on(H100), price.on(H100, 4.0)
    for name in ("products", "memory", "optimizer"):
        assert getattr(four, name) == pytest.approx(4 * getattr(one, name))
    assert four.links == one.links if stage == 2 else four.links <= one.links
    assert four.host == one.host


@pytest.mark.parametrize("options", [
    {"strategy": "badam", "switch_every": 10, "state": "clear"}, {"strategy": "sweep", "state": "clear"},
    {"strategy": "gradual_unfreezing"},
])  # fmt: skip
def test_a_plan_that_moves_is_priced_at_its_fullest_phase(options):
    """Oracle: the largest of its phases' own prices; in fp32 and cleared, nothing waits elsewhere."""
    plan = plan_of(steps=80, **options)
    assert len(plan.phases) > 2

    def most(one: FreezePlan) -> int:
        cost = PlanCost(TOY, one, activations(TOY), Workload(micro_batch_size=2), dtype_bytes=4, sequence_length=32)
        return cost.at(2, 2).peaks.most

    alone = [replace(plan, phases=(Phase(0, None, phase.trainable),)) for phase in plan.phases]
    assert most(plan) == max(map(most, alone))


def test_a_large_frozen_model():
    """Oracle: 33e9 parameters of which adapters train: 66 GB of bf16 weights on each of 8 ranks at stage 2, 8.25 at 3."""
    anatomy = anatomies.llama(depth=46, d=6656, vocab=32000)
    assert anatomy.numel == pytest.approx(33e9, rel=0.002)
    cost = cost_of(anatomy, strategy="lora")
    for stage, weights in ((2, 66e9), (3, 8.25e9)):
        items = cost.at(stage, 8).items
        assert items["frozen weights"] + items["trainable weights"] == pytest.approx(weights, rel=0.01)
        assert items["masters"] + items["moments"] < 0.02 * weights


def test_a_shipped_model_by_name():
    """Oracle: 2 bytes of 70.55e9 parameters; a bottom half in bf16 on 8 ranks does not fit 80 GB at stage 2 and does at 3."""
    name = "llama-3-70b"
    anatomy, known = known_anatomy(name, "causal_lm", None), known_activations(name)
    assert anatomy is not None
    if known is None:
        pytest.skip("its activations are not shipped")
    work = Workload(micro_batch_size=1, gradient_checkpointing=True)
    plan = plan_of(anatomy, strategy="bottom", fraction=0.5)
    cost = PlanCost(anatomy, plan, known.of("causal_lm", None, 2), work, sequence_length=4096)
    two, three = cost.at(2, 64), cost.at(3, 64)
    weights = two.items["frozen weights"] + two.items["trainable weights"]
    assert weights == 2 * 70_553_706_496
    assert two.peaks.most > weights
    assert three.peaks.most < H100.memory < two.peaks.most
