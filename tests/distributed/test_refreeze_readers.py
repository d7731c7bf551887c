"""What DeepSpeed's own readers, and its and torch's learning-rate schedulers, find after a refreeze.

Oracles: the masters and moments read before the tensors left; the rates of an engine that never changed its set.
"""

from __future__ import annotations

import warnings

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from forks import run_ranks
from refreeze_kit import ALL, Case, loss_of, make_engine, names_of
from tiny import config_of, recipe_of, tiny_llama

from dsfreeze.engine.layout import flats_of, group_numbers
from dsfreeze.engine.process import process_group
from dsfreeze.engine.refreeze import refreeze

pytestmark = pytest.mark.slow

AWAY = names_of(1, also=("0.self_attn", "norm"))


def step(engine, case, number, rank):
    engine.backward(loss_of(engine, number, rank, 0, case))
    engine.step()


def read(engine, names):
    """Masters of the named, and their moments."""
    named = dict(engine.module.named_parameters())
    return {
        (name, kind): safe_get_full_optimizer_state(named[name], kind)
        if kind
        else safe_get_full_fp32_param(named[name])
        for name in names
        for kind in ("", "exp_avg", "exp_avg_sq")
    }


def away_and_back(zero, method, sections):
    """Names of what reads otherwise after five steps and three refreezes, the first right after the switch."""
    case, odd = Case("freeze", zero, bf16=True, mixed_groups=True, sections=sections), []
    with process_group(recipe_of()) as ranks:
        for rule in ("keep", "offload", "clear"):
            engine = make_engine(case, ALL)
            for number in range(5):
                step(engine, case, number, ranks.rank)
            before = read(engine, ALL)
            engine = refreeze(engine, AWAY, rule, method=method)
            after = read(engine, ALL)
            odd += [(rule, key) for key in before if not same(after[key], before[key] if key[0] in AWAY else None)]
            engine = refreeze(engine, names_of(3, also=("lm_head",)), rule, method=method)
            engine = refreeze(engine, ALL, rule, method=method)
            masters = {key: value for key, value in before.items() if rule != "clear" or not key[1]}
            after = {key: read(engine, [key[0]])[key] if rule != "clear" else master(engine, key[0]) for key in masters}
            odd += [(rule, key) for key in masters if not same(after[key], masters[key])]
            step(engine, case, 5, ranks.rank)
            assert all(value is not None for value in read(engine, ALL).values())  # also of groups that were fresh
        return odd


def master(engine, name):
    return safe_get_full_fp32_param(dict(engine.module.named_parameters())[name])


def same(one, other):
    return one is other is None or (one is not None and other is not None and torch.equal(one, other))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["in_place", "anew"])
@pytest.mark.parametrize(
    ("zero", "sections"),
    [("zero1", {}), ("zero2", {}), ("zero2_offload", {}), ("zero3", {})],
)
def test_masters_and_moments_are_read_as_they_were(zero, sections, method):
    """peers.md row 36; upstream loses nearly all of what five small steps changed. None for what is frozen; upstream
    raises `exp_avg not found` in every group but the first."""
    assert run_ranks(away_and_back, zero, method, sections) == [[], []]


# -- learning rates --------------------------------------------------------------------------------------------------

LAMBDA = torch.optim.lr_scheduler.LambdaLR
SCHEDULERS = {
    "WarmupLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 8},
    "WarmupDecayLR": {"warmup_min_lr": 0.0, "warmup_max_lr": 0.01, "warmup_num_steps": 3, "total_num_steps": 12},
    "WarmupCosineLR": {"warmup_num_steps": 3, "total_num_steps": 12},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.01, "cycle_first_step_size": 4},
    "LambdaLR": lambda o: LAMBDA(o, lambda n: 1 - n / 20),
    "LambdaLRs": lambda o: LAMBDA(o, [lambda n: 1 - n / 20, lambda n: 1 / (1 + n)]),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12, eta_min=1e-4),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o, total_iters=10),
    "SequentialLR": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [LAMBDA(o, lambda n: (n + 1) / 4), torch.optim.lr_scheduler.CosineAnnealingLR(o, 8)], [4]
    ),
}


