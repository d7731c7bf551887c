"""A prefix cache's cost and the choice of one. Oracles: closed forms on a toy, and two clocks that run side by side."""

from __future__ import annotations

import re
from dataclasses import replace
from math import inf

import anatomies
import pytest

from dsfreeze.errors import UserError
from dsfreeze.estimate.buffers import buffers
from dsfreeze.estimate.caching import (
    CacheCost,
    Choice,
    asked_for,
    bytes_a_token,
    cache_cost,
    cached_layers,
    choose,
    evicted_tensors,
    require_room,
)
from dsfreeze.estimate.communication import elements
from dsfreeze.estimate.gathering import Limits, gathers, persistent
from dsfreeze.hardware import find_device
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan

DEPTH, D, VOCAB, GIB = 8, 16, 1000, 2**30
TOY = anatomies.llama(depth=DEPTH, d=D, vocab=VOCAB)
LAYER = 16 * D * D + 2 * D
H100 = find_device("h100")
CPU = replace(
    find_device("cpu"), fp32_flops=8e9, memory_bandwidth=4e9, host_bandwidth=4e9, storage_bandwidth=1e9, per_node=4
)
ROOM = {"free_memory": 64 * GIB, "free_disk": 64 * GIB}


def trained(anatomy=TOY, **options) -> tuple[str, ...]:
    return make_plan(anatomy, FreezeOptions(**options), 80).phases[0].trainable


def above(count: int) -> tuple[str, ...]:
    """What trains with `count` layers frozen from the bottom."""
    return trained(count=count)


def cost_of(trainable, device=H100, **changes) -> CacheCost:
    values = {"train_tokens": 1000, "sequence_length": 32, "token_bytes": 2 * D, "visits": 5.0, "dtype_bytes": 2}
    return cache_cost(TOY, trainable, device=device, **{**values, **changes})


def made(*, recompute=10.0, memory=1.0, disk=5.0, train=100, evaluation=0, width=576, size=2304, visits=5.0):
    return CacheCost(15, width, train, evaluation, size, visits, recompute, memory, disk)


@pytest.mark.parametrize(("storage", "width", "size"), [
    ("fp32", 2, 64), ("bf16", 4, 32), ("fp16", 4, 32), ("int8", 4, 20), ("auto", 4, 64), ("auto", 2, 32),
])  # fmt: skip
def test_bytes_a_token(storage, width, size):
    """Oracle: by hand for 16 elements; int8 has four bytes of scale."""
    assert bytes_a_token(16, storage, width) == size


