"""`refreeze` on two ranks against the same training in one process of plain PyTorch (`run_torch`: an AdamW per tensor).

eps is 1e-2: with a small one, Adam turns the rounding by which stage 3 differs, under static plans too, into
differences. How wrong a wrong rule would be is measured by the power checks: more than 1e-3.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from forks import run_ranks
from refreeze_kit import ALL, SCHEDULES, WORLD_SIZE, Case, run_deepspeed, run_torch, worst, worst_ulps
from tiny import recipe_of

from dsfreeze.engine.process import process_group

RULES = ("keep", "clear", "offload")
STAGES = ("zero0", "zero1", "zero2", "zero3")
OFFLOAD = ("zero2_offload", "zero3_offload")


def differences(cases):
    """Of every case, its largest difference from plain PyTorch: in bf16 in units of the last place."""
    with process_group(recipe_of()):
        oracles, found = {}, []
        for case in cases:
            # what the reference does not look at: the stage, where parcels wait, how the engine is built
            micro = "zero2" if case.reduces_at_once else "zero1"
            key = replace(
                case,
                zero=micro if case.accumulation > 1 else "zero1",
                rule="clear" * (case.rule == "clear"),
                method="auto",
                fused=False,
                sections={},
            )
            weights = run_deepspeed(case)
            if repr(key) not in oracles:
                oracles[repr(key)] = run_torch(case)
            found.append((worst_ulps if case.bf16 else worst)(weights, oracles[repr(key)]))
        return found


def check(cases, bound, *, stage3=None, world_size=WORLD_SIZE):
    """Every rank's difference is at most `bound`; at stage 3 `stage3`."""
    results = run_ranks(differences, cases, world_size=world_size, timeout=200)
    for case, *found in zip(cases, *results, strict=True):
        limit = stage3 if stage3 is not None and case.zero.startswith("zero3") else bound
        assert max(found) <= limit, (case, found)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "odd"])
def test_exact(schedule):
    check([Case(schedule, zero, rule, steps=20) for zero in STAGES for rule in RULES], 0.0, stage3=1e-5)


def test_exact_in_short():
    cases = [Case("through layers", zero, rule, steps=9) for zero, rule in zip(STAGES, ("keep", *RULES), strict=True)]
    check(cases, 0.0, stage3=1e-5)


@pytest.mark.slow
def test_clipping_accumulation_and_offload():
    cases = [Case("through layers", zero, "clear", clip=0.05, accumulation=2, steps=18) for zero in (*STAGES, *OFFLOAD)]
    cases += [Case("back and forth", zero, rule, steps=13) for zero in OFFLOAD for rule in ("keep", "offload")]
    cases += [Case("rotate", "zero3_offload", "offload", steps=12, sections={"offload_param": {"device": "cpu"}})]
    check(cases, 1e-6, stage3=1e-5)


@pytest.mark.slow
def test_bf16():
    """In units of the last place of the weights; the masters are looked at in test_refreeze_readers."""
    rules = [("rotate", "keep", False), ("through layers", "offload", False), ("back and forth", "clear", True)]
    cases = [Case(s, zero, rule, bf16=True, drop_master=d, steps=18) for zero in STAGES for s, rule, d in rules]
    cases += [Case("through layers", zero, "clear", bf16=True, accumulation=2, steps=18) for zero in STAGES[1:]]
    cases += [Case("rotate", zero, "offload", bf16=True, steps=12) for zero in OFFLOAD]
    check(cases, 1.0)


@pytest.mark.slow
def test_raw_options():
    sections = [
        ("zero1", {"round_robin_gradients": True}),
        ("zero2", {"round_robin_gradients": True, "overlap_comm": True}),
        ("zero1", {"contiguous_gradients": False}),
        ("zero2", {"contiguous_gradients": False, "reduce_scatter": False}),
        ("zero2", {"parameter_alignment": True}),  # older DeepSpeeds ignore it
        ("zero3", {"sub_group_size": 500, "stage3_param_persistence_threshold": 1000}),
        ("zero3", {"stage3_param_persistence_threshold": 100000, "stage3_prefetch_bucket_size": 0}),
    ]
    check([Case("through layers", z, "clear", steps=18, sections=more) for z, more in sections], 0.0, stage3=1e-5)


@pytest.mark.slow
def test_mixed_groups_and_other_optimizers():
    """All tensors in one group at first; torch's fused AdamW; SGD, whose first momentum is not damped."""
    cases = [Case("through layers", zero, "keep", steps=18, mixed_groups=True) for zero in STAGES]
    cases += [Case("through layers", zero, "keep", steps=18, momentum=True) for zero in STAGES]
    check(cases, 0.0, stage3=1e-5)
    check([Case("freeze", zero, "offload", steps=10, fused=True) for zero in STAGES], 1e-6, stage3=1e-5)


@pytest.mark.slow
def test_a_tied_head_buffers_and_a_tensor_smaller_than_the_ranks():
    """A share may be empty on a rank; with one rank every share is whole. Three ranks add in another order."""
    for ranks, bound in ((1, 0.0), (2, 0.0), (3, 1e-6)):
        cases = [Case("odd", zero, rule, steps=14, world_size=ranks) for zero in STAGES for rule in ("keep", "clear")]
        check(cases, bound, stage3=1e-6, world_size=ranks)


@pytest.mark.slow
def test_built_anew():
    """The fallback passes the same."""
    cases = [Case(s, z, r, steps=13, method="anew") for z in STAGES for s, r in zip(SCHEDULES, RULES * 2, strict=False)]
    check(cases, 0.0, stage3=1e-5)


@pytest.mark.slow
def test_built_anew_in_bf16_and_with_offload():
    cases = [Case("through layers", zero, "keep", steps=13, bf16=True, method="anew") for zero in STAGES]
    cases += [Case("rotate", zero, rule, steps=12, bf16=True, method="anew") for zero in OFFLOAD for rule in RULES[1:]]
    cases += [Case("rotate", "zero2", "clear", drop_master=True, steps=12, bf16=True, method="anew")]
    mixed = {"round_robin_gradients": True}  # DeepSpeed's public reader of masters does not heed it
    cases += [Case("through layers", "zero1", "keep", steps=13, bf16=True, method="anew", sections=mixed)]
    check(cases, 1.0)


def wrong_rules():
    with process_group(recipe_of()):
        base = Case("back and forth", "zero2", "keep")
        weights = run_deepspeed(base)
        SCHEDULES["never"] = {0: ALL}
        return [
            worst(weights, run_torch(base)),
            worst(weights, run_torch(replace(base, rule="clear"))),
            worst(weights, run_torch(replace(base, schedule="never"))),
        ]


@pytest.mark.slow
def test_the_comparison_can_tell():
    """Power: moments dropped instead of kept, or another schedule, differ by far more than any bound above."""
    for right, cleared, static in run_ranks(wrong_rules):
        assert right == 0.0
        assert cleared > 1e-3
        assert static > 1e-3
