"""Scores. Oracles: closed forms, planted truths, plain re-implementations (numpy, loops), autograd and torch's AdamW."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from test_analyze import analyze, calibrated, gpt2_folder, language_data
from torch import nn

from dsfreeze.analyze import requested
from dsfreeze.analyze.bench import Bench, halves_of
from dsfreeze.analyze.calibration import calibration_sample
from dsfreeze.analyze.gates import fit_gates
from dsfreeze.anatomy import Anatomy, Layer, Tensor
from dsfreeze.engine.process import evaluation_engine
from dsfreeze.errors import UserError
from dsfreeze.job import load_task
from dsfreeze.model import read_anatomy
from dsfreeze.recipe import Recipe
from dsfreeze.scores import SCORES, Observations
from dsfreeze.scores.deviation import FIT_RIDGE, RIDGE, deviation, fitted_basis, semantic_basis
from dsfreeze.scores.similarity import influence, linear_cka, plasticity
from dsfreeze.scores.spectrum import spectrum_of
from dsfreeze.strategies.evidence import Change


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(layers: int = 4, shape: tuple[int, int] = (8, 6)) -> Anatomy:
    """Layers of one q matrix and one norm each."""
    blocks = [
        Layer(
            f"layers.{k}", (Tensor(f"{k}.q.weight", shape, "q"), Tensor(f"{k}.norm.weight", shape[:1], "norm")), str(k)
        )
        for k in range(layers)
    ]
    ends = [Layer(name, (Tensor(f"{name}.weight", (5, 8), name),)) for name in ("embed", "head")]
    return Anatomy("by hand", "none", (ends[0], *blocks, ends[1]))


def layers_of(scores) -> list[float]:
    return [value for name, value in scores.items() if name.startswith("layers.")]


def top(scores) -> str:
    return max((name for name in scores if name.startswith("layers.")), key=scores.__getitem__)


# -- similarity ----------------------------------------------------------------------------------------------------


def test_linear_cka_is_one_for_what_is_only_turned_scaled_or_moved():
    """Kornblith et al.: invariant to orthogonal maps, isotropic scaling and shifts, and not to other maps."""
    states = normal(20, 6)
    turn = torch.linalg.qr(normal(6, 6, seed=1)).Q
    assert linear_cka(states, 3.5 * states @ turn + 2.0) == pytest.approx(1, abs=1e-12)
    assert linear_cka(states, states @ torch.diag(torch.tensor([1, 1, 1, 1, 1, 9.0]).double())) < 0.95


def test_linear_cka_of_small_cases():
    """By hand: one column each, CKA is the squared correlation; and the feature form ||Y'X||^2 / (||X'X|| ||Y'Y||)."""
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[0.0], [0.0], [3.0]])
    assert linear_cka(x, y) == pytest.approx(0.75, abs=1e-12)  # r = 3 / sqrt(2 * 6)
    one, other = normal(9, 4), normal(9, 7, seed=1)
    a, b = (t.numpy() - t.numpy().mean(0) for t in (one, other))
    feature = np.linalg.norm(b.T @ a) ** 2 / (np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b))
    assert linear_cka(one, other) == pytest.approx(feature, rel=1e-12)
    assert linear_cka(torch.ones(3, 2), torch.ones(3, 2)) == 1  # nothing varies: nothing has changed


def test_plasticity_is_zero_for_equal_states_and_by_hand_for_two_rows():
    states = normal(7, 5)
    assert plasticity(states, states.clone()) == 0
    assert plasticity(states, 4 * states) == pytest.approx(0, abs=1e-14)  # its rows are normalised
    # Gram matrices [[1, 0], [0, 1]] and [[1, 1], [1, 2]], rows normalised
    one, other = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    b = np.array([[1, 1], [1, 2]]) / np.sqrt([[2], [5]])
    assert plasticity(one, other) == pytest.approx(((np.eye(2) - b) ** 2).sum() / 4, rel=1e-12)