class TestCost:
    def test_a_cost_by_hand(self):
        """Oracle: four layers of 16 D^2 elements in matrices and a kernel of 4 s D; 2 D bytes; the h100's sheet; eight ranks."""
        found = cost_of(above(4), sharers=8, eval_tokens=24)
        flops = 4 * (2 * 16 * D * D + 4 * 32 * D)
        assert (found.layers, found.hidden_size, found.size) == (4, D, 1024 * 2 * D)
        assert found.recompute_seconds == pytest.approx(flops / (0.5 * 989.5e12))
        assert found.memory_seconds == pytest.approx(2 * D / 64e9)
        assert found.disk_seconds == pytest.approx(2 * D / (3.5e9 / 8))
        assert found.needed_bandwidth == pytest.approx(2 * D * 0.5 * 989.5e12 / flops)

    def test_in_fp32_and_calibrated(self):
        """Oracle: the sheet's fp32 peak; a calibration multiplies what the device does, not what it reads."""
        rounded, exact = cost_of(above(4)), cost_of(above(4), dtype_bytes=4, scale=3.0)
        assert exact.recompute_seconds == pytest.approx(3 * rounded.recompute_seconds * 989.5 / 67)
        assert (exact.memory_seconds, exact.disk_seconds) == (rounded.memory_seconds, rounded.disk_seconds)

    def test_int8(self):
        """Oracle: D + 4 bytes are stored and read; recomputing is what it was."""
        full, narrow = cost_of(above(4)), cost_of(above(4), token_bytes=bytes_a_token(D, "int8", 2))
        assert narrow.size == 1000 * 20
        assert narrow.disk_seconds / full.disk_seconds == pytest.approx(20 / 32)
        assert narrow.recompute_seconds == full.recompute_seconds

    def test_ranks_of_a_cpu_share_it(self):
        """Oracle: two ranks take twice as long for everything, eight on four cores four times."""
        one, two, eight = (cost_of(above(4), CPU, sharers=n) for n in (1, 2, 8))
        for name in ("recompute_seconds", "memory_seconds", "disk_seconds"):
            assert getattr(two, name) == pytest.approx(2 * getattr(one, name))
            assert getattr(eight, name) == pytest.approx(4 * getattr(one, name))

    def test_this_machine_is_one_on_which_a_cache_pays(self):
        """Oracle: SmolLM2-135M's bottom half by hand: 106 MFLOPs a token at tens of GFLOP/s are a millisecond; 2,304 bytes from any
        disk or memory are microseconds."""
        spared = cache_cost(
            anatomies.llama(depth=30, d=576, mlp=3), trained(anatomies.llama(depth=30, d=576, mlp=3), count=15),
            train_tokens=1, sequence_length=128, token_bytes=2304, device=find_device("cpu"), visits=3,
        )  # fmt: skip
        assert 20 * spared.disk_seconds < spared.recompute_seconds < 0.05
        assert spared.memory_seconds < spared.disk_seconds
        assert spared.break_even("disk") == spared.break_even("memory") == 2

    @pytest.mark.parametrize("options", [{"strategy": "full"}, {"strategy": "lora"}, {"strategy": "top", "count": 4}])
    def test_no_prefix(self, options):
        """Oracle: the lowest layer trains, whole or by its adapters, so there is nothing to store and nothing to spare."""
        plan = make_plan(TOY, FreezeOptions(**options), 80)
        found = cache_cost(
            plan.adapted(TOY),
            plan.ever_trained,
            train_tokens=9,
            sequence_length=32,
            token_bytes=32,
            device=H100,
            visits=5,
        )
        assert (found.layers, found.size, found.recompute_seconds) == (0, 0, 0)
        assert found.needed_bandwidth == inf
        assert [found.break_even(tier) for tier in ("memory", "disk")] == [None, None]

    def test_an_embedding_alone_is_no_prefix(self):
        everything_else = tuple(t.name for layer in TOY.layers[1:] for t in layer.tensors)
        assert cached_layers(TOY, everything_else) == 0
        assert cost_of(everything_else).size == 0

    def test_the_whole_model_but_the_head(self):
        """Oracle: all eight layers, twice what four take; the norm below the head multiplies nothing."""
        found = cost_of(("lm_head.weight",))
        assert found.layers == DEPTH
        assert found.recompute_seconds == pytest.approx(2 * cost_of(above(4)).recompute_seconds)

    def test_of_a_plan_that_moves_one_phase_is_priced(self):
        """Oracle: gradual unfreezing from the top: each phase's own layers below what trains."""
        plan = make_plan(TOY, FreezeOptions(strategy="gradual_unfreezing"), 80)
        depths = [cost_of(phase.trainable).layers for phase in plan.phases]
        assert len(depths) > 2
        assert depths == [TOY.lowest_trainable(phase.trainable) - 1 if TOY.lowest_trainable(phase.trainable) else 0
                          for phase in plan.phases]  # fmt: skip
        assert depths == sorted(depths, reverse=True)


