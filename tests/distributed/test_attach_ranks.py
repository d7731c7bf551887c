"""`attach` on a Trainer with DeepSpeed, on two ranks.

Oracles: the same training written by hand in one process of plain PyTorch, with one AdamW per tensor (attach_kit); an
uninterrupted run; transformers' linear schedule written out.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attach_kit import (
    STEPS,
    Watch,
    attached,
    gradual,
    make_trainer,
    moved,
    plan_of,
    rate_at,
    rotating,
    run_torch,
    worst,
)  # fmt: skip
from forks import outcomes_of, run_ranks
from refreeze_kit import full_weights
from safetensors.torch import load_file
from tiny import tiny_llama

from dsfreeze.engine.process import import_deepspeed
from dsfreeze.model import base_hash

pytestmark = pytest.mark.slow


def config_of(stage, **sections):
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 4096}
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, **dict.fromkeys(automatic, "auto"), "bf16": {"enabled": "auto"}, **sections}


#: DeepSpeed's own optimizer and schedule, by transformers' arguments.
OWN = {
    "optimizer": {"type": "AdamW", "params": {
        "lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {"type": "WarmupDecayLR", "params": {
        "warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto", "total_num_steps": "auto",
        "warmup_type": "linear"}},
}  # fmt: skip


class WatchEngine(Watch):
    """Weights from the engine's shards, and every group's learning rate as DeepSpeed's optimizer has it."""

    trainer = None

    def on_step_begin(self, args, state, control, **_):
        self.rates.append([group["lr"] for group in self.trainer.model_wrapped.basic_optimizer.param_groups])

    def on_step_end(self, args, state, control, **_):
        self.weights.append(full_weights(self.trainer.model_wrapped))


def start(folder, maker, config, **options):
    """A trainer as a script would make it; several in one process need accelerate's singletons made anew."""
    from accelerate.state import AcceleratorState

    import_deepspeed()  # without the op that it would compile for communication on CPUs
    AcceleratorState._reset_state()
    watch = WatchEngine()
    options = {"batch": 2, **options}
    trainer, _, plan = attached(folder, maker, watch=watch, deepspeed=config, **options)
    watch.trainer = trainer
    return trainer, watch, plan


def train(folder, maker, config, resume=None, **options):
    trainer, watch, _ = start(folder, maker, config, **options)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert trainer.optimizer.optimizer is trainer.model_wrapped.optimizer
    weights, rates = watch.weights, watch.rates
    trainer.model_wrapped.destroy()
    return weights, rates


def many(cases):
    return [train(*case) for case in cases]


def check_run(weights, rates, plan, truth, tolerance):
    before = dict(tiny_llama().named_parameters())
    assert len(weights) == len(rates) == STEPS
    for step, (now, true) in enumerate(zip(weights, truth, strict=True)):
        assert worst(now, true) < tolerance, step
        assert rates[step] == pytest.approx([rate_at(step)] * len(rates[step])), step
        if step:  # the warm-up's first rate is zero
            assert moved(before, now) == set(plan.phase_at(step).trainable), step
        before = now


def cleared(model):
    return rotating(model, state="clear")


def offloaded(model):
    return rotating(model, state="offload")


def test_equals_plain_torch(tmp_path):
    """Row 6: gradual unfreezing at every stage, and one layer at a time by each rule; the same as without DeepSpeed."""
    makers = [(stage, maker) for stage in (2, 3) for maker in (gradual, rotating, cleared, offloaded)]
    makers += [(0, rotating), (1, rotating)]
    cases = [(str(tmp_path), maker, config_of(stage)) for stage, maker in makers]
    for results in run_ranks(many, cases, timeout=200):
        for (stage, maker), (weights, rates) in zip(makers, results, strict=True):
            plan = maker(tiny_llama())
            check_run(weights, rates, plan, run_torch(plan), 1e-5 if stage == 3 else 1e-6)


def with_own_optimizer(folder):
    from accelerate.state import AcceleratorState

    weights, rates = train(folder, rotating, config_of(2, **OWN))
    AcceleratorState._reset_state()
    alone = WatchEngine()
    alone.trainer = make_trainer(folder, tiny_llama(), batch=2, deepspeed=config_of(2, **OWN), callbacks=[alone])
    alone.trainer.train()
    return weights, rates, alone.rates


def test_deepspeeds_own_optimizer_and_scheduler(tmp_path):
    """Every group has the rate that a trainer without a plan has at that step, though groups come and go (row 35)."""
    plan = rotating(tiny_llama())
    for weights, rates, alone in run_ranks(with_own_optimizer, str(tmp_path), timeout=100):
        assert len({groups[0] for groups in alone}) > 5
        for step, (mine, theirs) in enumerate(zip(rates, alone, strict=True)):
            assert mine == pytest.approx([theirs[0]] * len(mine)), step
        for step in range(3, STEPS):
            assert moved(weights[step - 1], weights[step]) == set(plan.phase_at(step).trainable), step


def with_accumulation(folder):
    return [train(folder, rotating, config_of(stage), batch=1, accumulation=2, max_grad_norm=0.1) for stage in (2, 3)]


def test_with_accumulation_and_clipping(tmp_path):
    """A step's micro-batches are dealt to the ranks in turn; the oracle takes the four examples at once."""
    plan = rotating(tiny_llama())
    truth = run_torch(plan, clip=0.1)
    for results in run_ranks(with_accumulation, str(tmp_path), timeout=100):
        for (weights, rates), tolerance in zip(results, (1e-6, 1e-5), strict=True):
            check_run(weights, rates, plan, truth, tolerance)


