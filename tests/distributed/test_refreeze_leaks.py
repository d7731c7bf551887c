"""What a change of the trainable set leaves behind, holds, and costs the steps around it.

Oracles: counts after the second cycle of sets stay what they were to the last (upstream: one engine and one hook more
per rebuild, peers.md rows 33 and 34); closed forms of the set for the bytes of masters and moments.
"""

from __future__ import annotations

import gc
import time
import weakref

import psutil
import pytest
import torch
from forks import run_ranks
from refreeze_kit import ALL, Case, full_weights, loss_of, make_engine, names_of
from tiny import recipe_of, tiny_llama

from dsfreeze.engine.process import process_group
from dsfreeze.engine.refreeze import refreeze

pytestmark = pytest.mark.slow

#: whole layers, and a set that cuts through one
CYCLE = [names_of(0, 1), names_of(2, also=("3.mlp.up", "lm_head")), names_of(3)]
KINDS = ("DeepSpeedEngine", "ZeroOptimizer", "Stage3", "Coordinator", "UnfusedOptimizer", "Offload")
RULES = ("keep", "clear", "offload")
NUMEL = {n: p.numel() for n, p in tiny_llama().named_parameters()}


def step(engine, case, number, rank):
    engine.backward(loss_of(engine, number, rank, 0, case))
    engine.step()


def storages():
    """Bytes of every distinct storage that a live tensor keeps: the least of some looks, for gloo's own thread lets go
    of a collective's tensors a moment after the collective has returned."""
    return min(storages_now() for _ in range(6))


def storages_now():
    time.sleep(0.02)
    gc.collect()
    tensors = (o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu")
    found = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(found.values())


def counts(engine):
    gc.collect()
    kinds = [type(o).__name__ for o in gc.get_objects() if type(o).__module__.startswith("deepspeed")]
    hooks = [
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in engine.module.modules()
    ]
    return {kind: sum(name.endswith(kind) for name in kinds) for kind in KINDS} | {
        "hooks": sum(hooks),
        "bytes": storages(),
    }


def cycles(zero, method, how_often, rule):
    """Counts after the second cycle and after the last, and what the process grew by in between."""
    case = Case("freeze", zero, bf16=True)
    with process_group(recipe_of()) as ranks:
        engine, seen = make_engine(case, ALL), []
        for number in range(how_often):
            for names in CYCLE:
                engine = refreeze(engine, names, rule, method=method)
                step(engine, case, number, ranks.rank)
            if number in (1, how_often - 1):
                seen.append((counts(engine), psutil.Process().memory_info().rss))
        (early, small), (late, large) = seen
        return early, late, (large - small) / 2**20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("zero", "method", "how_often", "rule"),
    [("zero1", "auto", 34, "keep"), ("zero2", "auto", 34, "clear"), ("zero3", "auto", 34, "offload"),
     ("zero1", "anew", 7, "offload"), ("zero2", "anew", 7, "keep"), ("zero3", "anew", 7, "keep")],
)  # fmt: skip
def test_a_hundred_refreezes_leak_nothing(zero, method, how_often, rule):
    """RSS: less than 6 MiB over 96 refreezes (upstream: 6 to 10 MiB each)."""
    for early, late, growth in run_ranks(cycles, zero, method, how_often, rule, timeout=280):
        assert late == early
        assert late["DeepSpeedEngine"] == 1
        assert growth < 6


def old_wrappers(zero):
    """Whether the old wrapper dies at the switch, by itself: on a GPU its buffers would wait for the collector."""
    case, dead = Case("freeze", zero, bf16=True), []
    with process_group(recipe_of()) as ranks:
        engine = make_engine(case, ALL)
        for number, names in enumerate(CYCLE):
            step(engine, case, number, ranks.rank)
            old = weakref.ref(engine.optimizer)
            gc.disable()
            engine = refreeze(engine, names)
            gc.enable()
            dead.append(old() is None)
        return dead


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_the_old_wrapper_is_gone_at_once(zero):
    assert run_ranks(old_wrappers, zero) == [[True] * 3] * 2


def all_held_bytes(zero):
    with process_group(recipe_of()) as ranks:
        return {(bf16, rule): held_bytes(ranks, zero, bf16, rule) for bf16 in (False, True) for rule in RULES}


def held_bytes(ranks, zero, bf16, rule):
    """All live bytes beyond those before the engine, after each switch, before any further step."""
    case, found = Case("freeze", zero, bf16=bf16), []
    before = storages()
    engine = make_engine(case, ALL)
    step(engine, case, 0, ranks.rank)
    for number, names in enumerate(CYCLE * 2):
        engine = refreeze(engine, names, rule)
        found.append(storages() - before)
        step(engine, case, number, ranks.rank)
    return found


def closed_form(zero, bf16, rule, trained, ever, cleared):
    """Weights; masters and two moments of what trains (4 bytes each, over the ranks); what is parked by the rule.

    `cleared`: of what trains, what has no moments yet."""
    stage, lp = int(zero[4]), 2 if bf16 else 4
    share = 2 if stage else 1
    master = 0 if stage == 0 and not bf16 else 4
    weights = lp * sum(NUMEL.values()) / (2 if stage == 3 else 1)
    live = (master * sum(NUMEL[n] for n in trained) + 8 * sum(NUMEL[n] for n in trained if n not in cleared)) / share
    gone = sum(NUMEL[n] for n in ever if n not in trained)
    parked = ((4 if bf16 else 0) + (0 if rule == "clear" else 8)) * gone / share
    if stage == 3:  # gradients of what trains, and the reduce bucket of `config_of`
        live += lp * (sum(NUMEL[n] for n in trained) / share + 4096)
    return weights + live + parked


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_memory_is_that_of_the_set(zero):
    """No flat buffer of an old set stays: within 4 KiB (padding, step counts, the model's own buffers)."""
    held, _ = run_ranks(all_held_bytes, zero, timeout=200)
    for (bf16, rule), measured in held.items():
        before = set(ALL)
        for number, (names, found) in enumerate(zip(CYCLE * 2, measured, strict=True)):
            fresh = set(names) - before if rule == "clear" else set()
            expected = closed_form(zero, bf16, rule, names, ALL, fresh)
            assert abs(found - expected) < 4096, (bf16, rule, number, found, expected)
            before = set(names)


def interval_one(zero):
    """One step per set; between the sets, a forward pass without gradients and a generation."""
    case = Case("freeze", zero)
    results = []
    with process_group(recipe_of()) as ranks:
        for between in (False, True):
            engine, moved = make_engine(case, names_of(0)), []
            weights = full_weights(engine)
            for number in range(8):
                if number:
                    engine = refreeze(engine, names_of(number % 4))
                if between:
                    with torch.no_grad():
                        loss_of(engine, number, ranks.rank, 0, case)
                        prompt = torch.ones(1, 2, dtype=torch.long)
                        engine.module.generate(
                            prompt, max_new_tokens=2, do_sample=False, pad_token_id=0, synced_gpus=zero == "zero3"
                        )
                step(engine, case, number, ranks.rank)
                now = full_weights(engine)
                moved.append({n for n in now if not torch.equal(now[n], weights[n])} == set(names_of(number % 4)))
                weights = now
            results.append((moved, weights))
    (moved, plain), (also, interrupted) = results
    return moved, also, [n for n in plain if not torch.equal(plain[n], interrupted[n])]


@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_every_step_moves_exactly_the_active_layer(zero):
    """peers.md row 34: elsewhere the first step after a switch did nothing. Generation and evaluation change nothing."""
    assert run_ranks(interval_one, zero) == [([True] * 8, [True] * 8, [])] * 2