def test_influence_is_0_for_the_identity_and_2_for_the_negation_and_masked_positions_do_not_count():
    states, mask = normal(2, 5, 8).float(), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert influence(states, states, mask).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert influence(states, -states, mask).tolist() == pytest.approx([2, 2], abs=1e-6)
    spoilt = torch.where(mask.bool().unsqueeze(-1), states, -states)
    assert influence(states, spoilt, mask).tolist() == pytest.approx([0, 0], abs=1e-6)
    half = states.clone()
    half[1, :2] *= -1  # two of five tokens
    assert influence(states, half, mask).tolist() == pytest.approx([0, 0.8], abs=1e-6)


def test_similarity_scores_find_the_layer_that_changes_the_states():
    """Planted: layer 2 alone does more than turn and scale; the reference's layers 2 and 3 then differ, 0 and 1 do not."""
    spaces = [normal(6, 4, 5).float()]
    for k in range(4):
        last = spaces[-1]
        spaces.append(last + normal(6, 4, 5, seed=9).float() if k == 2 else 1.5 * last.flip(-1))
    straight = list(itertools.accumulate(range(4), lambda last, _: 1.5 * last.flip(-1), initial=spaces[0]))
    seen = Observations(by_hand(), spaces=spaces, reference_spaces=straight)
    for name in ("cka_consecutive", "cka_reference", "plasticity_reference"):
        found = layers_of(SCORES[name].compute(seen))
        assert found[:2] == pytest.approx([0, 0], abs=1e-6), name
        assert found[2] > 0.05 * (name != "plasticity_reference") + 1e-3, name
    assert layers_of(SCORES["cka_consecutive"].compute(seen))[3] == pytest.approx(0, abs=1e-6)


# -- deviation -----------------------------------------------------------------------------------------------------


def plain_basis(head: np.ndarray, labels: list[int]) -> list[list[float]]:
    """(U'U + eps I)^-1 U[y] with loops and Gaussian elimination; nothing of torch or LAPACK."""
    rows, width = len(head), len(head[0])
    gram = [[sum(head[r][i] * head[r][j] for r in range(rows)) for j in range(width)] for i in range(width)]
    ridge = RIDGE * sum(gram[i][i] for i in range(width)) / width
    found = []
    for label in labels:
        table = [
            [gram[i][j] + (ridge if i == j else 0.0) for j in range(width)] + [head[label][i]] for i in range(width)
        ]
        for i in range(width):
            pivot = max(range(i, width), key=lambda r: abs(table[r][i]))
            table[i], table[pivot] = table[pivot], table[i]
            for r in range(i + 1, width):
                factor = table[r][i] / table[i][i]
                table[r] = [a - factor * b for a, b in zip(table[r], table[i], strict=True)]
        solution = [0.0] * width
        for i in reversed(range(width)):
            known = sum(table[i][j] * solution[j] for j in range(i + 1, width))
            solution[i] = (table[i][width] - known) / table[i][i]
        found.append(solution)
    return found


def test_the_semantic_basis_is_the_pseudo_inverse_rows():
    """Oracle: torch.linalg.pinv of the head's transpose. 5000 rows: more than one of its parts."""
    head, labels = normal(5000, 24).float(), torch.tensor([3, 3, 4999, 0, 4096])
    expected = torch.linalg.pinv(head.double().T)[labels]
    found = semantic_basis(head, labels)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=1).min() > 1 - 1e-9
    assert (found - expected).norm() < 1e-5 * expected.norm()  # the ridge shortens it by 1e-6 of itself or so


def test_the_semantic_basis_is_a_plain_references():
    head, labels = normal(12, 5), [7, 0, 11]
    expected = np.array(plain_basis(head.tolist(), labels))
    assert semantic_basis(head, torch.tensor(labels)).numpy() == pytest.approx(expected, rel=1e-9)


def test_a_head_without_full_rank_still_has_a_basis():
    head = normal(10, 3) @ normal(3, 6, seed=1)
    assert semantic_basis(head, torch.arange(10)).isfinite().all()