def from_shards(folder):
    """A model that ZeRO-3 has cut up before the trainer sees it, as `from_pretrained` does under the trainer."""
    import deepspeed

    whole, model = base_hash(tiny_llama()), tiny_llama()
    config = {**config_of(3), "train_micro_batch_size_per_gpu": 2}
    for key in ("gradient_accumulation_steps", "gradient_clipping", "bf16"):
        config.pop(key)
    deepspeed.zero.Init(module=model, config_dict_or_path=config)
    trainer, watch, _ = start(folder, rotating, config_of(3), model=model, save_strategy="steps", save_steps=5)
    assert trainer._dsfreeze.checkpoints.base.hash == whole
    assert {t.name: t.shape for t in trainer._dsfreeze.anatomy.tensors} == {
        n: tuple(p.shape) for n, p in tiny_llama().named_parameters()
    }
    trainer.train()
    return watch.weights, watch.rates


def test_a_model_that_is_cut_up_already(tmp_path):
    plan = rotating(tiny_llama())
    for weights, rates in run_ranks(from_shards, str(tmp_path), timeout=100):
        check_run(weights, rates, plan, run_torch(plan), 1e-5)


# -- checkpoints -------------------------------------------------------------------------------------------------------


def away_and_back(model):
    """A layer that is parked when the checkpoint is written, and comes back after it."""
    return plan_of(model, ("layers.3", "head"), ("layers.1", "head"), ("layers.3",))


def save_and_resume(folder, stages, stops, bf16=False):
    results = []
    for stage in stages:
        place = Path(folder) / str(stage)
        saving = {"save_strategy": "steps", "save_steps": 1}
        whole, rates = train(place / "a", away_and_back, config_of(stage), bf16=bf16, **saving)
        for stop in stops:
            from_here = place / "a" / f"checkpoint-{stop}"
            again, later = train(place / f"b{stop}", away_and_back, config_of(stage), from_here, bf16=bf16)
            results.append((stage, stop, whole[stop:], rates[stop:], again, later))
    return results


@pytest.mark.parametrize("bf16", [False, True])
def test_resume_equals_the_uninterrupted_run(bf16, tmp_path):
    """At both ends of the second phase and in its middle (row 15); the folder holds what was trained (rows 12, 13)."""
    for results in run_ranks(save_and_resume, str(tmp_path), (2, 3), (3, 5, 6), bf16, timeout=200):
        for stage, stop, whole, rates, again, later in results:
            assert len(again) == STEPS - stop
            assert all(moved(true, mine) == set() for true, mine in zip(whole, again, strict=True)), (stage, stop)
            assert [set(r) for r in later] == [set(r) for r in rates]
    plan = away_and_back(tiny_llama())
    for stage in (2, 3):
        kinds = {key.rpartition("/")[2] for key in load_file(tmp_path / f"{stage}/a/checkpoint-5/state.safetensors")}
        assert kinds == {"exp_avg", "exp_avg_sq", "step"} | ({"master"} if bf16 else set())
        folder = tmp_path / str(stage) / "a" / "checkpoint-5"
        assert set(load_file(folder / "weights.safetensors")) == plan.ever_trained
        names = {path.name for path in folder.iterdir()}
        assert not [n for n in names if n.startswith(("global_step", "model", "pytorch_model", "optimizer", "zero_to"))]


def resume_elsewhere(folder):
    from_here = Path(folder) / "2" / "a" / "checkpoint-5"
    return train(Path(folder) / "c", away_and_back, config_of(3), from_here)[0]


@pytest.mark.slow
def test_resume_at_another_stage_on_another_number_of_ranks(tmp_path):
    """ZeRO-2 on two ranks, gone on with at ZeRO-3 on one; half the examples a step, so only who moves is compared."""
    run_ranks(save_and_resume, str(tmp_path), (2,), (), timeout=100)
    ((*_, last),) = (run_ranks(resume_elsewhere, str(tmp_path), world_size=1, timeout=100),)
    plan = away_and_back(tiny_llama())
    assert moved(dict(tiny_llama().named_parameters()), last[-1]) == plan.ever_trained


def resume_with_another_plan(folder):
    trainer, _, _ = start(folder, lambda m: plan_of(m, ("layers.2",)), config_of(2))
    trainer.train(resume_from_checkpoint=str(Path(folder) / "2" / "a" / "checkpoint-5"))


def test_another_plan_is_refused_on_every_rank(tmp_path):
    """Row 14."""
    run_ranks(save_and_resume, str(tmp_path), (2,), (), timeout=100)
    for outcome in outcomes_of(resume_with_another_plan, str(tmp_path), timeout=100):
        assert outcome.error == "UserError"
        assert "layers.3" in outcome.text
        assert "layers.2" in outcome.text


# -- refusals ----------------------------------------------------------------------------------------------------------


def two_plans(folder):
    from dsfreeze.engine.ranks import read_ranks

    layer = f"layers.{read_ranks().rank}"
    start(folder, lambda m: plan_of(m, (layer,)), config_of(2))


def test_ranks_with_different_plans_are_refused(tmp_path):
    """Row 22: an error on every rank, before DeepSpeed sees either set."""
    for outcome in outcomes_of(two_plans, str(tmp_path), timeout=60):
        assert outcome.error == "UserError"
        assert "disagree about the freeze plan" in outcome.text


def without_deepspeed(folder):
    attached(folder, gradual, batch=2, ddp_backend="gloo")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_moving_plan_under_ddp_is_refused(world_size, tmp_path):
    """Of one rank too, where transformers uses DDP as well once a launcher has set LOCAL_RANK."""
    for outcome in outcomes_of(without_deepspeed, str(tmp_path), world_size=world_size, timeout=60):
        assert outcome.error == "UserError"
        assert "moving plan under DDP" in outcome.text