class TestBreakEven:
    @pytest.mark.parametrize(("changes", "epoch"), [
        ({}, 2),                              # 100 written, 900 spared each epoch
        ({"memory": 5.0}, 3),                 # 500 written and 500 spared: equal at the end of epoch 2, less at that of 3
        ({"memory": 4.9}, 2),
        ({"memory": 6.0}, 3),                 # 600 over 400
        ({"memory": 9.0}, 11),                # 900 over 100: equal at the end of 10
        ({"memory": 10.0}, None), ({"memory": 11.0}, None), ({"train": 0}, None),
        ({"memory": 5.0, "evaluation": 100}, 4),  # 1000 over 500: equal at the end of 3
    ])  # fmt: skip
    def test_by_hand(self, changes, epoch):
        assert made(**changes).break_even("memory") == epoch

    @pytest.mark.parametrize("read", [1, 3, 5, 7, 9, 10, 12])
    @pytest.mark.parametrize("evaluation", [0, 40])
    def test_break_even_is_where_two_clocks_cross(self, read, evaluation):
        """Oracle: two clocks over forty epochs, token by token: recompute always; recompute and write once, then read."""
        cost = made(disk=read, train=100, evaluation=evaluation)
        without = [100 * 10 * epoch for epoch in range(1, 41)]
        cached = [100 * 10 + (100 + evaluation) * read + 100 * read * (epoch - 1) for epoch in range(1, 41)]
        crossed = [n + 1 for n, (a, b) in enumerate(zip(cached, without, strict=True)) if a < b]
        assert cost.break_even("disk") == (crossed[0] if crossed else None)
        assert [replace(cost, visits=float(n)).saved_seconds("disk") for n in range(1, 41)] == [
            b - a for a, b in zip(cached, without, strict=True)
        ]

    @pytest.mark.parametrize(("visits", "saved"), [(1.0, -100), (1.5, 350), (5.0, 3500)])
    def test_epochs_in_part(self, visits, saved):
        """Oracle: (visits - 1) x 100 x 9 - 100."""
        assert made(visits=visits).saved_seconds("memory") == saved