@pytest.mark.parametrize("number", [8, 60], ids=["fewer examples than dimensions", "more"])
def test_the_fitted_basis_is_ridge_regression_in_its_primal_form(number):
    """Oracle: (X'X + lambda I)^-1 X'Y, explicitly, on centred states and one-hot labels."""
    states, labels = normal(number, 20).float() + 3, torch.arange(number) % 3
    x = states.double() - states.double().mean(0)
    y = torch.eye(3, dtype=torch.float64)[labels]
    penalty = FIT_RIDGE * x.square().sum() / number
    primal = torch.linalg.inv(x.T @ x + penalty * torch.eye(20, dtype=torch.float64)) @ x.T @ (y - y.mean(0))
    found = fitted_basis(states, labels, 3)
    assert found.numpy() == pytest.approx(primal.T.numpy(), rel=1e-8, abs=1e-12)


def test_deviation_is_one_less_the_cosine():
    states = torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0], [1.0, 1.0]]])
    expected = [[0.0, 1.0, 2.0, 1 - math.sqrt(0.5)]]
    assert deviation(states, torch.tensor([[3.0, 0.0]])).numpy() == pytest.approx(np.array(expected), abs=1e-12)


@pytest.mark.parametrize("jump", range(5))
def test_every_gain_finds_a_planted_jump(jump):
    """Traces that fall by 0.02 everywhere and by 0.5 at one layer, noise from example to example."""
    noise = np.random.default_rng(jump).normal(0, 2e-3, (10, 6))
    steps = np.full(5, -0.02)
    steps[jump] = -0.5
    traces = 0.95 + np.concatenate([[0], steps.cumsum()]) + noise
    seen = Observations(by_hand(5), traces={"deviation": traces, "logit_lens": 4 * traces})
    for gain in "abcd":
        assert top(SCORES[f"deviation_{gain}"].compute(seen)) == f"layers.{jump}", gain
    assert top(SCORES["logit_lens"].compute(seen)) == f"layers.{jump}"
    assert sum(layers_of(SCORES["deviation_d"].compute(seen))) == pytest.approx(1, rel=1e-12)  # shares of the whole
    assert layers_of(SCORES["deviation_a"].compute(seen)) == pytest.approx(list(-np.diff(traces).mean(0)), abs=1e-12)


# -- spectrum ------------------------------------------------------------------------------------------------------


def plain_snr(values: np.ndarray, edge: float) -> float:
    noise = values[values <= edge].sum()
    return values[values > edge].sum() / (noise if noise else 1.0) / values.max()


def quartiles(values: np.ndarray) -> float:
    """The nearest order statistic, as the code takes it; numpy's default would lie between two of them."""
    low, high = np.quantile(values, [0.25, 0.75], method="nearest")
    return (high - low) / 1.349


def with_signal(shape: tuple[int, int], strength: float, seed: int = 0) -> torch.Tensor:
    """N(0, 1) noise and four directions at `strength` times the noise's edge."""
    left, right = (torch.linalg.qr(normal(size, 4, seed=seed + 7)).Q for size in shape)
    edge = math.sqrt(max(shape)) + math.sqrt(min(shape))
    return normal(*shape, seed=seed) + strength * edge * left @ right.T


@pytest.mark.parametrize("shape", [(48, 48), (96, 40), (40, 96)])
@pytest.mark.parametrize("strength", [0, 3])
def test_the_spectrum_is_a_plain_numpy_one(shape, strength):
    """numpy's SVD, `nearest` quartiles and numpy.linalg.cond. Interpolated quartiles move the edge of 40 values by a few per cent."""
    matrix = with_signal(shape, strength).numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    widening = 1 + math.sqrt(min(shape) / max(shape))
    found = spectrum_of(torch.from_numpy(matrix))
    assert found["snr"] == pytest.approx(plain_snr(values, quartiles(values) * widening), rel=1e-4)
    textbook = quartiles(matrix.flatten()) * math.sqrt(max(shape)) * widening
    assert found["snr_textbook"] == pytest.approx(plain_snr(values, textbook), rel=1e-4, abs=1e-9)
    assert found["condition_number"] == pytest.approx(-np.linalg.cond(matrix), rel=1e-3)


