"""Preference tuning. Oracles: the formulas by hand, TRL's DPOTrainer on the same tokens, plain PyTorch."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from marks import some_fast
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from tiny import llama_anatomy, phase_of, recipe_of, tiny_llama
from tiny_runs import llama_folder, preference_data, preference_recipe
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from dsfreeze.analyze import analyze
from dsfreeze.cli import run
from dsfreeze.commands import evaluate_recipe
from dsfreeze.engine.local import LocalEngine
from dsfreeze.errors import UserError
from dsfreeze.job import prepare_job
from dsfreeze.loop import train
from dsfreeze.objectives.preference import LOSSES, Preference, answer_log_probs
from dsfreeze.recipe import Recipe
from dsfreeze.record import read_record
from dsfreeze.setting import workload_of

# -- arithmetic ----------------------------------------------------------------------------------------------------


def batch_of(pairs: int = 3, positions: int = 12, vocab: int = 61, seed: int = 0) -> dict[str, torch.Tensor]:
    """Pairs whose prompts and answers have other lengths, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (2 * pairs, positions), generator=draw)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for row in range(2 * pairs):
        labels[row, : 2 + row // 2] = -100
        end = positions - (3 * row) % 5
        labels[row, end:], mask[row, end:], ids[row, end:] = -100, 0, 0
        ids[row, : 2 + row // 2] = ids[row - row % 2, : 2 + row // 2]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="none")
    return -losses.view(len(labels), -1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_of_answers(dtype: torch.dtype) -> None:
    """Oracle: cross-entropy in float64 and autograd through it; sums are of float32, the gradient is of the logits' own precision."""
    batch = batch_of()
    logits = torch.randn(6, 12, 61, generator=torch.Generator().manual_seed(1)).mul(3).to(dtype).requires_grad_()
    upper = torch.linspace(-1, 1, 6)
    found, lengths = answer_log_probs(logits, batch["labels"])
    (gradient,) = torch.autograd.grad(found, logits, upper)
    wanted = plain_log_probs(logits, batch["labels"])
    (right,) = torch.autograd.grad(wanted, logits, upper.double())
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    assert lengths.tolist() == [(row[1:] != -100).sum() for row in batch["labels"]]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        gradient.float(), right.float(), rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-7
    )


def test_no_copy_of_the_logits_is_kept_for_the_backward_pass() -> None:
    """Oracle: what autograd is given to save; log-softmax and cross-entropy keep a copy, or two."""
    kept: list[torch.Tensor] = []
    logits, labels = torch.randn(6, 12, 61, requires_grad=True), batch_of()["labels"]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        answer_log_probs(logits, labels)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 6 * 12} == {logits.data_ptr()}


@pytest.mark.parametrize(
    ("loss", "wanted"),
    [
        ("sigmoid", lambda d, _: math.log1p(math.exp(-0.2 * d))),
        ("hinge", lambda d, _: max(0.0, 1 - 0.2 * d)),
        ("ipo", lambda _, mean: (mean - 2.5) ** 2),
    ],
)
def test_losses_by_their_formulas(loss: str, wanted: Any) -> None:
    """Oracle: eq. 7 of DPO, SLiC's hinge and eq. 17 of IPO with means over tokens, in plain Python; beta 0.2."""
    ratios, lengths = [(1.5, -0.5), (-2.0, 4.0), (9.0, 0.0)], [(3, 4), (1, 2), (5, 5)]
    found = LOSSES[loss](torch.tensor(ratios), torch.tensor(lengths), 0.2)
    right = [wanted(c - r, c / n - r / m) for (c, r), (n, m) in zip(ratios, lengths, strict=True)]
    assert found.tolist() == pytest.approx(right, rel=1e-6)


def moved(model: Any, scale: float) -> Any:
    """The model some way from its start."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=draw))
    return model


def trl_trainer(folder: Path, loss: str) -> Any:
    """DPOTrainer of the tiny model, whose reference is that model as it is."""
    trl = pytest.importorskip("trl", reason="needs trl, of the optional group trl")
    from datasets import Dataset
    from tiny_runs import byte_tokenizer

    options = trl.DPOConfig(
        str(folder), loss_type=[loss], beta=0.3, use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        disable_dropout=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
    model = tiny_llama(vocab=258)
    return trl.DPOTrainer(model, tiny_llama(vocab=258), options, train_dataset=rows, processing_class=byte_tokenizer())


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_trls(tmp_path: Path, loss: str) -> None:
    """Oracle: TRL's DPOTrainer on the same tokens, from the same reference, at weights that have moved; 1e-5, every parameter."""
    trainer, batch = trl_trainer(tmp_path, loss), batch_of(vocab=258)
    order = [0, 2, 4, 1, 3, 5]  # TRL has all chosen ones first
    theirs = {name: batch[name][order] for name in ("input_ids", "attention_mask")}
    theirs["completion_mask"] = (batch["labels"][order] != -100).long()
    moved(trainer.model, 0.05).train()
    expected = trainer.compute_loss(trainer.model, theirs)
    expected.backward()

    model = tiny_llama(vocab=258)
    anatomy = llama_anatomy(model)
    engine = LocalEngine(model, anatomy, recipe_of("local"))
    engine.objective = Preference(loss, 0.3)
    logits = engine.no_grad_forward(batch).logits
    batch["reference"] = answer_log_probs(logits, batch["labels"])[0].view(-1, 2)
    engine.enter(phase_of(anatomy, "full"))
    moved(model, 0.05)
    found = engine.forward_backward(batch, 1.0)
    assert found == pytest.approx(float(expected.detach()), rel=1e-5)
    assert abs(found - {"sigmoid": math.log(2), "hinge": 1.0, "ipo": (1 / 0.6) ** 2}[loss]) > 1e-3, "the weights moved"
    gradients = dict(trainer.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-5, atol=1e-5)
        assert gradients[name].grad.abs().max() > 1e-4, name


# -- runs ----------------------------------------------------------------------------------------------------------


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_record(folder).steps]