def scheduled(name):
    """An engine whose gains have a rate of their own."""
    model, choice = tiny_llama(), SCHEDULERS[name]
    flat, round_ = ([p for p in model.parameters() if (p.dim() > 1) is matrices] for matrices in (True, False))
    optimizer = torch.optim.AdamW([{"params": flat, "lr": 5e-3}, {"params": round_, "lr": 2e-3}])
    config = config_of(recipe_of("zero1"), 2)
    if isinstance(choice, dict):
        config["scheduler"], choice = {"type": name, "params": choice}, None
    return deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=choice, config=config, dist_init_required=False
    )[0]


def rates(engine, rank):
    groups = engine.basic_optimizer.param_groups
    pairs = zip(flats_of(engine, rank, 2), group_numbers(engine), strict=True)
    return {name: groups[number]["lr"] for flat, number in pairs for name in flat.names}


def follow(name, method):
    """The largest difference of a tensor's rate from that of the unchanged engine, over twelve steps."""
    case, worst = Case("freeze", "zero1"), 0.0
    matrices = [n for n in names_of(1, 2) if "norm" not in n]  # the gains' group is all away
    sets = {0: names_of(3), 3: matrices, 6: names_of(0, 1), 9: ALL}
    with process_group(recipe_of()) as ranks:
        changing, unchanged = scheduled(name), scheduled(name)
        for number in range(12):
            if number in sets:
                changing = refreeze(changing, sets[number], method=method)
            expected, found = rates(unchanged, ranks.rank), rates(changing, ranks.rank)
            assert set(found) == set(sets[number - number % 3])
            worst = max(worst, *(abs(found[n] - expected[n]) for n in found))
            for engine in (changing, unchanged):
                step(engine, case, number, ranks.rank)
        return worst


@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_learning_rates_are_those_of_an_unchanged_engine(name):
    """peers.md row 35: upstream leaves new groups at a stale rate, or raises `zip()`."""
    assert max(run_ranks(follow, name, "in_place")) < 1e-12


def test_learning_rates_after_building_anew():
    assert max(run_ranks(follow, "WarmupDecayLR", "anew")) < 1e-12


def unknown_rates():
    """A scheduler whose rates are products, each step from the last: what it would say of a group that was away is lost."""
    with process_group(recipe_of()):
        model = tiny_llama()
        groups = [
            {"params": [p for p in model.parameters() if (p.dim() > 1) is flat], "lr": 5e-3} for flat in (True, False)
        ]
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.AdamW(groups), config=config_of(recipe_of("zero1"), 2), dist_init_required=False,
            lr_scheduler=lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda n: 0.9),
        )  # fmt: skip
        matrices = [n for n in ALL if "norm" not in n]
        said = []
        for wanted in (names_of(1, 2), matrices, names_of(0, 3)):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                refreeze(engine, wanted)
            said.append([str(w.message) for w in told if "does not tell rates" in str(w.message)])
        return said


def test_a_rate_that_nobody_knows_is_said():
    """Oracle: which sets hold a gain while the gains' group was away: the last alone."""
    for first, second, third in run_ranks(unknown_rates):
        assert (first, second) == ([], [])
        assert len(third) == 1
        assert third[0].startswith("MultiplicativeLR")


def own_rates():
    """Rates by tensor: given ones stay with their tensors, the others follow what is written to their group."""
    case = Case("freeze", "zero2")
    with process_group(recipe_of()) as ranks:
        engine = make_engine(case, names_of(2, 3))
        low = {n: {"lr": 1e-4} for n in names_of(2)}
        engine = refreeze(engine, names_of(2, 3), settings=low)  # the same set, and yet it counts
        found = rates(engine, ranks.rank)
        assert {found[n] for n in names_of(2)} == {1e-4}
        assert {found[n] for n in names_of(3)} == {5e-3}
        for group in engine.basic_optimizer.param_groups:
            group["lr"] = 3e-3 if group["lr"] == 5e-3 else group["lr"]
        engine = refreeze(engine, names_of(1, 3))
        engine = refreeze(engine, names_of(1, 2, 3))
        found = rates(engine, ranks.rank)
        assert {found[n] for n in names_of(2)} == {1e-4}
        assert {found[n] for n in names_of(1, 3)} == {3e-3}


def test_rates_given_by_name():
    run_ranks(own_rates)