def test_noise_has_nothing_above_the_textbook_edge_and_a_planted_signal_has():
    """Marchenko and Pastur: the largest singular value of noise converges to the edge; 200 x 400 is within 3 % of it."""
    for seed in range(3):
        noise = spectrum_of(with_signal((200, 400), 0, seed))["snr_textbook"]
        planted = [spectrum_of(with_signal((200, 400), strength, seed))["snr_textbook"] for strength in (1.5, 3)]
        assert noise < 6e-4  # at most one of 200 values, over the sum of the rest
        assert min(planted) > 1e-3


def test_spectrums_published_ratio_prefers_noise_to_a_few_strong_directions():
    """What the published formula does, held so that nobody takes it for the textbook's: its edge is the *spread* of the singular
    values, which noise exceeds by itself, and its division by the largest value makes a planted signal score lower."""
    noise, planted = (spectrum_of(with_signal((96, 96), strength))["snr"] for strength in (0, 4))
    assert noise > planted > 0


def test_a_layer_with_signal_is_on_top_by_the_textbook_edge():
    anatomy = by_hand(shape=(64, 48))
    numbers = {f"{k}.q.weight": spectrum_of(with_signal((64, 48), 3 * (k == 2), seed=k)) for k in range(4)}
    spectra = {score: {name: row[score] for name, row in numbers.items()} for score in numbers["0.q.weight"]}
    found = SCORES["snr_textbook"].compute(Observations(anatomy, spectra=spectra))
    assert top(found) == "layers.2"
    assert found["layers.2"] == 1
    assert found["2.q.weight"] == numbers["2.q.weight"]["snr_textbook"]  # of a tensor the number itself, not its rank


def test_a_layers_spectrum_score_is_the_mean_rank_within_types():
    """By hand: two types of very different scale, ranked apart."""
    blocks = [
        Layer(f"layers.{k}", (Tensor(f"{k}.q.weight", (4, 4), "q"), Tensor(f"{k}.up.weight", (4, 4), "up")), str(k))
        for k in range(3)
    ]
    values = dict(zip([t.name for b in blocks for t in b.tensors], [1.0, 500.0, 2.0, 400.0, 3.0, 450.0], strict=True))
    found = SCORES["snr"].compute(Observations(Anatomy("by hand", "none", tuple(blocks)), spectra={"snr": values}))
    assert layers_of(found) == [(0 + 1) / 2, (0.5 + 0) / 2, (1 + 0.5) / 2]


# -- gradients and change, against autograd and torch's AdamW -----------------------------------------------------


