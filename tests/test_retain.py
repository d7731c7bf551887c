"""Retention methods on the local engine. Oracles: closed forms in plain PyTorch, one hand-written loop (`plain_run`), the
uninterrupted run."""

from __future__ import annotations

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from retain_kit import STEPS, exported, plain_run, require_close, task_recipe
from safetensors.torch import load_file, save_file
from tiny import llama_anatomy, tiny_llama
from tiny_runs import classification_data
from torch.nn import functional as F

from dsfreeze.errors import UserError
from dsfreeze.job import prepare_job
from dsfreeze.loop import train
from dsfreeze.objectives.retain.gem import solve_dual
from dsfreeze.objectives.retain.memory import open_memory
from dsfreeze.objectives.retain.osf import leading
from dsfreeze.objectives.retain.packnet import masks_of, pruned
from dsfreeze.recipe import FreezeOptions
from dsfreeze.record import read_record
from dsfreeze.strategies import make_plan


def penalties(folder):
    return [line["penalty"] for line in read_record(folder).steps]


def run_both(folder, retain, **changes):
    """Both tasks; the second's recipe."""
    train(task_recipe(folder, 1, retain, **changes))
    second = task_recipe(folder, 2, retain, **changes)
    train(second)
    return second


# -- quadratic penalties ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["task", "sequence"])
def test_l2_sp_is_a_term_of_the_loss(tmp_path, start):
    """Oracle: `plain_run` with alpha/2 sum (theta - theta_0)^2, theta_0 read from the model of this or of the first task."""
    second = run_both(tmp_path, {"method": "l2_sp", "weight": 2.0, "start": start}, train={"max_grad_norm": 0.5})
    origin = load_file(
        (tmp_path / "base" if start == "sequence" else tmp_path / "run1" / "model") / "model.safetensors"
    )

    def pull(module, trained, step):
        return sum((p - origin[n]).square().sum() for n, p in trained.items())

    job, wanted = plain_run(second, pull)
    require_close(tmp_path / "run2", job)
    assert penalties(tmp_path / "run2") == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert max(wanted) > 1e-3
    (told,) = (event for event in read_record(tmp_path / "run2").events if event["event"] == "retain")
    assert told["rule"].startswith("L2-SP")


