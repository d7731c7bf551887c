"""Bytes that a step sends, against the collectives that DeepSpeed really starts on two gloo ranks."""

from __future__ import annotations

import pytest
from collectives import carried, counted
from forks import run_ranks
from planned_kit import BARE, PROPORTIONAL, TIGHT, planned
from tiny import examples, micro_batches, recipe_of, train_steps

from dsfreeze.engine.process import process_group
from dsfreeze.estimate.communication import communication, elements
from dsfreeze.estimate.gathering import Limits

W = 2
CHOICES = ("full", "bottom", "interval", "norms", "lora", "one matrix")
#: what stays gathered: small tensors and what comes again within a distance; small tensors and, of a toy, all (as shipped)
NEAR = {**TIGHT, "stage3_param_persistence_threshold": 1500, "stage3_max_reuse_distance": 25_000}
SHIPPED = {"stage3_param_persistence_threshold": 100}
PAIRS = {"bf16": True, "gradient_accumulation_steps": 2}


def step_of(engine, accumulation):
    """The collectives of one step's passes, and of its update, after two passes in which stage 3 records its trace."""
    train_steps(engine, 0, 2 // accumulation if engine.stage == 3 else 1, accumulation=accumulation)
    with counted() as passes:
        for batch, weight in micro_batches(examples(3), engine.rank, W, accumulation):
            engine.forward_backward(batch, weight)
    with counted() as update:
        engine.step(1e-2)
    return passes, update


def compare(cases):
    """By case, the bytes counted and estimated: of gradients, of weights for the passes, of weights after the update."""
    found = []
    with process_group(recipe_of()):
        for choice, name, zero, train in cases:
            engine, plan, anatomy = planned(choice, name, zero, **train)
            accumulation = train.get("gradient_accumulation_steps", 1)
            passes, update = step_of(engine, accumulation)
            sizes = elements(
                anatomy, plan.phases[0].trainable, Limits.of(engine.config),
                checkpointing=train.get("gradient_checkpointing", False),
            )  # fmt: skip
            priced = communication(
                sizes, stage=engine.stage, world_size=W, dtype_bytes=engine.dtype.itemsize, accumulation=accumulation
            )
            assert not [c for c in passes + update if c.operation not in ("all_reduce", "all_gather", "reduce_scatter")]
            # over two ranks a ring sends all of what it reduces everywhere, and half of what it gathers or scatters
            real = (
                carried(passes, "all_reduce") + carried(passes, "reduce_scatter") // 2,
                carried(passes, "all_gather") // 2,
                carried(update, "all_gather") // 2,
            )
            estimated = (
                priced.gradients,
                priced.forward_weights + priced.backward_weights,
                priced.updated_weights + priced.persistent_weights,
            )
            assert sum(estimated) == priced.sent
            found.append((real, estimated))
            engine.close()
    return found


@pytest.mark.slow
def test_gradients_and_updated_weights():
    """Oracle: DeepSpeed's calls, to the byte, since every tensor here divides by the ranks. Frozen tensors are in none of
    them; with two micro-steps stage 2 reduces twice, stages 0 and 1 once."""
    cases = [(choice, f"zero{stage}", {}, PAIRS) for choice in CHOICES[:-1] for stage in range(3)]
    cases += [("bottom", f"zero{stage}", {}, {}) for stage in range(3)]
    for case, (real, estimated) in zip(cases, run_ranks(compare, cases, timeout=120)[0], strict=True):
        assert real == estimated, case
        assert real[0] > 0, case


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "recomputing"])
def test_what_stage_3_gathers(checkpointing):
    """Oracle: DeepSpeed's calls, to the byte, where all is released at once, with what a distance or a small size keeps, and
    with the shipped limits; adapters to 0.5 % (seen: 0.3 %), since peft reads lora_A outside of its own module."""
    train = {"gradient_checkpointing": checkpointing}
    cases = [(choice, "zero3", NEAR, train) for choice in CHOICES]
    cases += [(choice, "zero3", BARE, {**train, "bf16": True}) for choice in CHOICES]
    cases += [("norms", "zero3", SHIPPED, train), ("bottom", "zero3", SHIPPED, {**train, **PAIRS})]
    for case, (real, estimated) in zip(cases, run_ranks(compare, cases, timeout=120)[0], strict=True):
        assert real[0] == estimated[0], case
        assert real[2] == estimated[2], case
        assert real[1] == pytest.approx(estimated[1], rel=0.005 if case[0] == "lora" else 0), case


@pytest.mark.slow
def test_what_prefetching_gathers():
    """Oracle: DeepSpeed's calls, under limits in the proportion that the default ones have to a model of 7e9 elements, to 5 %
    (seen: equal, but 3.5 % more of frozen matrices under recomputation). A prefetch of a seventh of the model meets itself round
    the turning point; modules without tensors of their own prefetch too, which the anatomy lacks: to 10 % (seen: 9 %)."""
    recomputing = {"gradient_checkpointing": True}
    cases = [("full", {}), ("bottom", {}), ("norms", {}), ("full", recomputing), ("norms", recomputing)]
    cases = [(choice, "zero3", PROPORTIONAL, train) for choice, train in cases]
    cases += [(choice, "zero3", {**BARE, "stage3_prefetch_bucket_size": 6000}, {}) for choice in ("full", "norms")]
    for case, (real, estimated) in zip(cases, run_ranks(compare, cases, timeout=120)[0], strict=True):
        close = 0.1 if case[2] is not PROPORTIONAL else 0.05 if case[0] == "norms" and case[3] else 0
        assert real[1] <= estimated[1] <= (1 + close) * real[1], case
