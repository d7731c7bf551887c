"""What notebooks say of plans, memory, speed and scale. Oracles: closed forms, the planner's own prices, the committed benchmarks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from notebook_kit import run_record

from dsfreeze.errors import UserError
from dsfreeze.estimate import estimate
from dsfreeze.notebook import memory, plans, scaling, throughput
from dsfreeze.planner.study import Study, run_study
from dsfreeze.planner.sweep import STRATEGIES, plans_of
from dsfreeze.recipe import FreezeOptions
from dsfreeze.record import read_object
from dsfreeze.setting import Workload
from dsfreeze.strategies import make_plan

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MODEL = "smollm2-135m"
ANATOMY = plans.anatomy_of(MODEL)


def chosen(*names: str):
    return plans_of(ANATOMY, {name: STRATEGIES[name] for name in names}, None)[0]


# -- plans ---------------------------------------------------------------------------------------------------------


def test_a_model_that_nobody_knows():
    with pytest.raises(UserError, match="`dsfreeze models` lists"):
        plans.anatomy_of("no-such-model")


def test_every_element_is_counted_once():
    assert sum(row["elements"] for row in plans.anatomy_rows(ANATOMY)) == ANATOMY.numel
    assert "30 transformer layers" in plans.anatomy_finding(ANATOMY)


def test_states_of_a_bottom_plan():
    """Bottom 50 % of 30 layers: embedding and 15 layers are the prefix."""
    rows = plans.state_rows(ANATOMY, chosen("bottom 50 %"))
    states = {row["layer"]: row["state"] for row in rows}
    assert [states[f"layers.{n}"] for n in (0, 14, 15, 29)] == ["prefix", "prefix", "trainable", "trainable"]


def test_phases_tile_the_run():
    plan = make_plan(ANATOMY, FreezeOptions(strategy="lisa"), 50)
    rows = [row for row in plans.phase_rows(ANATOMY, plan, 50) if row["layer"] == "layers.0"]
    assert rows[0]["first_step"] == 0
    assert rows[-1]["last_step"] == 49
    assert all(one["last_step"] + 1 == other["first_step"] for one, other in pairwise(rows))


def test_prices_are_the_estimates():
    row = plans.price_rows(ANATOMY, chosen("bottom 50 %"), sequence_length=128, num_steps=9)[0]
    cost = estimate(ANATOMY, chosen("bottom 50 %")["bottom 50 %"], stage=0, dtype_bytes=2, sequence_length=128)
    assert (row["trainable"], row["moments"]) == (cost.trainable, cost.optimizer_state)
    assert row["flops_percent"] == pytest.approx(100 * cost.flops_ratio)


def test_plans_that_train_alike_but_cost_otherwise():
    def row(plan, percent, flops):
        return {"plan": plan, "percent": percent, "flops_percent": flops}

    full, low, high = row("full", 100, 100), row("low", 50, 67), row("high", 52, 83)
    assert "low (50 % of the parameters) costs 67 %" in plans.price_finding([full, high, low])
    assert "about the same" in plans.price_finding([full, low, row("like", 50, 68)])
    assert plans.price_finding([full, low]) == "No two of these 2 plans train alike many parameters."


def test_plans_that_move():
    found, _ = plans_of(ANATOMY, {"gradual": {"strategy": "gradual_unfreezing"}, "full": {"strategy": "full"}}, 300)
    assert "gradual trains at most" in plans.moving_finding(ANATOMY, found)
    assert "full trains at most 100 % of the parameters at once and 100 % over the whole run" in plans.moving_finding(ANATOMY, found)  # fmt: skip
    assert plans.moving_finding(ANATOMY, {}) == "None of these plans moves."


def test_a_run_whose_tensors_are_another_models_is_not_drawn(tmp_path):
    """The toy plan trains tensors `a` and `b`, which the recipe's model does not have."""
    with pytest.raises(UserError, match="'smollm2-135m' for"):
        plans.plan_of_run(run_record(tmp_path))


# -- memory --------------------------------------------------------------------------------------------------------


def test_items_add_up_to_the_price():
    costs = memory.costs_of(MODEL, chosen("full", "bottom 50 %"), Workload(), sequence_length=256)
    rows = memory.item_rows(costs, (0, 3), 8)
    for plan, cost in costs.items():
        for stage in (0, 3):
            price = cost.at(stage, 8)
            own = [row for row in rows if (row["plan"], row["stage"]) == (plan, stage)]
            assert sum(row["bytes"] for row in own) == sum(price.items.values())
            assert own[0]["peak"] == price.peaks.most
    assert memory.item_finding(rows, 8).startswith("On 8 devices, at ZeRO 0 bottom 50 % peaks at")


def test_what_sharing_leaves_to_freezing():
    def rows(*peaks):
        pairs = [(plan, stage) for stage in (0, 3) for plan in ("full", "half")]
        return [{"plan": plan, "stage": stage, "percent": 100 if plan == "full" else 50, "peak": peak} for (plan, stage), peak in zip(pairs, peaks, strict=True)]  # fmt: skip

    assert memory.item_finding(rows(100, 40, 50, 40), 8) == (
        "On 8 devices, at ZeRO 0 half peaks at 40 % of full, at ZeRO 3 half peaks at 80 % of full: the more is shared, the less freezing saves."
    )
    assert memory.item_finding(rows(100, 40, 50, 10), 8).endswith("sharing more leaves freezing no less to save.")


def test_states_of_the_benchmark():
    rows = memory.counted_rows(read_object(BENCHMARKS / "state_bytes.json"))
    assert "to the byte" in memory.counted_finding(rows)
    rows[3]["counted"] += 7
    assert memory.counted_finding(rows).startswith(f"1 of {len(rows)} figures differ from the formula's")


