"""What goes wrong on two ranks: an error that names the mistake, on every rank, and never a hang."""

from __future__ import annotations

import os
import time

import pytest
from forks import RanksFailed, outcomes_of, run_ranks
from tiny import phase_of, recipe_of, train_steps
from zero_kit import make_zero

from dsfreeze.engine.process import process_group
from dsfreeze.errors import UserError
from dsfreeze.plan import Phase


def diverge(name, sets):
    with process_group(recipe_of()) as ranks:
        make_zero(sets[ranks.rank], name)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
@pytest.mark.parametrize("sets", [(["layers.2"], ["layers.1"]), (["layers.2"], ["layers.2", "layers.3"])])
def test_ranks_that_disagree_are_an_error_on_every_rank(name, sets):
    """Oracle: DeepSpeed itself trains the first pair silently wrong at stages 0 to 2, and hangs at 3."""
    for outcome in outcomes_of(diverge, name, sets, timeout=30):
        assert outcome.error == "UserError"
        assert "disagree about which tensors train" in outcome.text


def mistakes(name):
    with process_group(recipe_of()):
        engine = make_zero(None, name)
        anatomy = engine.anatomy
        with pytest.raises(UserError, match="every tensor is frozen"):
            engine.enter(Phase(0, None, ()))
        engine.enter(phase_of(anatomy, "bottom"))
        engine.module.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
        with pytest.raises(UserError, match="behind the plan's back"):
            train_steps(engine, 0, 1)


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_mistakes_are_errors_on_every_rank(name):
    run_ranks(mistakes, name)


def accumulate_in_fp32():
    with process_group(recipe_of()):
        engine = make_zero(None, "zero1", bf16=True)
        engine.config["data_types"] = {"grad_accum_dtype": "fp32"}
        with pytest.raises(UserError, match="Use stage 2"):
            engine.enter(phase_of(engine.anatomy, "bottom"))


def test_full_fp32_gradients_are_refused():
    run_ranks(accumulate_in_fp32)


def local_twice():
    with process_group(recipe_of("local")):
        pass


def test_a_local_recipe_runs_in_one_process():
    for outcome in outcomes_of(local_twice):
        assert outcome.error == "UserError"
        assert "zero0" in outcome.text


def die(rank_that_fails):
    with process_group(recipe_of()) as ranks:
        engine = make_zero("bottom", "zero2")
        if ranks.rank == rank_that_fails:
            raise OSError("disk gone")
        train_steps(engine, 0, 100)


@pytest.mark.slow
def test_one_rank_that_fails_ends_the_others():
    """Oracle: nothing hangs: the other rank notices the closed connection."""
    outcomes = outcomes_of(die, 1, timeout=40)
    assert outcomes[1].error == "OSError"
    assert outcomes[0].kind in ("error", "died")


# -- the runner itself -----------------------------------------------------------------------------------------------


def misbehave():
    if os.environ["RANK"] == "0":
        os._exit(3)
    time.sleep(60)


@pytest.mark.slow
def test_the_runner_reports_deaths_and_hangs():
    with pytest.raises(RanksFailed) as caught:
        run_ranks(misbehave, timeout=4)
    assert [o.kind for o in caught.value.outcomes] in (["died", "hung"], ["died", "died"])