def fisher_of(job, weights, number):
    """The oracle: autograd, example by example."""
    module = job.module
    chosen = np.random.default_rng(job.recipe.train.seed).permutation(len(job.data.train))[:number]
    trained = {n: p for n, p in module.named_parameters() if n in job.plan.phases[0].trainable}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for index in chosen:
        batch = job.data.collate([job.data.train[int(index)]])
        logits = module(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
        log_p = -F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum")
        for name, gradient in zip(trained, torch.autograd.grad(log_p, trained.values()), strict=True):
            total[name] += gradient.square() / number
    return total


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ewc_is_a_term_of_the_loss_and_its_fisher_a_mean_of_squares(tmp_path, accumulation):
    """Oracles: `fisher_of` after each task, added up with gamma; `plain_run` with 1/2 lambda sum F (theta - theta*)^2."""
    retain = {"method": "ewc", "weight": 0.5, "gamma": 0.9, "fisher_examples": 5}
    options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 4 // accumulation}
    second = run_both(tmp_path, retain, train=options)
    first = load_file(tmp_path / "memory1" / "memory.safetensors")
    after = exported(tmp_path / "run1")
    wanted = fisher_of(prepare_job(task_recipe(tmp_path, 1, retain)), after, 5)
    for name, value in wanted.items():
        torch.testing.assert_close(first[f"fisher/{name}"].view_as(value), value, rtol=1e-4, atol=1e-6)
        assert torch.equal(first[f"weight/{name}"].view_as(value), after[name])

    def pull(module, trained, step):
        terms = (first[f"fisher/{n}"].view_as(p) * (p - after[n]).square() for n, p in trained.items())
        return 0.25 * sum(term.sum() for term in terms)

    job, values = plain_run(second, pull)
    require_close(tmp_path / "run2", job)
    assert penalties(tmp_path / "run2") == pytest.approx(values, rel=1e-3, abs=1e-9)
    new = fisher_of(prepare_job(task_recipe(tmp_path, 2, retain)), exported(tmp_path / "run2"), 5)
    both = load_file(tmp_path / "memory2" / "memory.safetensors")
    for name, value in new.items():
        total = value + 0.9 * first[f"fisher/{name}"].view_as(value)
        torch.testing.assert_close(both[f"fisher/{name}"].view_as(value), total, rtol=1e-4, atol=1e-6)


def test_fisher_of_drawn_labels_is_finite_and_another(tmp_path):
    """Oracle: the empirical Fisher, from which it must differ, and itself, drawn again."""
    found = []
    for place, labels in (("a", "data"), ("b", "model"), ("c", "model")):
        train(task_recipe(tmp_path / place, 1, {"method": "ewc", "fisher_examples": 4, "fisher_labels": labels}))
        found.append(load_file(tmp_path / place / "memory1" / "memory.safetensors")["fisher/lm_head.weight"])
    assert torch.equal(found[1], found[2])
    assert found[1].isfinite().all()
    assert not torch.allclose(found[0], found[1])


# -- examples -----------------------------------------------------------------------------------------------------


def kept_of(folder, job, seed, number, size):
    """Oracle's own reading of a memory: the batch that a step draws."""
    rows = [json.loads(line) for line in (folder / "examples.jsonl").read_text().splitlines()]
    places = np.random.default_rng(seed).permutation(len(rows))[:size]
    return [rows[int(place)] for place in places]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


@pytest.mark.parametrize("method", ["a_gem", "gem"])
def test_projection_is_of_the_whole_gradient(tmp_path, method):
    """Oracle: `plain_run` whose gradient is projected by the closed form (one earlier task: the dual is a number)."""
    second = run_both(
        tmp_path, {"method": method, "memory_examples": 6, "memory_batch_size": 4}, train={"max_grad_norm": 0.5}
    )
    conflicts = []

    def project(job, trained, step):
        rows = kept_of(tmp_path / "memory1", job, [42, step, 0], step, 4)
        loss = job.module(**job.data.collate(rows)).loss
        reference = flat(torch.autograd.grad(loss, trained.values()))
        gradient = flat(p.grad for p in trained.values())
        product = gradient @ reference
        conflicts.append(float(product) < 0)
        if product < 0:
            weight = -product / (reference @ reference)
            weight = weight if method == "a_gem" else max(weight, torch.tensor(0.5))
            gradient = gradient + weight * reference
        for part, p in zip(gradient.split([p.numel() for p in trained.values()]), trained.values(), strict=True):
            p.grad = part.view_as(p)

    job, _ = plain_run(second, adjust=project)
    require_close(tmp_path / "run2", job, atol=2e-5)
    assert any(conflicts)


def test_the_dual_lets_no_earlier_loss_rise():
    """Oracle: products of the projected gradient with each row, and the optimality conditions; 50 random problems, some of them
    with two equal tasks."""
    draw = np.random.default_rng(0)
    for case in range(50):
        rows = draw.normal(size=(4, 30)) * 10.0 ** draw.integers(-4, 3)
        rows[3] = rows[0] if case % 5 == 0 else rows[3]
        gradient = draw.normal(size=30) - rows.sum(0) / np.abs(rows).max()
        v = solve_dual(rows @ rows.T, rows @ gradient, 0.5 if case % 2 else 0.0)
        assert (v >= (0.5 if case % 2 else 0.0)).all()
        products = rows @ (gradient + rows.T @ v)
        assert (products >= -1e-3 * (rows**2).sum(1)).all()
    assert solve_dual(np.eye(1), np.array([-3.0]), 0.5) == pytest.approx([3.0], rel=1e-5)


def test_der_adds_both_means(tmp_path):
    """Oracle: `plain_run` with alpha MSE to the top logits of the first task's model and beta times the kept examples' loss."""
    retain = {"method": "der", "memory_examples": 6, "memory_batch_size": 4, "top_k": 5, "alpha": 0.7, "beta": 0.4}
    second = run_both(tmp_path, retain, train={"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2})
    teacher = prepare_job(task_recipe(tmp_path, 2, {"method": "none", "memory": None, "remember": None})).module.eval()

    def replay(module, trained, step):
        job = prepared
        compared, replayed = (kept_of(tmp_path / "memory1", job, [42, step, n], step, 4) for n in range(2))
        batch = job.data.collate(compared)
        counted = batch["labels"][:, 1:] != -100
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        with torch.no_grad():
            top = teacher(**inputs).logits[:, :-1][counted].topk(5)
        found = module(**inputs).logits[:, :-1][counted].gather(-1, top.indices)
        return 0.7 * F.mse_loss(found, top.values) + 0.4 * module(**job.data.collate(replayed)).loss

    prepared = prepare_job(task_recipe(tmp_path, 2, {"method": "none", "memory": None, "remember": None}))
    job, wanted = plain_run(second, replay)
    require_close(tmp_path / "run2", job, atol=2e-5)
    assert penalties(tmp_path / "run2") == pytest.approx(wanted, rel=1e-4)
    rows = (tmp_path / "memory2" / "examples.jsonl").read_text().splitlines()
    assert [json.loads(row)["of_task"] for row in rows] == [1] * 6 + [2] * 6


@pytest.mark.parametrize("method", ["ewc", "der", "a_gem"])
def test_classes_and_a_fresh_head(tmp_path, method):
    """Oracle: what lies in the memory. A fresh head is the task's own; kept rows have a label and its three logits."""
    retain = {"method": method, "fisher_examples": 4} if method == "ewc" else {"method": method, "memory_examples": 4}
    task = {"task": "classification", "data": classification_data(tmp_path / "classes")}
    train(task_recipe(tmp_path, 1, retain, **task))
    shapes = open_memory(prepare_job(task_recipe(tmp_path, 2, retain, **task))).shapes
    assert not any("score" in key for key in shapes)
    assert shapes.get("logits", (4, 3)) == (4, 3)
    train(task_recipe(tmp_path, 2, retain, **task))
    assert all(line["penalty"] >= 0 for line in read_record(tmp_path / "run2").steps)


# -- directions ---------------------------------------------------------------------------------------------------


def test_o_lora_is_a_term_of_the_loss(tmp_path):
    """Oracle: `plain_run` with lambda_1 sum |A_old A_new^T| + lambda_2 sum of norms."""
    retain = {"method": "o_lora", "weight": 0.05, "l2": 0.1}
    freeze = {"strategy": "lora", "fraction": 0.0, "adapter": {"kind": "lora", "r": 3, "categories": ["q", "v"]}}
    second = run_both(tmp_path, retain, freeze=freeze)
    old = load_file(tmp_path / "memory1" / "memory.safetensors")
    assert len(old) == 4

    def overlap(module, trained, step):
        products = (old[f"1/{n.split('.lora_')[0]}"] @ p.T for n, p in trained.items() if ".lora_A." in n)
        norms = (p.square().sum().clamp(min=1e-30).sqrt() for n, p in trained.items() if ".lora_" in n)
        return 0.05 * sum(product.abs().sum() for product in products) + 0.1 * sum(norms)

    job, wanted = plain_run(second, overlap)
    assert penalties(tmp_path / "run2") == pytest.approx(wanted, rel=1e-4)
    new = load_file(tmp_path / "memory2" / "memory.safetensors")
    for name, parameter in job.module.named_parameters():
        if ".lora_A." in name:
            torch.testing.assert_close(new[f"2/{name.split('.lora_')[0]}"], parameter.detach(), atol=2e-6, rtol=0)


def test_osf_keeps_updates_off_the_leading_directions(tmp_path):
    """Oracle: numpy's projectors from an SVD of its own; with plain gradient steps the leading part of W stays."""
    weight, gradient = torch.randn(12, 8), torch.randn(12, 8)
    left, values, right = np.linalg.svd(weight.numpy(), full_matrices=False)
    high_left, high_right = left[:, :4], right[:4]
    projected = (np.eye(12) - high_left @ high_left.T) @ gradient.numpy() @ (np.eye(8) - high_right.T @ high_right)
    found = leading(weight, 0.5).without(gradient)
    np.testing.assert_allclose(found.numpy(), projected, atol=1e-5)
    kept = high_left.T @ (weight + 0.1 * found).numpy() @ high_right.T
    np.testing.assert_allclose(kept, np.diag(values[:4]), atol=1e-5)


def test_osf_projects_the_gradient_of_every_matrix_of_a_layer(tmp_path):
    """Oracle: `plain_run` with gradients projected by `leading`, which the test above holds."""
    second = run_both(tmp_path, {"method": "osf", "effective_rank": 0.25}, train={"max_grad_norm": 0.5})
    bases = {}

    def project(job, trained, step):
        for name, p in trained.items():
            if ".layers." in name and p.dim() == 2:
                basis = bases.setdefault(name, leading(start[name], 0.25))
                p.grad = basis.without(p.grad)

    start = exported(tmp_path / "run1")
    job, _ = plain_run(second, adjust=project)
    require_close(tmp_path / "run2", job, atol=2e-5)
    assert bases


# -- packnet ------------------------------------------------------------------------------------------------------


def test_pruning_is_of_what_nobody_owns():
    """Oracle: a matrix small enough to prune by eye."""
    weight = torch.tensor([[0.1, -5.0, 3.0], [-0.2, 4.0, 0.05]])
    owner = torch.tensor([[0, 0, 1], [0, 0, 0]], dtype=torch.uint8)
    kept, owners = pruned(weight, owner, task=2, share=0.5)
    assert kept.tolist() == [[0.0, -5.0, 3.0], [pytest.approx(-0.2), 4.0, 0.0]]
    assert owners.tolist() == [[0, 2, 1], [2, 2, 0]]
    assert masks_of({"w": owners})["w"].tolist() == [[True, False, False], [False, False, True]]
    vector, owners = pruned(torch.tensor([0.1, 2.0]), torch.zeros(2, dtype=torch.uint8), task=1, share=0.5)
    assert vector.tolist() == pytest.approx([0.1, 2.0])
    assert owners.tolist() == [1, 1]


def test_packnet_leaves_half_of_each_matrix_and_refuses_to_train_the_rest(tmp_path):
    """Oracle: counts of zeros in the exported model, and the masks beside it."""
    retain = {"method": "packnet"}
    train(task_recipe(tmp_path, 1, retain))
    weights, masks = exported(tmp_path / "run1"), load_file(tmp_path / "memory1" / "trains.safetensors")
    for name, mask in masks.items():
        assert mask.dtype == torch.bool
        assert int(mask.sum()) == (mask.numel() // 2 if mask.dim() == 2 else 0)
        assert not weights[name][mask].any()
        assert weights[name][~mask].all()
    plan = prepare_job(task_recipe(tmp_path, 2, retain)).plan
    masked = {mask.tensor: mask.trained for mask in plan.masks}
    assert masked == {name: int(mask.sum()) for name, mask in masks.items() if mask.dim() == 2}
    assert set(plan.phases[0].trainable) == set(masked)  # norms are owned whole
    save_file({"lm_head.weight": torch.ones(258, 16, dtype=torch.bool)}, tmp_path / "all.safetensors")
    mistaken = task_recipe(tmp_path, 2, retain, freeze={"mask_file": str(tmp_path / "all.safetensors")})
    with pytest.raises(UserError, match="earlier tasks own elements of"):
        train(mistaken)


def test_what_an_earlier_task_owns_keeps_its_bits(tmp_path):
    """Oracle: the first task's model, and owners that only ever change from nobody."""
    pytest.importorskip("dsfreeze.engine.masks")
    run_both(tmp_path, {"method": "packnet"}, train={"weight_decay": 0.1})
    before, after = exported(tmp_path / "run1"), exported(tmp_path / "run2")
    first, second = (load_file(tmp_path / f"memory{n}" / "memory.safetensors") for n in (1, 2))
    for name, owner in first.items():
        owned = owner != 0
        assert torch.equal(before[name][owned], after[name][owned])
        assert torch.equal(second[name][owned], owner[owned])
        if owner.dim() == 2:
            assert int((second[name] == 2).sum()) == (owner.numel() // 2 + 1) // 2
            assert not torch.equal(before[name], after[name])


# -- a file of masks ----------------------------------------------------------------------------------------------

MATRIX = "model.layers.1.mlp.up_proj.weight"


def planned(tmp_path, masks, **freeze):
    if isinstance(masks, dict):
        save_file(masks, tmp_path / "masks.safetensors")
    else:
        (tmp_path / "masks.safetensors").write_bytes(masks)
    options = FreezeOptions(mask_file=tmp_path / "masks.safetensors", **{"strategy": "full", **freeze})
    return make_plan(llama_anatomy(tiny_llama()), options, 4)


def test_masks_of_a_file_are_laid_over_a_plan(tmp_path):
    """Oracle: counts. All true needs no mask, none true does not train."""
    names = [MATRIX, "lm_head.weight", "model.norm.weight"]
    half = torch.arange(64 * 32).view(64, 32) % 2 == 0
    masks = dict(zip(names, (half, torch.ones(61, 32).bool(), torch.zeros(32).bool()), strict=True))
    plan = planned(tmp_path, masks)
    (mask,) = plan.masks
    assert (mask.tensor, mask.trained, mask.file) == (MATRIX, 1024, str(tmp_path / "masks.safetensors"))
    assert mask.sha256 == hashlib.sha256((tmp_path / "masks.safetensors").read_bytes()).hexdigest()
    assert set(names[:2]) <= set(plan.phases[0].trainable)
    assert "model.norm.weight" not in plan.phases[0].trainable


def test_masks_beside_metadata_and_the_smallest_file(tmp_path):
    """safetensors' own writer; then a header of two bytes and no data, which masks nothing."""
    masks = {MATRIX: torch.arange(64 * 32).view(64, 32) % 4 == 0}
    save_file(masks, tmp_path / "masks.safetensors", metadata={"format": "pt"})
    whole = (tmp_path / "masks.safetensors").read_bytes()
    assert [mask.trained for mask in planned(tmp_path, whole).masks] == [512]
    assert planned(tmp_path, b"\2" + bytes(7) + b"{}").masks == ()


def test_a_byte_that_is_no_boolean_is_refused(tmp_path):
    """As many bytes as elements, one of them 2; then one byte less."""
    save_file({MATRIX: torch.ones(64, 32).bool()}, tmp_path / "masks.safetensors")
    whole = (tmp_path / "masks.safetensors").read_bytes()
    for changed in (whole[:-1] + b"\2", whole[:-1]):
        with pytest.raises(UserError, match=rf"'{MATRIX}' is not 2048 booleans"):
            planned(tmp_path, changed)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=rf"freeze.mask_file: there is no file '{tmp_path / 'none'}'"):
        make_plan(llama_anatomy(tiny_llama()), FreezeOptions(mask_file=tmp_path / "none", strategy="full"), 4)


@pytest.mark.parametrize(
    ("masks", "freeze", "words"),
    [
        (b"no", {}, "cut short, or no safetensors"), (b"\xff" * 20, {}, "cut short"), (b"\2\0\0\0\0\0\0\0[]", {}, "cannot be read"),
        (b"\3\0\0\0\0\0\0\0{}", {}, "cut short"),
        ({MATRIX: torch.zeros(64, 32)}, {}, "is F32, not BOOL"), ({MATRIX: torch.zeros(2, 2).bool()}, {}, "and the tensor is"),
        ({"up": torch.zeros(2).bool()}, {}, "which tiny lacks"),
        ({"model.layers.1.mlp.up_proj.weigh": torch.zeros(2).bool()}, {}, rf"which tiny lacks.* Did you mean '{MATRIX}'"),
        ({"model.norm.weight": torch.ones(32).bool(), MATRIX: torch.ones(64, 32).bool()}, {"strategy": "half", "level": "element"},
         f"masks '{MATRIX}', of which strategy 'half' trains a part by itself"),
        ({MATRIX: torch.zeros(64, 32).bool()}, {"strategy": "lora"}, "keep one"),
    ],
)  # fmt: skip
def test_a_file_that_masks_nothing_of_this_plan_is_refused(tmp_path, masks, freeze, words):
    with pytest.raises(UserError, match=words):
        planned(tmp_path, masks, **freeze)


# -- what is refused, and resuming --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """A sequence whose first task has run."""
    folder = tmp_path_factory.mktemp("left")
    train(task_recipe(folder, 1, {"method": "der", "memory_examples": 4}))
    return folder


def broken(left, tmp_path, how):
    for name in ("base", "run1", "memory1"):
        shutil.copytree(left / name, tmp_path / name)
    memory, retain = tmp_path / "memory1", {"method": "der"}
    manifest = json.loads((memory / "manifest.json").read_text())
    if how == "cut":
        (memory / "memory.safetensors").write_bytes((memory / "memory.safetensors").read_bytes()[:-4])
    elif how == "gone":
        shutil.rmtree(memory)
    elif how == "garbled":
        (memory / "manifest.json").write_text("[1]")
    elif how == "of another model":
        manifest["model"]["digest"] = "0"
    elif how == "of another kind":
        manifest["labels"] = 3
    elif how == "of the future":
        manifest["format_version"] = 9
    elif how == "with a stray file":
        manifest["sha256"]["../../x"] = "0"
    elif how == "of another method":
        retain = {"method": "ewc"}
    if how.startswith(("of", "with")):
        (memory / "manifest.json").write_text(json.dumps(manifest))
    return task_recipe(tmp_path, 2, retain)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "memory.safetensors is missing, cut short or changed"), ("gone", "it has no manifest.json"),
        ("garbled", "cannot be read"), ("of another model", "which are not those of"), ("of another kind", "no common loss"),
        ("of the future", "this version reads 1"), ("with a stray file", "cannot be read"),
        ("of another method", "was left by method 'der'"),
    ],
)  # fmt: skip
def test_a_memory_that_does_not_fit_is_refused_before_the_first_step(left, tmp_path, how, words):
    with pytest.raises(UserError, match=words):
        train(broken(left, tmp_path, how))
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize(
    ("retain", "changes", "words"),
    [
        ({"method": "o_lora"}, {}, "write freeze.strategy: lora"),
        ({"method": "ewc"}, {"freeze": {"strategy": "lora", "fraction": 0.0}}, "freeze.adapter trains others"),
        (
            {"method": "l2_sp"},
            {"freeze": {"strategy": "lisa", "fraction": None, "switch_every": 2, "active_layers": 1}},
            "strategy 'lisa' moves",
        ),
        ({"method": "gem"}, {"freeze": {"evict_prefix": True, "prefix_cache": "memory"}}, "evict_prefix: false"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, retain, changes, words):
    with pytest.raises(UserError, match=words):
        train(task_recipe(tmp_path, 1, retain, **changes))


def test_a_folder_that_is_no_memory_is_not_written_over(tmp_path):
    (tmp_path / "memory1").mkdir()
    (tmp_path / "memory1" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="Name another folder"):
        train(task_recipe(tmp_path, 1, {"method": "l2_sp"}))


@pytest.mark.parametrize(
    "retain",
    [
        {"method": "l2_sp", "weight": 5.0},
        {"method": "gem", "memory_batch_size": 2},
        {"method": "osf"},
        {"method": "der"},
    ],
    ids=lambda retain: retain["method"],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, retain):
    """Oracle: the run that was not stopped, to the bit. theta_0 and bases are of the start, not of the checkpoint."""
    train(task_recipe(tmp_path, 1, retain))
    options = {"save_strategy": "steps", "save_steps": 2}
    train(task_recipe(tmp_path, 2, retain, train=options))
    whole, steps = exported(tmp_path / "run2"), read_record(tmp_path / "run2").steps
    shutil.rmtree(tmp_path / "run2" / f"checkpoint-{STEPS}")
    shutil.rmtree(tmp_path / "run2" / "model")
    (tmp_path / "run2" / "summary.json").unlink()
    train(task_recipe(tmp_path, 2, retain, train=options | {"resume_from_checkpoint": True}))
    for name, value in exported(tmp_path / "run2").items():
        assert torch.equal(value, whole[name]), name
    assert [line["penalty"] for line in read_record(tmp_path / "run2").steps] == [line["penalty"] for line in steps]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"weight": 0.3}, r"retain.weight None, and this recipe says 0\.3"),
        ({"method": "ewc"}, r"retain.method 'l2_sp', and this recipe says 'ewc'"),
    ],
)
def test_a_run_goes_on_under_the_rule_it_began_with(tmp_path, other, words):
    options = {"save_strategy": "steps", "save_steps": 2}
    train(task_recipe(tmp_path, 1, {"method": "l2_sp"}, train=options))
    changed = {"method": "l2_sp", **other}
    with pytest.raises(UserError, match=words):
        train(task_recipe(tmp_path, 1, changed, train=options | {"resume_from_checkpoint": True}))


def test_a_memory_is_read_in_parts(left):
    """Oracle: the whole tensor."""
    job = prepare_job(task_recipe(left, 2, {"method": "der"}))
    memory = open_memory(job)
    save_file({"x": torch.arange(10.0)}, memory.folder / "x.safetensors")
    assert memory.num_tasks == 1
    assert len(memory.by_task) == 1
    logits = memory.read("logits")
    assert torch.equal(memory.read("logits", 2, 4), logits[2:4])