class Plain:
    """The recipe's calibration data and model, and gradients by plain autograd in fp64."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, options = recipe, recipe.analyze
        _, self.data, module = load_task(recipe)
        self.module, self.size = module.double().eval(), options.batch_size
        self.examples = calibration_sample(self.data, options.num_examples, options.seed)
        self.anatomy = read_anatomy(module, "plain")
        self.named = dict(module.named_parameters())
        self.batches = [
            range(k, min(k + self.size, options.num_examples)) for k in range(0, options.num_examples, self.size)
        ]

    def gradients(self, rows, *, summed: bool = False) -> dict[str, torch.Tensor]:
        """Of the mean, or the sum, over the predicted tokens of -log p, written out."""
        self.module.zero_grad()
        batch = self.data.collate([self.examples[int(k)] for k in rows])
        logits = self.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        chosen = labels != -100
        logp = logits.log_softmax(-1)[chosen].gather(1, labels[chosen].unsqueeze(1))
        (-logp.sum() if summed else -logp.mean()).backward()
        return {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}

    def by_layer(self, per_tensor: dict) -> list:
        return [sum(per_tensor[t.name] for t in layer.tensors) for layer in self.anatomy.blocks]

    @property
    def sizes(self) -> list[int]:
        return self.by_layer({name: p.numel() for name, p in self.named.items()})


def with_scores(folder: Path, scores: list[str], **analyze_options) -> Recipe:
    options = {"num_examples": 10, "batch_size": 4, "scores": scores, **analyze_options}
    return calibrated(folder, task="causal_lm", data=language_data(folder / "text"), analyze=options)


def measured(recipe: Recipe) -> dict[str, dict[str, float]]:
    return {name: found["scores"] for name, found in analyze(recipe)["all"].items()}


def test_gradient_scores_are_autograds(tmp_path):
    """Three batches, of 4, 4 and 2 examples. Layers and single tensors; a tensor's scale is its layer's."""
    recipe = with_scores(tmp_path, ["gradient_norm", "gradient_norm_by_size", "auto_rgn"])
    found, plain = measured(recipe), Plain(recipe)
    squared = [{n: float(g.square().sum()) for n, g in plain.gradients(rows).items()} for rows in plain.batches]
    norms = np.mean([np.sqrt(plain.by_layer(row)) for row in squared], axis=0)
    weights = np.sqrt(plain.by_layer({n: float(p.detach().square().sum()) for n, p in plain.named.items()}))
    assert layers_of(found["gradient_norm"]) == pytest.approx(norms, rel=1e-4)
    assert layers_of(found["gradient_norm_by_size"]) == pytest.approx(norms / np.sqrt(plain.sizes), rel=1e-4)
    assert layers_of(found["auto_rgn"]) == pytest.approx(norms / weights, rel=1e-4)
    for layer in plain.anatomy.blocks:
        for t in layer.tensors:
            expected = np.mean([math.sqrt(row[t.name]) for row in squared])
            assert found["gradient_norm"][t.name] == pytest.approx(expected, rel=1e-4), t.name
            own = float(plain.named[t.name].detach().norm())
            assert found["auto_rgn"][t.name] == pytest.approx(expected / own, rel=1e-4), t.name


def test_fisher_is_the_mean_of_squared_gradients_of_single_examples(tmp_path):
    """Of -log p of all an example's tokens, not of their mean; blocks of different length."""
    recipe = with_scores(tmp_path, ["fisher"])
    found, plain = measured(recipe)["fisher"], Plain(recipe)
    each = [plain.gradients([k], summed=True) for k in range(10)]
    mean = {name: float(sum(g[name].square().sum() for g in each)) / 10 for name in plain.named}
    assert layers_of(found) == pytest.approx(np.divide(plain.by_layer(mean), plain.sizes), rel=1e-4)
    name = plain.anatomy.blocks[1].tensors[0].name
    assert found[name] == pytest.approx(mean[name] / plain.named[name].numel(), rel=1e-4)


def test_greentrainer_is_the_loss_that_adamws_first_step_takes_away(tmp_path):
    """Oracle: a step of torch.optim.AdamW on each batch, from the start, in fp64; -g . dw over its learning rate."""
    recipe = with_scores(tmp_path, ["greentrainer"])
    found, plain, rate = measured(recipe)["greentrainer"], Plain(recipe), 1e-3
    drops = []
    for rows in plain.batches:
        gradients = plain.gradients(rows)
        moved = {name: p.detach().clone().requires_grad_() for name, p in plain.named.items()}
        for name, p in moved.items():
            p.grad = gradients[name].clone()
        torch.optim.AdamW(moved.values(), lr=rate, eps=recipe.train.adam_epsilon, weight_decay=0.0).step()
        steps = {name: moved[name].detach() - plain.named[name].detach() for name in moved}
        drops.append(plain.by_layer({name: -float((gradients[name] * steps[name]).sum()) / rate for name in moved}))
    assert layers_of(found) == pytest.approx(np.mean(drops, axis=0), rel=1e-3)