class TestChoice:
    def test_what_auto_takes(self):
        """Oracle: the rule, on either side of every limit; 1000 tokens of 2,304 bytes."""
        cost = made(train=1000)
        assert cost.size == 2_304_000
        just = {"free_memory": 4 * cost.size, "free_disk": cost.size + GIB}
        assert choose(cost, **just).tier == "memory"
        assert choose(cost, **{**just, "free_memory": 4 * cost.size - 1}).tier == "disk"
        assert choose(cost, free_memory=0, free_disk=cost.size + GIB - 1).tier == "off"
        assert choose(cost, free_memory=0, free_disk=0).tier == "off"
        assert choose(cost, free_memory=4 * cost.size, free_disk=0).tier == "memory"

    def test_a_tenth_of_a_large_disk_stays_free(self):
        """Oracle: 20 GiB of states on disks of which a tenth is more than a GiB."""
        cost = made(train=20 * GIB // 2304)
        free = -(-cost.size * 10 // 9) + 1
        assert choose(cost, free_memory=0, free_disk=free).tier == "disk"
        assert choose(cost, free_memory=0, free_disk=free - 10).tier == "off"

    @pytest.mark.parametrize(
        ("visits", "tier"), [(0.5, "off"), (1.0, "off"), (1.05, "off"), (1.5, "memory"), (5.0, "memory")]
    )
    def test_visits(self, visits, tier):
        """Oracle: 100 tokens: 100 seconds to write, 900 to spare by each further visit; a ninth of one is too little."""
        assert choose(made(visits=visits), **ROOM).tier == tier

    def test_what_is_slower_than_recomputing_is_not_taken(self):
        """Oracle: a disk at 12 against 10; memory pays; where the memory is full nothing does."""
        cost = made(disk=12.0)
        assert choose(cost, **ROOM).tier == "memory"
        off = choose(cost, free_memory=0, free_disk=64 * GIB)
        assert off.tier == "off"
        assert "quarter of the free host memory" in off.reason
        assert "reading a token from disk takes 1.2e+07 us, recomputing it through 15 layers 1e+07 us" in off.reason

    def test_what_pays_too_late_is_not_taken(self):
        """Oracle: 8 of 10 each way: pays at the end of epoch 6, for at 5 both clocks stand alike."""
        late = made(memory=20.0, disk=8.0)
        assert late.break_even("disk") == 6
        assert choose(replace(late, visits=5.0), **ROOM).tier == "off"
        assert "disk pays from epoch 6, and an example comes 5 times" in choose(late, **ROOM).reason
        assert choose(replace(late, visits=6.0), **ROOM).tier == "disk"

    def test_sentences(self):
        """Oracle: figures by hand: 265,000 x 2,304 B = 0.57 GiB."""
        cost = made(train=265_000)
        assert choose(cost, **ROOM).reason == (
            "memory: 582.28 MiB of states (265 k tokens of 2,304 B) for 15 layers computed once instead of 5 times; "
            "pays from epoch 2"
        )
        assert choose(replace(cost, layers=1), **ROOM).reason.startswith(
            "memory: 582.28 MiB of states (265 k tokens of 2,304 B) for 1 layer computed once"
        )
        assert choose(replace(cost, layers=0), **ROOM).reason == (
            "off: no transformer layer lies below all that trains, so there is no state to store"
        )
        both = choose(cost, free_memory=0, free_disk=0).reason
        assert "a quarter of the free host memory" in both
        assert "; " in both
        assert "the disk's free space less its reserve" in both
        for count, told in ((999, "999 tokens"), (1000, "1 k tokens"), (2_500_000, "2.5 M"), (10**9, "1 G tokens")):
            assert told in choose(made(train=count), free_memory=2**60, free_disk=2**60).reason
        assert "(265 k tokens" in choose(made(train=200_000, evaluation=65_000), **ROOM).reason
        assert choose(replace(cost, visits=1.0), **ROOM).reason == "off: no example comes a second time in 1 epoch"
        assert asked_for("disk", cost) == Choice(
            "disk", "disk: 582.28 MiB of states (265 k tokens of 2,304 B) for 15 layers, visited 5 times"
        )
        two = choose(replace(cost, layers=2), **ROOM).reason
        assert "for 2 layers computed" in two
        for found in (choose(cost, **ROOM), choose(cost, free_memory=0, free_disk=0)):
            assert found.reason.startswith(found.tier + ": ")

    def test_a_prefix_that_is_not_there(self):
        assert choose(cost_of(trained(strategy="full")), **ROOM).tier == "off"


class TestRoom:
    COST = made(train=10 * GIB // 2304, size=2304)

    @pytest.mark.parametrize("tier", ["memory", "disk"])
    def test_what_fits_is_not_refused(self, tier):
        """Oracle: to the byte; and of the other place nothing is asked."""
        free = {"free_memory": 0, "free_disk": 0, f"free_{tier}": self.COST.size}
        require_room(tier, self.COST, **free)
        with pytest.raises(
            UserError, match=f"freeze.prefix_cache: {tier} needs 10.00 GiB for the states of 4.66 M tokens"
        ):
            require_room(tier, self.COST, **{**free, f"free_{tier}": self.COST.size - 1})

    def test_what_to_write_instead(self):
        """Oracle: half of 10 GiB in bf16, 580 of 2304 bytes in int8; in int8 nothing is narrower."""
        with pytest.raises(
            UserError, match=r"bf16 \(5.00 GiB\) or int8 \(2.52 GiB\), a prefix_cache_dir on another disk, or"
        ):
            require_room("disk", self.COST, free_memory=0, free_disk=0)
        with pytest.raises(UserError, match=re.escape("Write freeze.prefix_cache: disk, or freeze.prefix_cache: off.")):
            require_room("memory", replace(self.COST, token_bytes=580), free_memory=0, free_disk=0)

    def test_what_is_evaluated_is_stored_too(self):
        """Oracle: by hand: 3 GiB of states for a million training tokens and half a million to evaluate, 2 KiB each; half of it in bf16."""
        cost = made(train=2**20, evaluation=2**19, width=512, size=2048)
        for tier, place in (("memory", "of host memory are"), ("disk", "on the disk of freeze.prefix_cache_dir are")):
            with pytest.raises(UserError) as caught:
                require_room(tier, cost, free_memory=0, free_disk=0)
            message = str(caught.value)
            assert f"needs 3.00 GiB for the states of 1.57 M tokens, and 0 B {place} free. Write" in message
            assert "bf16 (1.50 GiB) or int8 (774.00 MiB), " in message

    def test_auto_and_off_ask_for_nothing(self):
        for tier in ("auto", "off"):
            require_room(tier, self.COST, free_memory=0, free_disk=0)


class TestEvicted:
    def test_names(self):
        """Oracle: by hand: embedding and layers below; a tied embedding stays, and a table of positions beside it goes."""
        below = {t.name for layer in TOY.layers[:5] for t in layer.tensors}
        assert evicted_tensors(TOY, above(4)) == below
        tied = anatomies.llama(depth=4, tied=True)
        assert "model.embed_tokens.weight" not in evicted_tensors(tied, trained(tied, count=2))
        gpt = anatomies.gpt2()
        gone = evicted_tensors(gpt, trained(gpt, count=2))
        assert "transformer.wpe.weight" in gone
        assert "transformer.wte.weight" not in gone
        assert {name for name in gone if ".h." in name} == {t.name for layer in gpt.blocks[:2] for t in layer.tensors}

    def test_nothing_below_nothing_evicted(self):
        assert evicted_tensors(TOY, tuple(t.name for layer in TOY.layers[1:] for t in layer.tensors)) == frozenset()


BARE = Limits(persistence=0, reuse=0, prefetch=0, live=10**9)


class TestGathering:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_a_cached_prefix_is_not_gathered(self, checkpointing):
        """Oracle: with nothing kept or prefetched the forward pass gathers every element once, a cached one those above the cut;
        the backward pass is the same. With all of it prefetched too."""
        chosen = frozenset(above(5))
        plain, cached = (gathers(TOY, chosen, BARE, checkpointing=checkpointing, cached=c) for c in (False, True))
        assert plain.forward == TOY.numel
        assert plain.forward - cached.forward == 5 * LAYER + VOCAB * D
        assert plain.backward == cached.backward
        eager = replace(BARE, prefetch=10**9, reuse=10**9)
        plain, cached = (gathers(TOY, chosen, eager, checkpointing=checkpointing, cached=c) for c in (False, True))
        assert sum((plain.forward, plain.backward)) - sum((cached.forward, cached.backward)) == 5 * LAYER + VOCAB * D
        assert cached.peak == TOY.numel - 5 * LAYER - VOCAB * D

    def test_a_tied_embedding_is_gathered_as_the_head(self):
        """Oracle: twice in a pass that looks it up, once in one that does not."""
        tied = anatomies.llama(depth=4, tied=True)
        chosen = frozenset(trained(tied, count=2))
        layer = sum(t.numel for t in tied.blocks[0].tensors)
        words = tied.by_name["lm_head.weight"].numel
        plain, cached = (gathers(tied, chosen, BARE, checkpointing=False, cached=c) for c in (False, True))
        assert plain.forward == tied.numel + words
        assert cached.forward == tied.numel - 2 * layer

    def test_small_tensors_of_an_evicted_prefix_do_not_persist(self):
        """Oracle: norms of 16 elements: seventeen of them, of which ten lie in five evicted layers; cached ones stay."""
        chosen = above(5)
        limits = replace(BARE, persistence=D)
        gone = evicted_tensors(TOY, chosen)
        assert persistent(TOY, limits) == 17 * D
        assert persistent(TOY, limits, gone) == 7 * D
        kept, evicted = (elements(TOY, chosen, limits, cached=True, evicted=names) for names in (frozenset(), gone))
        assert (kept.persistent, evicted.persistent) == (17 * D, 7 * D)
        assert kept.total - evicted.total == 5 * LAYER + VOCAB * D
        assert kept.gathered_forward == evicted.gathered_forward

    def test_the_copy_of_a_gather_is_of_what_is_gathered(self):
        """Oracle: prefetch and the largest tensor: an embedding of 1000 x 16, where it is cached a layer's 4 D^2, tied it is the head."""
        limits = replace(BARE, prefetch=10)
        for anatomy, largest in (
            (anatomies.llama(depth=8, d=D, vocab=VOCAB, labels=3), 4 * D * D),
            (anatomies.llama(depth=8, d=D, vocab=VOCAB, tied=True), VOCAB * D),
        ):
            chosen = trained(anatomy, count=4)
            plain, cached = (
                buffers(
                    anatomy,
                    chosen,
                    elements(anatomy, chosen, limits, cached=on),
                    stage=3,
                    world_size=2,
                    limits=limits,
                    cached=on,
                ).gather_copy
                for on in (False, True)
            )
            assert plain == 4 * (10 + VOCAB * D)
            assert cached == 4 * (10 + largest)


def test_limits_of_a_configuration():
    """Oracle: DeepSpeed's documented defaults, where the configuration is silent."""
    assert Limits.of({"zero_optimization": {"stage": 3}}) == Limits() == Limits(100_000, 10**9, 50_000_000, 10**9)
    given = {
        "stage3_param_persistence_threshold": 1, "stage3_max_reuse_distance": 2.0, "stage3_prefetch_bucket_size": 3,
        "stage3_max_live_parameters": 4,
    }  # fmt: skip
    assert Limits.of({"zero_optimization": given}) == Limits(1, 2, 3, 4)