def test_activations_of_the_benchmark():
    """Oracle: the benchmark's own errors."""
    record = read_object(BENCHMARKS / "planner.json")
    rows = memory.activation_rows(record)
    told = [plan["activation_error_percent"] for shape in record["shapes"].values() for plan in shape.values()]
    found = [100 * (row["predicted"] / row["measured"] - 1) for row in rows]
    assert found == pytest.approx(told, abs=0.06)


# -- speed ---------------------------------------------------------------------------------------------------------


def test_promises_against_steps():
    rows = [
        {"plan": "full", "faster": 1.0, "promised": 1.0},
        {"plan": "a", "faster": 1.8, "promised": 2.0},
        {"plan": "b", "faster": 3.3, "promised": 3.0},
    ]
    assert throughput.speed_finding(rows) == (
        "Measured steps are 0.90 (a) to 1.10 (b) of what FLOPs promise; the fastest plan, b, is 3.30 times as fast as full tuning."
    )
    assert throughput.speed_finding(rows[:1]).startswith("No plan here promises")


@pytest.mark.parametrize("name", ["step_time", "prefix_cache"])
def test_the_benchmarks_of_steps_are_read(name):
    rows = throughput.speed_rows(read_object(BENCHMARKS / f"{name}.json"))
    assert rows[0]["plan"] == "full"
    assert all(row["q1"] <= row["faster"] <= row["q3"] for row in rows)


def test_a_cache_gains_from_the_second_epoch_on():
    """Twice as fast without, four times with: 1 epoch 1/2 of full's time, 3 epochs 1/2 + 2/4 of three."""
    rows = throughput.epoch_rows(2.0, 4.0, 3)
    found = {(row["epochs"], row["way"]): row["faster"] for row in rows}
    assert found[1, "prefix cached"] == found[1, "computed anew"] == pytest.approx(2)
    assert found[3, "computed anew"] == pytest.approx(2)
    assert found[3, "prefix cached"] == pytest.approx(3)
    assert "a run of 3 epochs becomes 1.50 times as fast with it (from measured steps)." in throughput.epoch_finding(
        rows
    )
    assert "no faster with it" in throughput.epoch_finding(throughput.epoch_rows(2.0, 2.0, 3))
    real = {"epochs": 5, "computed": 2.0, "cached": 3.0}
    assert "whole runs of 5 epochs really became 1.50 times as fast" in throughput.epoch_finding(rows, real)


def test_bandwidths_and_where_they_fall_short():
    rows = throughput.bandwidth_rows([MODEL], 0.5, ["h100"])
    assert {row["tier"] for row in rows} == {"memory", "disk"}
    for row in rows:
        assert (row["pays_from_epoch"] is not None) == (row["has"] > row["needed"])
    slow = [{**rows[0], "tier": "disk", "pays_from_epoch": None}]
    assert "it never does for smollm2-135m from disk on h100" in throughput.bandwidth_finding([*rows, *slow])
    assert "in all 1 cases" in throughput.bandwidth_finding([{**rows[0], "pays_from_epoch": 2}])


# -- scale ---------------------------------------------------------------------------------------------------------


def test_a_study_and_the_benchmarks_record_of_one_are_read_alike(tmp_path):
    """Oracle: the benchmark's own condensing of the same study, whose figures have four digits."""
    benchmark = read_object(BENCHMARKS / "scaling.json")
    given = {**benchmark["study"], "models": [MODEL], "gpus": [1, 2], "output_dir": tmp_path / "study"}
    whole = scaling.cluster_rows(run_study(Study.model_validate(given)))
    condensed = [row for row in scaling.cluster_rows(benchmark) if row["model"] == MODEL]
    for one, other in zip(whole, condensed, strict=True):
        assert (one.pop("model"), one.pop("strategy")) == (other.pop("model"), other.pop("strategy"))
        assert one == pytest.approx(other, rel=1e-3)


def test_a_cluster_that_freezing_shrinks():
    def row(strategy, gpus, hours, model="m", parameters=2e9):
        return {"model": model, "parameters": parameters, "strategy": strategy, "gpus": gpus, "gpu_hours": hours}

    small = row("full", 1, 1.0, "s", 1e9)
    told = scaling.cluster_finding([small, row("full", 16, 100.0), row("bottom 0.5", 8, 60.0), row("lora", 2, 80.0)])
    assert told == (
        "By formula full tuning of m needs 16 devices; lora needs 2, and bottom 0.5 takes the fewest device-hours, 60 % of full tuning's."
    )
    assert "no cluster tried holds full tuning" in scaling.cluster_finding(
        [row("full", None, None), row("lora", 2, 80.0)]
    )
    assert "No cluster that was tried holds m" in scaling.cluster_finding([row("full", None, None)])


@pytest.mark.parametrize("study", [{}, {"plans": [{}]}, {"plans": 3}])
def test_what_is_no_study_is_named(study):
    with pytest.raises(UserError, match="This is no study"):
        scaling.cluster_rows(study)


def test_longer_sequences_take_more_and_end_somewhere():
    rows = scaling.length_rows("llama-3-8b", {"full": {"strategy": "full"}}, [1024, 4096, 2**22], device="h100", gpus=8)
    assert [row["fits"] for row in rows] == [True, True, False]
    assert rows[0]["peak"] < rows[1]["peak"] < rows[2]["peak"]
    assert scaling.length_finding(rows).endswith("full 4,096.")
    assert scaling.length_finding(rows[2:]).endswith("full none.")
    two = [*rows, {**rows[0], "plan": "other"}]
    assert scaling.length_finding(two).endswith("is: full 4,096, other 1,024.")