def hand_steps(plain: Plain, half: np.ndarray) -> Iterator[dict[str, float]]:
    """The probe's steps by torch's AdamW and clipping, each with its gradients' L1 norms by tensor; the weights are put back at the end."""
    recipe, start = plain.recipe, {name: p.detach().clone() for name, p in plain.named.items()}
    o = recipe.train
    optimizer = torch.optim.AdamW(plain.named.values(), lr=o.learning_rate, eps=o.adam_epsilon, weight_decay=0.0)
    for rows in np.resize(half, (recipe.analyze.probe_steps, plain.size)):
        norms = {name: float(g.abs().sum()) for name, g in plain.gradients(rows).items()}
        nn.utils.clip_grad_norm_(plain.named.values(), o.max_grad_norm)
        optimizer.step()
        yield norms
    with torch.no_grad():
        for name, p in plain.named.items():
            p.copy_(start[name])


def hand_run(plain: Plain, half: np.ndarray) -> dict[str, tuple[float, float]]:
    """(squared distance, squared start) of each tensor after the probe's steps."""
    start = {name: p.detach().clone() for name, p in plain.named.items()}
    moved: dict[str, tuple[float, float]] = {}
    for _ in hand_steps(plain, half):
        moved = {
            n: (float((p.detach() - start[n]).square().sum()), float(start[n].square().sum()))
            for n, p in plain.named.items()
        }
    return moved


def test_change_scores_are_a_hand_run_adamws(tmp_path):
    """Three steps of 4 on halves of 5: a step goes round the end of its half. Clipping is on, and bites."""
    recipe = with_scores(tmp_path, ["change_l2", "change_relative", "change_rms"], probe_steps=3)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_grad_norm": 0.1})})
    found, plain = measured(recipe), Plain(recipe)
    runs = [hand_run(plain, half) for half in halves_of(10)]
    sums = [np.array([plain.by_layer({n: v[side] for n, v in run.items()}) for run in runs]) for side in (0, 1)]
    assert layers_of(found["change_l2"]) == pytest.approx(np.sqrt(sums[0]).mean(0), rel=1e-3)
    assert layers_of(found["change_relative"]) == pytest.approx(np.sqrt(sums[0] / sums[1]).mean(0), rel=1e-3)
    assert layers_of(found["change_rms"]) == pytest.approx(np.sqrt(sums[0] / plain.sizes).mean(0), rel=1e-3)


def test_gates_open_for_a_change_that_helps_and_close_for_one_that_hurts(tmp_path):
    """Planted: layer 0 moves down the loss's gradient, layer 3 up it, layers 1 and 2 stay. The weights are put back to the bit."""
    recipe = with_scores(tmp_path, ["ila"], gate_steps=6)
    plain = Plain(recipe)
    gradients = plain.gradients(range(10))
    direction = {"layers.0": -1, "layers.3": 1}
    delta = {
        t.name: (direction.get(layer.name, 0) * gradients[t.name]).float()
        for layer in plain.anatomy.blocks
        for t in layer.tensors
    }
    _, data, module = load_task(recipe)
    engine = evaluation_engine(module, plain.anatomy, recipe)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    gates = fit_gates(Bench(recipe, plain.anatomy, data, plain.examples, engine), np.arange(10), delta)
    assert gates[0] > 0.5
    assert gates[3] < -0.5
    assert gates[1:3] == [0, 0]
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())


# -- magnitude and the gradient's change, against plain torch ---------------------------------------------------------


