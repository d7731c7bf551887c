"""`attach` on a Hugging Face Trainer without DeepSpeed.

Oracles: the same training written by hand in plain PyTorch with one AdamW per tensor (attach_kit); an uninterrupted run;
transformers' linear schedule written out; FLOPs by torch's counter and the figures measured for HF Trainer before.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attach_kit import (
    LR,
    STEPS,
    Watch,
    attached,
    data,
    gradual,
    make_trainer,
    moved,
    names_of,
    plan_of,
    rate_at,
    rotating,
    run_torch,
    worst,
)  # fmt: skip
from marks import some_fast
from safetensors.torch import load_file
from tiny import llama_anatomy, tiny_llama
from torch.utils.flop_counter import FlopCounterMode

from dsfreeze.errors import UserError
from dsfreeze.integrations import attach
from dsfreeze.plan import FreezePlan, Mask, Phase, Rate


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["keep", "clear", "offload"])
@pytest.mark.parametrize("maker", some_fast([rotating, gradual]))
def test_equals_plain_torch_and_moves_exactly_what_the_plan_says(maker, rule, tmp_path):
    trainer, watch, plan = attached(tmp_path, lambda m: maker(m, state=rule))
    trainer.train()
    truth, before = run_torch(plan), weights_of(tiny_llama())
    for step, (now, true) in enumerate(zip(watch.weights, truth, strict=True)):
        assert worst(now, true) < 1e-6, step
        if step:  # the warm-up's first rate is zero
            assert moved(before, now) == set(plan.phase_at(step).trainable), step
        before = now


def test_the_rules_differ_in_what_they_keep():
    """The power of the test above: with moments dropped, rotating ends elsewhere."""
    kept, cleared = (run_torch(rotating(tiny_llama(), state=rule))[-1] for rule in ("keep", "clear"))
    assert worst(kept, cleared) > 1e-4


def test_with_accumulation_and_clipping(tmp_path):
    trainer, watch, plan = attached(tmp_path, rotating, batch=2, accumulation=2, max_grad_norm=0.1)
    trainer.train()
    truth = run_torch(plan, batch=2, accumulation=2, clip=0.1)
    assert worst(watch.weights[-1], truth[-1]) < 1e-6
    assert worst(truth[-1], run_torch(plan, batch=2, accumulation=2)[-1]) > 1e-4


def test_a_static_plan_holds_state_for_its_set_alone(tmp_path):
    trainer, watch, plan = attached(tmp_path, lambda m: plan_of(m, ("layers.3", "head")))
    trainer.train()
    assert moved(weights_of(tiny_llama()), watch.weights[-1]) == plan.ever_trained
    sizes = {n: p.numel() for n, p in trainer.model.named_parameters()}
    held = sum(t.numel() for entry in trainer.optimizer.state.values() for t in entry.values() if t.dim())
    assert held == 2 * sum(sizes[name] for name in plan.ever_trained)


def test_state_exists_for_what_trains_now(tmp_path):
    trainer, _, plan = attached(tmp_path, lambda m: rotating(m, state="clear"))
    trainer.train()
    named = dict(trainer.model.named_parameters())
    assert set(trainer.optimizer.state) == {named[n] for n in plan.phase_at(STEPS).trainable}


@pytest.mark.parametrize("kind", some_fast(["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"]))
def test_every_group_has_the_schedulers_rate(kind, tmp_path):
    options = {"lr_scheduler_type": kind, "eval_strategy": "steps", "eval_steps": 2}
    trainer, watch, _ = attached(tmp_path / "a", rotating, **options)
    trainer.train()
    plain = make_trainer(tmp_path / "b", tiny_llama(), **options)
    alone = type(watch)()
    plain.add_callback(alone)
    plain.train()
    assert len(watch.rates) == STEPS
    for mine, theirs in zip(watch.rates, alone.rates, strict=True):
        assert mine == pytest.approx([theirs[0]] * len(mine))


def test_rates_of_layers_rewarmup_and_rates_of_other_steps(tmp_path):
    def maker(model):
        plan = plan_of(model, ("layers.3",), ("layers.2", "layers.3"), every=4)
        first, second = plan.phases
        rates = (Rate("layers.3", 0.5), Rate("layers.2", 1.0, ends=8))
        return replace(plan, phases=(first, replace(second, lr_step=3)), rates=rates, rewarmup_steps=1)

    trainer, watch, _ = attached(tmp_path, maker)
    trainer.train()
    different = [sorted(set(rates)) for rates in watch.rates]
    assert different[3] == pytest.approx([0.5 * rate_at(3)])
    half = 0.5 * LR  # (1 + cos(pi / 2)) / 2 at step 4 of 8, and half of it while the rates rise again
    assert different[4] == pytest.approx(sorted([0.5 * 0.5 * rate_at(3), 0.5 * half]))
    assert different[8] == pytest.approx([0.0, 0.5 * rate_at(3)])


def test_evaluation_and_dropout_of_the_prefix(tmp_path):
    """The prefix stays in eval mode through training steps; evaluation leaves everything in eval mode."""
    seen = []
    trainer, _, _ = attached(tmp_path, gradual, eval_strategy="steps", eval_steps=2)
    layers = trainer.model.model.layers
    layers[3].register_forward_hook(lambda *_: seen.append([layer.training for layer in layers]))
    trainer.train()
    training = [modes for modes in seen if any(modes)]
    assert training[0] == [False, False, False, True]
    assert training[-1] == [False, True, True, True]
    assert [False] * 4 in seen


def test_a_flag_flipped_behind_the_plan_is_an_error(tmp_path):
    trainer, watch, _ = attached(tmp_path)

    def flip(args, state, control, model, **_):
        model.model.embed_tokens.weight.requires_grad_(state.global_step == 2)

    watch.on_step_end = flip
    with pytest.raises(UserError, match=r"embed_tokens\.weight.*behind the plan's back"):
        trainer.train()


# -- gradient checkpointing --------------------------------------------------------------------------------------------


def test_backward_flops_with_gradient_checkpointing(tmp_path):
    """LM8, top 2 of 8, 4 x 128 tokens: 0.948 GF; HF Trainer alone 2.760 (peers.md, row 10)."""

    def maker(model):
        tops, middle = ("layers.6", "layers.7"), ("layers.4", "layers.5")
        return plan_of(model, tops, middle, tops, every=1)

    def run(trainer):
        counts, backward = [], trainer.accelerator.backward

        def counted(loss, **options):
            with FlopCounterMode(display=False) as counter:
                backward(loss, **options)
            counts.append(counter.get_total_flops() / 1e9)

        trainer.accelerator.backward = counted
        trainer.train()
        return counts

    def make(folder):
        model = tiny_llama(layers=8, hidden=128, vocab=64)
        trainer = make_trainer(tmp_path / folder, model, steps=3, gradient_checkpointing=True)
        trainer.train_dataset = data(12, length=128, vocab=64)
        return trainer, model

    trainer, model = make("a")
    top, middle, back = run(attach(trainer, maker(model)))
    assert 0.9 < top <= 0.96
    assert back == top
    assert top < middle < 1.58
    trainer, model = make("b")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.6." in name or ".layers.7." in name)
    assert run(trainer)[0] > 2.7


def test_gradient_checkpointing_changes_no_weight(tmp_path):
    trainer, watch, plan = attached(tmp_path, rotating, gradient_checkpointing=True)
    trainer.train()
    assert worst(watch.weights[-1], run_torch(plan)[-1]) < 1e-6
    assert [layer.gradient_checkpointing for layer in trainer.model.model.layers] == [False, True, True, True]


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["keep", "clear", "offload"])
@pytest.mark.parametrize("stop", some_fast([5, 3, 6]))
def test_resume_equals_the_uninterrupted_run(stop, rule, tmp_path):
    """In the middle of the second phase, and at both of its ends."""
    make = lambda m: plan_of(m, ("layers.3", "head"), ("layers.1", "head"), ("layers.3",), state=rule)  # noqa: E731
    saving = {"save_strategy": "steps", "save_steps": stop}
    whole, seen, plan = attached(tmp_path / "a", make, **saving)
    whole.train()
    again, watch, _ = attached(tmp_path / "b", make, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert len(watch.weights) == STEPS - stop
    for mine, true in zip(watch.weights, seen.weights[stop:], strict=True):
        assert moved(true, mine) == set()
    assert watch.rates == seen.rates[stop:]
    assert moved(weights_of(tiny_llama()), watch.weights[-1]) == plan.ever_trained


def test_resume_true_takes_the_newest_and_data_and_counts_go_on(tmp_path):
    whole, seen, _ = attached(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    whole.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-8", "checkpoint-9"]
    again, watch, _ = attached(tmp_path, save_strategy="steps", save_steps=2)
    (tmp_path / "checkpoint-9").rename(tmp_path / "aside")
    again.train(resume_from_checkpoint=True)
    assert moved(seen.weights[-1], watch.weights[-1]) == set()


def test_a_checkpoint_holds_what_was_trained_so_far_and_nothing_frozen(tmp_path):
    trainer, _, plan = attached(
        tmp_path, lambda m: plan_of(m, ("layers.3",), ("layers.1",)), save_strategy="steps", save_steps=3
    )
    trainer.train()
    first, second = (tmp_path / f"checkpoint-{n}" for n in (3, 6))
    layers = {n: set(names_of(trainer.model, f"layers.{n}")) for n in (1, 3)}
    assert set(load_file(first / "weights.safetensors")) == layers[3]
    assert set(load_file(second / "weights.safetensors")) == layers[3] | layers[1]
    kept = {key.rpartition("/")[2] for key in load_file(second / "state.safetensors") if ".layers.3." in key}
    assert kept == {"exp_avg", "exp_avg_sq", "step"}  # parked
    sizes = sum(p.numel() for n, p in trainer.model.named_parameters() if n in plan.ever_trained)
    assert (second / "weights.safetensors").stat().st_size <= 1.1 * 4 * sizes
    files = {p.name for p in second.iterdir()}
    assert {"manifest.json", "trainer_state.json", "scheduler.pt", "config.json"} <= files
    assert not {"model.safetensors", "pytorch_model.bin", "optimizer.pt"} & files
    manifest = json.loads((second / "manifest.json").read_text())
    assert manifest["plan"]["digest"] == plan.digest
    assert len(manifest["base"]["hash"]) == 64


def test_the_final_model_is_whole(tmp_path):
    trainer, watch, _ = attached(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    saved = type(trainer.model).from_pretrained(tmp_path / "model")
    assert moved(watch.weights[-1], weights_of(saved)) == set()


def test_the_best_model_of_a_static_plan(tmp_path):
    trainer, watch, _ = attached(
        tmp_path, lambda m: plan_of(m, ("layers.3", "head")), eval_strategy="steps", eval_steps=3, save_strategy="steps",
        save_steps=3, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < STEPS  # "best" is the highest loss here: an early one
    assert moved(watch.weights[best - 1], weights_of(trainer.model)) == set()


def saved(folder, maker=gradual, stop=5):
    trainer, _, _ = attached(folder, maker, save_strategy="steps", save_steps=stop)
    trainer.train()
    return folder / f"checkpoint-{stop}"


def test_a_checkpoint_of_another_plan_is_refused_with_the_layers_that_differ(tmp_path):
    folder = saved(tmp_path / "a", lambda m: plan_of(m, ("layers.3",)))
    trainer, _, _ = attached(tmp_path / "b", lambda m: plan_of(m, ("layers.2",)))
    with pytest.raises(UserError, match=r"another plan.*layers\.3.*layers\.2"):
        trainer.train(resume_from_checkpoint=str(folder))
    assert moved(weights_of(tiny_llama()), weights_of(trainer.model)) == set()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = saved(tmp_path / "a")
    trainer, _, _ = attached(tmp_path / "b", model=tiny_llama(seed=1))
    with pytest.raises(UserError, match="trained from model"):
        trainer.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("damage", ["manifest.json", "weights.safetensors", "state.safetensors"])
def test_a_checkpoint_that_is_not_whole_is_refused(damage, tmp_path):
    folder = saved(tmp_path / "a")
    (folder / damage).unlink()
    trainer, _, _ = attached(tmp_path / "b")
    with pytest.raises(UserError, match=damage):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_checkpoint_without_a_trained_tensor_is_refused_by_its_name(tmp_path):
    folder = saved(tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"].pop("lm_head.weight")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    trainer, _, _ = attached(tmp_path / "b")
    with pytest.raises(UserError, match=r"lacks 'lm_head\.weight'"):
        trainer.train(resume_from_checkpoint=str(folder))


# -- refusals ----------------------------------------------------------------------------------------------------------


def static(model):
    return plan_of(model, ("layers.3", "head"))


def test_another_thing_than_a_trainer():
    with pytest.raises(UserError, match="not a SimpleNamespace"):
        attach(SimpleNamespace(), static(tiny_llama()))


def test_a_second_plan(tmp_path):
    trainer, _, plan = attached(tmp_path)
    with pytest.raises(UserError, match="attached already"):
        attach(trainer, plan)


def test_names_that_the_model_lacks(tmp_path):
    model = tiny_llama()
    plan = FreezePlan("test", (Phase(0, None, ("model.layers.9.mlp.up_proj.weight",)),))
    with pytest.raises(UserError, match=r"lacks, such as 'model\.layers\.9.*Did you mean"):
        attach(make_trainer(tmp_path, model), plan)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adaptive_plan(tmp_path):
    model = tiny_llama()
    with pytest.raises(UserError, match=r"adaptive plan.*dsfreeze train"):
        attach(make_trainer(tmp_path, model), replace(static(model), decide_at=3))


def test_a_plan_with_masks(tmp_path):
    model = tiny_llama()
    masks = (Mask("lm_head.weight", 32, rows=((0, 1),)),)
    with pytest.raises(UserError, match=r"masks of elements.*dsfreeze train"):
        attach(make_trainer(tmp_path, model), replace(static(model), masks=masks))


def test_a_trainer_that_steps_already(tmp_path):
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model, steps=1)
    trainer.train()
    with pytest.raises(UserError, match="already stepping"):
        attach(trainer, static(model))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"optim": "adafactor"}, "Adafactor"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "reentrant"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}, "every_n_layers"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": "use_reentrant=True"}, "no dictionary"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
    ],
)
def test_arguments_that_cannot_be_served(options, word, tmp_path):
    model = tiny_llama()
    with pytest.raises(UserError, match=word):
        attach(make_trainer(tmp_path, model, **options), static(model)).train()


@pytest.mark.parametrize(
    ("attribute", "word"),
    [("is_fsdp_enabled", "FSDP"), ("is_distributed_loading_by_transformers", "DTensor"), ("model_init", "model_init")],
)
def test_trainers_that_cannot_be_served(attribute, word, tmp_path):
    """What one CPU cannot build is told by the attribute that transformers tells it by."""
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model)
    setattr(trainer, attribute, True)
    with pytest.raises(UserError, match=word):
        attach(trainer, static(model))


def test_moving_plans_are_refused_where_static_ones_are_served(tmp_path):
    model = tiny_llama()
    options = {"eval_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(tmp_path, model, **options)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(UserError, match="load_best_model_at_end"):
        attach(trainer, gradual(model))
    attach(trainer, static(model))


def test_an_optimizer_of_the_users_must_hold_what_the_plan_trains(tmp_path):
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model)
    trainer.optimizer = torch.optim.AdamW(model.lm_head.parameters(), lr=LR)
    with pytest.raises(UserError, match=r"optimizer.*does not hold 'model\.layers\.3"):
        attach(trainer, static(model)).train()


def test_the_anatomy_may_be_given(tmp_path):
    model = tiny_llama()
    trainer = attach(make_trainer(tmp_path, model, steps=2), static(model), llama_anatomy(model))
    trainer.train()
    assert trainer.state.global_step == 2


# -- TRL ---------------------------------------------------------------------------------------------------------------

WORDS = [f"w{n}" for n in range(56)]


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(WordLevel({w: n for n, w in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )


def sentences(seed, count=24):
    numbers = torch.randint(0, len(WORDS), (count, 6), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[n] for n in row) for row in numbers]


def trl_trainer(name, folder, model):
    trl = pytest.importorskip("trl", reason="TRL is not installed: pip install dsfreeze[trl]")
    from datasets import Dataset

    columns, options = {"text": sentences(1)}, {}
    if name == "DPO":
        chosen, rejected = ([f" {text}" for text in sentences(seed)] for seed in (2, 3))
        columns, options = {"prompt": sentences(1), "chosen": chosen, "rejected": rejected}, {"ref_model": tiny_llama()}
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=2, learning_rate=LR, use_cpu=True, bf16=False,
        report_to=[], save_strategy="steps", save_steps=5, logging_strategy="no", disable_tqdm=True, warmup_steps=0,
        adam_epsilon=1e-3,
    )  # fmt: skip
    options |= {"args": arguments, "train_dataset": Dataset.from_dict(columns), "processing_class": tokenizer()}
    return getattr(trl, f"{name}Trainer")(model, **options)


def trl_plan(model):
    """Every layer is scheduled, two steps each, in an order that is not the model's."""
    return plan_of(model, *((f"layers.{n}",) for n in (2, 0, 3, 1)), every=2)


@pytest.mark.parametrize("name", some_fast(["SFT", "DPO"]))
def test_trl_moves_every_scheduled_layer_and_resumes(name, tmp_path):
    """LISA under peers moves only the layers drawn first (peers.md, row 4); gradient checkpointing is TRL's default."""
    seen, runs = [], []
    for folder, resume in (("a", None), ("b", str(tmp_path / "a" / "checkpoint-5"))):
        model = tiny_llama()
        before, plan = weights_of(model), trl_plan(model)
        trainer = attach(trl_trainer(name, tmp_path / folder, model), plan)
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=resume)
        seen.append(moved(before, watch.weights[-1]))
        runs.append(watch.weights)
    assert seen == [plan.ever_trained] * 2
    whole, again = runs
    for step in range(1, 8):
        assert moved(whole[step - 1], whole[step]) == set(plan.phase_at(step).trainable), step
    assert worst(whole[-1], again[-1]) == 0