def figures_of(recipe: Recipe, trained: Any) -> dict[str, float]:
    """The evaluation by plain PyTorch, a sequence at a time, in float64."""
    job, beta = prepare_job(recipe), recipe.preference.beta
    rewards = []
    for pair in (job.data.eval[i] for i in range(len(job.data.eval))):
        row = []
        for answer in ("chosen", "rejected"):
            ids, labels = (torch.tensor([pair[answer][key]]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                now, then = (plain_log_probs(m.eval()(input_ids=ids).logits, labels) for m in (trained, job.module))
            row.append(beta * float(now - then))
        rewards.append(row)
    chosen, rejected = np.asarray(rewards).T
    return {
        "loss": float(np.mean(np.log1p(np.exp(rejected - chosen)))), "reward_accuracy": float(np.mean(chosen > rejected)),
        "reward_margin": float(np.mean(chosen - rejected)), "reward_chosen": float(np.mean(chosen)),
        "reward_rejected": float(np.mean(rejected)),
    }  # fmt: skip


def test_a_run_learns_and_reports_its_rewards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: plain PyTorch on the exported model and the start model. Before the first step all rewards are zero."""
    recipe = preference_recipe(tmp_path, train={"max_steps": 12, "learning_rate": 3e-3})
    summary = train(recipe)
    before, after = summary["metrics"]["before"], summary["metrics"]["after"]
    assert before == {
        "loss": pytest.approx(math.log(2)), "reward_accuracy": 0, "reward_margin": 0, "reward_chosen": 0, "reward_rejected": 0,
    }  # fmt: skip
    wanted = figures_of(recipe, AutoModelForCausalLM.from_pretrained(summary["model"]))
    assert after == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert after["reward_margin"] > 0.1
    assert after["reward_accuracy"] == 1
    assert losses(tmp_path / "run")[0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses(tmp_path / "run")[-1] < 0.6
    assert summary["predicted"]["batch"][0] == 8, "four pairs are eight sequences"

    capsys.readouterr()
    assert run(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == pytest.approx(after, abs=1e-5)
    with pytest.raises(UserError, match=r"evaluated against the model that a run began with\. Name the run"):
        evaluate_recipe(recipe)


@pytest.mark.parametrize(("loss", "bf16"), [("ipo", False), ("hinge", False), ("hinge", True)])
def test_the_other_losses_learn_too(tmp_path: Path, loss: str, bf16: bool) -> None:
    """Oracle: the first loss in closed form (log-ratios are zero, in bf16 within its rounding), and a margin that has grown."""
    options = {"max_steps": 12, "export": False, "bf16": bf16}
    train(preference_recipe(tmp_path, preference={"loss": loss, "beta": 0.5}, train=options))
    steps = losses(tmp_path / "run")
    assert steps[0] == pytest.approx(1.0, abs=0.1 if bf16 else 1e-5)  # (0 - 1 / (2 x 0.5))^2, and 1 - 0
    assert steps[-1] < 0.95


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of every pass without a graph from now on."""
    passes: list[int] = []
    real = LocalEngine.no_grad_forward

    def counted(engine: Any, batch: Any, **options: Any) -> Any:
        passes.append(len(batch["input_ids"]))
        return real(engine, batch, **options)

    monkeypatch.setattr(LocalEngine, "no_grad_forward", counted)
    return passes


@pytest.mark.parametrize("case", ["bottom", "lora", "dropout"])
def test_the_reference_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Oracle: plain PyTorch with the start model and no dropout, a sequence at a time; passes are counted. A resumed run measures
    nothing, and goes on as the uninterrupted one did."""
    dropout = {"name": str(llama_folder(tmp_path / "model")), "dropout": 0.3}
    changes = {"bottom": {}, "lora": {"freeze": {"adapter": {"kind": "lora", "r": 2}}}, "dropout": {"model": dropout}}[
        case
    ]
    passes = count_passes(monkeypatch)
    options = {"save_strategy": "steps", "save_steps": 3, "export": False, "eval_strategy": "no"}
    whole = preference_recipe(tmp_path, **changes, train=options)
    train(whole)
    assert sum(passes) == 2 * (21 + 7)
    stored = load_file(tmp_path / "run/reference.safetensors")
    job = prepare_job(whole)
    for part, examples in (("train", job.data.train), ("eval", job.data.eval)):
        for index in range(len(examples)):
            for number, answer in enumerate(("chosen", "rejected")):
                ids, labels = (torch.tensor([examples[index][answer][key]]) for key in ("input_ids", "labels"))
                wanted = float(plain_log_probs(job.module.eval()(input_ids=ids).logits, labels).detach())
                assert stored[part][index, number] == pytest.approx(wanted, rel=1e-5)
    passes.clear()
    resume = {
        **options,
        "resume_from_checkpoint": str(tmp_path / "run/checkpoint-3"),
        "output_dir": str(tmp_path / "again"),
    }
    train(preference_recipe(tmp_path, **changes, train=resume))
    assert passes == []
    assert losses(tmp_path / "again") == losses(tmp_path / "run")[3:]
    carried = load_file(tmp_path / "again/reference.safetensors")
    assert {part: table.tobytes() for part, table in carried.items()} == {p: t.tobytes() for p, t in stored.items()}


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    """Oracle: the uninterrupted run, to the last bit, figures of the evaluation included; accumulation, and a short last batch of the
    epoch."""
    options = {
        "save_strategy": "steps",
        "save_steps": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    }
    whole = train(preference_recipe(tmp_path, train=options))
    wanted = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-8")
    (tmp_path / "run/summary.json").unlink()
    again = train(preference_recipe(tmp_path, train={**options, "resume_from_checkpoint": True}))
    assert losses(tmp_path / "run") == wanted
    assert again["metrics"] == whole["metrics"]


def spoil(tmp_path: Path, how: str) -> dict[str, Any]:
    """Damage what a run left, or change what it is resumed with; changes of the recipe."""
    path = tmp_path / "run/reference.safetensors"
    tables = load_file(path)
    with safe_open(path, "np") as file:
        told = file.metadata()
    if how == "gone":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[:-8])
    elif how == "not finite":
        tables["train"][3, 1] = np.nan
        save_file(tables, path, told)
    elif how == "of another kind":
        save_torch({"train": torch.zeros(21, 2, dtype=torch.bfloat16)}, path, told)
    elif how == "of fewer pairs":
        save_file({"train": tables["train"][:-1], "eval": tables["eval"]}, path, told)
    elif how == "of another model":
        save_file(tables, path, {**told, "model": "0" * 64})
    elif how == "of another format":
        save_file(tables, path, {**told, "format": "2"})
    elif how == "of other pairs":
        return {"data": preference_data(tmp_path / "others", rows=21, seed=1)}
    elif how == "without evaluation":
        save_file({"train": tables["train"]}, path, {key: value for key, value in told.items() if key != "eval"})
    return {}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    train(preference_recipe(folder, train={"max_steps": 2, "save_strategy": "steps", "export": False}))
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gone", r"No reference\.safetensors in .*run: the log-probabilities"),
        ("cut short", r"reference\.safetensors is not a whole safetensors file"),
        ("not finite", r"reference\.safetensors is damaged: 21 pairs have two finite numbers each"),
        ("of another kind", r"reference\.safetensors is not a whole safetensors file of numbers"),
        ("of fewer pairs", r"reference\.safetensors is damaged: 21 pairs"),
        ("of another model", r"reference\.safetensors is of another model \(000000000000, this is"),
        ("of another format", r"has format 2; this version reads 1"),
        ("of other pairs", r"reference\.safetensors is of other pairs than data\.train gives now"),
        ("without evaluation", r"reference\.safetensors is of other pairs than data\.eval gives now"),
    ],
)
def test_a_reference_that_is_not_the_runs_is_refused(a_run: Path, tmp_path: Path, how: str, message: str) -> None:
    shutil.copytree(a_run, tmp_path, dirs_exist_ok=True)
    options = {"resume_from_checkpoint": True, "max_steps": 4, "export": False, "save_strategy": "no"}
    with pytest.raises(UserError, match=message):
        train(preference_recipe(tmp_path, model=str(a_run / "model"), train=options, **spoil(tmp_path, how)))


def test_log_probabilities_that_are_not_finite_stop_the_run(tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(recipe.model.name)
    model.lm_head.weight.data[5] = math.inf
    model.save_pretrained(recipe.model.name)
    with pytest.raises(UserError, match=r"answers of data\.train log-probabilities that are not finite"):
        train(recipe)
    assert not (tmp_path / "run/reference.safetensors").exists()


# -- beside the loop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tier", "evict"), some_fast([("memory", False), ("disk", True)]))
def test_a_prefix_cache_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str, evict: bool
) -> None:
    """Oracle: the same run without one. The pass that measures the reference fills the cache: every step reads."""
    monkeypatch.setenv("DSFREEZE_CACHE", str(tmp_path / "cache"))
    plain = train(preference_recipe(tmp_path, train={"output_dir": str(tmp_path / "plain")}))
    freeze = {"prefix_cache": tier, "evict_prefix": evict}
    cached = train(preference_recipe(tmp_path, freeze=freeze, train={"output_dir": str(tmp_path / "cached")}))
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert cached["metrics"]["after"] == pytest.approx(plain["metrics"]["after"], abs=1e-5)
    told = cached["prefix_cache"]
    assert (told["cut"], told["hits"], told["examples"]) == (2, 29, 29)  # 8 steps of 4 pairs; an epoch's last has one
    assert told["evaluation_hits"] == told["evaluation_examples"] == 14
    assert (cached["memory"]["weights"] < plain["memory"]["weights"]) == evict


def test_an_analysis_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task preference compares two answers\. Analyze with task=sft"):
        analyze(preference_recipe(tmp_path))


def test_the_planner_counts_both_sequences(tmp_path: Path) -> None:
    recipe = preference_recipe(tmp_path)
    assert workload_of(recipe).micro_batch_size == 2 * recipe.train.per_device_train_batch_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sft", "preference": {"beta": 0.2}}, "task 'sft' does not read it"),
        ({"task": "preference", "preference": {"beta": 0}}, "greater than 0"),
        ({"task": "preference", "preference": {"loss": "dpo"}}, "'sigmoid', 'ipo' or 'hinge'"),
        ({"task": "preference", "data": {"packing": True}}, "task 'preference' does not read it"),
        ({"task": "preference", "data": {"max_new_tokens": 3}}, "task 'preference' does not read it"),
    ],
)
def test_recipes_that_cannot_be_meant(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({"model": "any", **changes})