def test_weight_norm_is_torchs(tmp_path):
    """Of a layer: the norm of all its tensors together. It needs no data, so no half of them would say otherwise."""
    recipe = with_scores(tmp_path, ["weight_norm"])
    content, plain = analyze(recipe), Plain(recipe)
    found = content["all"]["weight_norm"]
    for layer in plain.anatomy.blocks:
        tensors = {t.name: plain.named[t.name].detach().flatten() for t in layer.tensors}
        assert found["scores"][layer.name] == pytest.approx(float(torch.cat(list(tensors.values())).norm()), rel=1e-6)
        for name, tensor in tensors.items():
            assert found["scores"][name] == pytest.approx(float(tensor.norm()), rel=1e-6)
    assert found["spearman"] is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_wanda_is_weights_times_inputs(tmp_path, kind):
    """Oracle: all inputs of every matrix kept, example by example without padding, in fp64; |W| ||x|| summed over the matrix. GPT-2's
    matrices lie the other way round, and its qkv counts as the one matrix it is."""
    recipe = with_scores(tmp_path, ["wanda"])
    if kind == "gpt2":
        recipe = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"name": str(gpt2_folder(tmp_path / "gpt2"))})}
        )
    found, plain = measured(recipe)["wanda"], Plain(recipe)
    seen: dict[str, list[torch.Tensor]] = {}
    for tensor in (t for t in plain.anatomy.block_tensors if len(t.shape) == 2):
        owner = plain.module.get_submodule(tensor.module)
        owner.register_forward_pre_hook(
            lambda _, args, name=tensor.name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for k in range(10):
            plain.module(input_ids=torch.as_tensor(plain.examples[k]["input_ids"]).unsqueeze(0))
    assert set(seen) == {name for name in found if not name.startswith("layers.")}
    for name, inputs in seen.items():
        norms = torch.cat(inputs).norm(dim=0)
        weight = plain.named[name].detach().abs()
        weight = weight.T if plain.anatomy.by_name[name].fan_in_fan_out else weight
        assert found[name] == pytest.approx(float((weight * norms).sum()), rel=1e-4), name
    for layer in plain.anatomy.blocks:
        assert found[layer.name] == pytest.approx(sum(found[t.name] for t in layer.tensors if t.name in seen), rel=1e-9)


def test_wanda_of_two_inputs_by_hand():
    """Columns 3 and 4, norms 2 and 5 over both halves: 3 * 2 + 4 * 5."""
    anatomy = by_hand(layers=1, shape=(8, 2))
    inputs = [{"0.q.weight": np.array([1.0, 9.0])}, {"0.q.weight": np.array([3.0, 16.0])}]
    seen = Observations(anatomy, inputs=inputs, columns={"0.q.weight": np.array([3.0, 4.0])})
    assert SCORES["wanda"].compute(seen) == {"layers.0": 26, "0.q.weight": 26}


def test_the_gradients_change_is_that_of_a_hand_run(tmp_path):
    """Oracle: torch's AdamW on each half of the examples, five steps, the L1 norms before clipping: the mean of steps 0 and 1 against that
    of 2, 3 and 4."""
    recipe = with_scores(tmp_path, ["gradient_norm_change"], probe_steps=5)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_grad_norm": 0.1})})
    found, plain = measured(recipe)["gradient_norm_change"], Plain(recipe)
    expected = np.zeros(len(plain.anatomy.blocks))
    for half in halves_of(10):
        norms = np.asarray([plain.by_layer(row) for row in hand_steps(plain, half)])
        first, second = norms[:2].mean(axis=0), norms[2:].mean(axis=0)
        expected += np.abs(first - second) / first / 2
    assert layers_of(found) == pytest.approx(expected, rel=1e-3)
    with pytest.raises(UserError, match="probe_steps=2"):
        analyze(with_scores(tmp_path / "one", ["gradient_norm_change"], probe_steps=1))
    assert "gradient_norm_change" not in requested(with_scores(tmp_path / "two", ["change"], probe_steps=1).analyze)


# -- tables --------------------------------------------------------------------------------------------------------


@cache
def seen_by_hand() -> Observations:
    """Numbers in every table; 11 examples, 5 batches."""
    anatomy, random = by_hand(), np.random.default_rng(0)
    names = [t.name for layer in anatomy.blocks for t in layer.tensors]
    tables = {
        "influence": random.random((11, 4)), "ablation": random.normal(size=(11, 4)), "fisher": random.random((11, 8)),
        "gradients": random.random((5, 8)), "first_step": random.random((5, 8)),
    }  # fmt: skip
    return Observations(
        anatomy, tables,
        traces={"deviation": random.random((11, 5)), "logit_lens": random.random((11, 5))},
        spaces=[normal(11, 2, 6, seed=k).float() for k in range(5)],
        reference_spaces=[normal(11, 2, 6, seed=k + 5).float() for k in range(5)],
        weights={name: 1.0 + k for k, name in enumerate(names)},
        changes=[{name: Change(0.5 + k * s, 2.0) for k, name in enumerate(names)} for s in (1, 2)],
        gates=[[0.1, 0.4, -0.2, 0.0], [0.3, 0.2, 0.1, -1.0]],
        spectra={score: {f"{k}.q.weight": float(k) for k in range(4)} for score in ("snr", "snr_textbook", "condition_number")},
        inputs=[{f"{k}.q.weight": random.random(6) for k in range(4)} for _ in range(2)],
        columns={f"{k}.q.weight": random.random(6) for k in range(4)},
        sizes=[{name: (1.0 + s, 1.5 + k) for k, name in enumerate(names)} for s in (1, 2)],
    )  # fmt: skip


def test_the_order_of_the_rows_changes_no_score():
    """To the bit; for CKA and plasticity, whose sums BLAS orders, to fp64's rounding. (An analysis sorts its examples by content.)"""
    seen, random = seen_by_hand(), np.random.default_rng(1)
    rows, batches = random.permutation(11), random.permutation(5)
    mixed = Observations(
        seen.anatomy,
        {name: table[rows if len(table) == 11 else batches] for name, table in seen.tables.items()},
        {name: trace[rows] for name, trace in seen.traces.items()},
        spaces=[space[rows] for space in seen.spaces],
        reference_spaces=[space[rows] for space in seen.reference_spaces],
        weights=seen.weights, changes=seen.changes, gates=seen.gates, spectra=seen.spectra,
        inputs=seen.inputs, columns=seen.columns, sizes=seen.sizes,
    )  # fmt: skip
    for name, score in SCORES.items():
        one, other = score.compute(seen), score.compute(mixed)
        if name.startswith(("cka", "plasticity")):
            assert other == pytest.approx(one, rel=1e-12), name
        else:
            assert other == one, name


def test_the_halves_are_disjoint_and_cover_everything_with_the_same_examples_in_every_table():
    numbers = np.arange(11.0).reshape(-1, 1)
    seen = Observations(
        by_hand(),
        {"influence": numbers, "fisher": numbers, "gradients": np.arange(5.0).reshape(-1, 1)},
        {"deviation": numbers},
        spaces=[torch.arange(11.0).reshape(-1, 1, 1)],
        changes=[{"one": Change(1, 1)}, {"other": Change(2, 2)}],
        gates=[[1.0], [2.0]],
        inputs=[{"m": np.ones(1)}, {"m": np.zeros(1)}],
        sizes=[{"one": (1, 1)}, {"other": (1, 1)}],
    )
    one, other = seen.halves(np.random.default_rng(3))
    for table, size in (("influence", 11), ("gradients", 5)):
        both = [half.tables[table].flatten().tolist() for half in (one, other)]
        assert sorted(both[0] + both[1]) == list(range(size))
        assert [len(side) for side in both] == [(size + 1) // 2, size // 2]
    for half in (one, other):
        rows = half.tables["influence"].tolist()
        assert half.tables["fisher"].tolist() == half.traces["deviation"].tolist() == rows
        assert half.spaces[0].flatten(1).tolist() == rows
    assert [one.gates, other.gates] == [[[1.0]], [[2.0]]]
    assert [list(half.changes[0]) for half in (one, other)] == [["one"], ["other"]]
    assert [list(half.sizes[0]) for half in (one, other)] == [["one"], ["other"]]
    assert [float(half.inputs[0]["m"][0]) for half in (one, other)] == [1, 0]
    assert one.tables["influence"].tolist() != seen.halves(np.random.default_rng(4))[0].tables["influence"].tolist()
