"""The price of a plan: FLOPs against torch's own counter, bytes against the formulas measured on live engines."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from itertools import pairwise

import anatomies
import pytest

from dsfreeze.activations import TaskActivations
from dsfreeze.anatomy import Anatomy, Layer, Tensor
from dsfreeze.errors import UserError
from dsfreeze.estimate import Estimate, estimate
from dsfreeze.estimate.flops import flops, recomputed_flops
from dsfreeze.estimate.states import aligned
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import FreezeOptions
from dsfreeze.strategies import make_plan

TOY = anatomies.llama(depth=8, d=16, vocab=1000)
PLANS = {
    "full": {"strategy": "full"},
    "BOT50": {"count": 4},
    "BOT50, embedding trainable": {"count": 4, "embed": "train"},
    "TOP50": {"strategy": "top", "count": 4},
    "INT50": {"strategy": "interval", "fraction": 0.5},
    "INT50, embedding frozen": {"strategy": "interval", "fraction": 0.5, "offset": 0},
    "BOT75": {"count": 6},
}


def plan_of(anatomy, **options) -> FreezePlan:
    return make_plan(anatomy, FreezeOptions(**options))


def price(anatomy, options: dict, **more) -> Estimate:
    return estimate(anatomy, plan_of(anatomy, **options), **more)


@pytest.mark.parametrize(
    ("name", "layers_worth"),
    [("full", 24), ("BOT50", 16), ("BOT50, embedding trainable", 20), ("TOP50", 20), ("INT50", 20),
     ("INT50, embedding frozen", 19), ("BOT75", 12)],
)  # fmt: skip
def test_layers_worth(name, layers_worth):
    """Oracle: T of a step in units of one layer's forward, measured by torch's counter on such a toy (head apart)."""
    cost = price(TOY, PLANS[name], sequence_length=0)
    head = 3 * TOY.layer("head").flops_per_token
    assert (cost.flops_per_token - head) / TOY.layer("layers.0").flops_per_token == layers_worth


def test_a_frozen_input_norm_spares_the_lowest_input_gradient():
    """Oracle: dX of q, k, v = 3 d^2 of the 16 d^2 of a layer (gated feed-forward, 4 d wide): T 16 -> 15.81."""
    anatomy = anatomies.llama(depth=8, d=16, vocab=1000)
    whole = price(anatomy, {"count": 4}, sequence_length=0)
    spared = price(anatomy, {"trainable": ["layers.[4-7]", "norm", "head"], "frozen": ["layers.4.input_layernorm"]},
                   sequence_length=0)  # fmt: skip
    assert whole.flops_per_token - spared.flops_per_token == 2 * 3 * 16 * 16


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_flops_against_torchs_counter(name, tied):
    """Oracle: FlopCounterMode over forward and backward of an eager Llama; the stated error is 0."""
    measured, cost = measure(llama(tied), PLANS[name])
    assert cost.flops_per_token == measured


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "lora"},
        {"strategy": "attention", "count": 2},
        {"strategy": "norms"},
        {"granularity": "matrix", "count": 20},
        {"trainable": ["layers.2.mlp.down_proj"]},
        {"trainable": ["layers.2.self_attn.o_proj"]},
        {"trainable": ["layers.2.mlp.up_proj", "layers.5"]},
    ],
)
def test_flops_of_plans_inside_layers(options):
    """Oracle: the same counter; here the order of tensors within the lowest trainable layer decides."""
    measured, cost = measure(llama(), options)
    assert cost.flops_per_token == measured


def test_flops_with_a_frozen_key_below_all():
    """Oracle: the same counter, short of one of four products that eager attention skips and the formula counts."""
    measured, cost = measure(llama(), {"strategy": "lora", "count": 4, "adapter": {"categories": ["q", "v"]}})
    assert cost.flops_per_token - measured == 2 * 32 * 64


def test_flops_of_a_post_norm_encoder():
    """Oracle: the same counter on BERT; its head runs once a sequence, hence the wider bound."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=256, vocab_size=100,
        attn_implementation="eager",
    )  # fmt: skip
    for options in ({"strategy": "full"}, {"count": 2}, {"strategy": "bitfit"}, {"strategy": "top", "count": 2}):
        measured, cost = measure(transformers.BertForSequenceClassification(config), options)
        assert cost.flops_per_token == pytest.approx(measured, rel=0.03)


FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "t5",
)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_the_families(family, monkeypatch):
    """Oracle: the same counter, and that backward reaches every tensor the plan names; the stated error is 0."""
    architectures = pytest.importorskip("architectures")
    monkeypatch.setattr(architectures.EXPECTED[family].config, "_attn_implementation", "eager")
    module = architectures.EXPECTED[family].build("cpu")
    for options in ({"strategy": "full"}, {"count": 1}, {"strategy": "top", "count": 1}, {"strategy": "norms"}):
        measured, cost = measure(module, options)
        assert cost.flops_per_token == measured, options


def llama(tied: bool = False):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256,
        vocab_size=100, tie_word_embeddings=tied, attn_implementation="eager",
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def measure(module, options: dict) -> tuple[float, Estimate]:
    """(FLOPs of a token by torch's counter, the estimate) of a plan on a module, 2 sequences of 32."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from dsfreeze.anatomy_reader import read_anatomy
    from dsfreeze.model import add_adapters

    anatomy = read_anatomy(module, "toy")
    plan = plan_of(anatomy, **options)
    if plan.adapter is not None:
        add_adapters(module, plan.adapter, seed=0)
    trainable = set(plan.phases[0].trainable)
    names = dict(module.named_parameters())
    assert trainable <= set(names)
    for name, parameter in names.items():
        parameter.requires_grad_(name in trainable)
    ids = 2 + torch.arange(64).reshape(2, 32)
    more = {"decoder_input_ids": ids} if module.config.is_encoder_decoder else {}
    module.zero_grad()
    with FlopCounterMode(display=False) as counter:
        module(input_ids=ids, **more).logits.float().sum().backward()
    assert all(names[name].grad is not None for name in trainable)
    return counter.get_total_flops() / ids.numel(), estimate(anatomy, plan, sequence_length=32)


RECOMPUTING = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2", "phi", "bert")
INSIDE = {
    "full": {"strategy": "full"},
    "bottom": {"count": 2},
    "interval": {"strategy": "interval", "fraction": 0.5},
    "half": {"strategy": "random", "granularity": "category", "fraction": 0.5},
    "norms": {"strategy": "norms"},
    "lora": {"strategy": "lora"},
}
#: The error where it is not 0: BERT's head runs once a sequence, which a toy shows; Phi's plan lies inside the lowest layer of
#: parallel blocks, of which there are three.
ERRORS = {**{("bert", name): 0.08 for name in INSIDE}, ("phi", "lora"): 0.022}


@pytest.mark.parametrize(
    "family", [f if f == "llama" else pytest.param(f, marks=pytest.mark.slow) for f in RECOMPUTING]
)
def test_executed_flops(family):
    """Oracle: the same counter over passes as the engines run them. What checkpointing runs again is exact in all; the error
    of the whole is 0, but for `ERRORS`."""
    for name, options in INSIDE.items():
        plain, predicted, _ = executed_flops(family, options, checkpointing=False)
        more, _, again = executed_flops(family, options, checkpointing=True)
        assert more - plain == again, name
        assert predicted == pytest.approx(plain, rel=ERRORS.get((family, name), 0.0), abs=0.5), name


def executed_flops(family: str, options: dict, *, checkpointing: bool) -> tuple[float, int, int]:
    """FLOPs of a token, 2 sequences of 32: those that ran, and by formula those without recomputation and those of it."""
    from counting import batch_of, prepared
    from torch.utils.flop_counter import FlopCounterMode

    from dsfreeze.anatomy_reader import read_anatomy
    from dsfreeze.model import add_adapters

    module, known = eager(family), eager_activations(family)
    anatomy = read_anatomy(module, family)
    plan = plan_of(anatomy, **options)
    if plan.adapter:
        add_adapters(module, plan.adapter, seed=0)
    adapted, trainable = plan.adapted(anatomy), plan.phases[0].trainable
    modes = prepared(module, adapted, trainable, checkpointing)
    batch = batch_of("classification" if family == "bert" else "causal_lm", 2, 32)
    with FlopCounterMode(display=False) as counter:
        module(**batch).loss.backward()
    modes.close()
    again = recomputed_flops(adapted, frozenset(trainable), 32, known.unrepeated(adapted))
    predicted = estimate(anatomy, plan, sequence_length=32).flops_per_token
    return counter.get_total_flops() / batch["input_ids"].numel(), predicted, again


@cache
def eager_activations(family: str) -> TaskActivations:
    """What the passes of `eager`'s toy store."""
    from dsfreeze.activation_reader import read_activations

    module = eager(family)
    task = "classification" if family == "bert" else "causal_lm"
    read = read_activations(module.config, {task: type(module)}, attentions=["eager"], widths=[4])
    return read.of(task, "eager", 4)


def eager(family: str):
    """A toy of the family with eager attention."""
    architectures = pytest.importorskip("architectures")
    config = copy.deepcopy(architectures.EXPECTED[family].config)
    config._attn_implementation, config.use_cache = "eager", False
    config.num_labels, config.problem_type = 2, "single_label_classification"
    return type(architectures.EXPECTED[family].build("meta"))(config)


def test_an_executed_flash_backward():
    """Oracle: torch's own formulas of the kernel: two products forward; backward the four of the model's FLOPs and the scores' again."""
    counter = pytest.importorskip("torch.utils.flop_counter")
    shape, product = (2, 4, 32, 16), 2 * 2 * 4 * 32 * 32 * 16
    assert counter.sdpa_flop_count(shape, shape, shape) == 2 * product
    assert counter.sdpa_backward_flop_count(shape, shape, shape, shape) == (2 * 2 + 1) * product
    a_token = flops(TOY, (), frozenset(["model.embed_tokens.weight"]), 32)
    assert a_token == tuple(n * len(TOY.blocks) * 2 * 32 * TOY.attention_width for n in (2, 4))


class TestBytes:
    """Oracle: bytes a parameter counted from live tensors of DeepSpeed on two ranks (18 on the host, of two, at stage 3)."""

    @pytest.mark.parametrize(
        ("stage", "dtype_bytes", "trainable", "frozen"),
        [(0, 4, 12, 4), (0, 2, 14, 2), (1, 4, 10, 4), (1, 2, 8, 2), (2, 2, 8, 2), (3, 4, 8, 2), (3, 2, 7, 1)],
    )
    def test_after_a_step(self, stage, dtype_bytes, trainable, frozen):
        cost = price(TOY, {"count": 4}, stage=stage, world_size=2, dtype_bytes=dtype_bytes)
        states = cost.weights + cost.masters + cost.optimizer_state
        expected = trainable * cost.trainable + frozen * (cost.total - cost.trainable)
        assert states == pytest.approx(expected, abs=64)

    @pytest.mark.parametrize(("stage", "each"), [(0, 2), (1, 2), (2, 1), (3, 1)])
    def test_gradients(self, stage, each):
        cost = price(TOY, {"count": 4}, stage=stage, world_size=2, dtype_bytes=2)
        assert cost.gradients == pytest.approx(each * cost.trainable, abs=4)

    @pytest.mark.parametrize(("stage", "each"), [(2, 16), (3, 18)])
    def test_offload(self, stage, each):
        cost = price(TOY, {"count": 4}, stage=stage, world_size=2, dtype_bytes=2, offload=True)
        assert cost.on_host == pytest.approx(each * cost.trainable / 2, abs=32)

    def test_freezing_more_never_costs_more(self):
        """Oracle: monotony, in every figure."""
        for strategy in ("bottom", "top"):
            costs = [price(TOY, {"strategy": strategy, "count": n}) for n in range(9)]
            for more, less in pairwise(costs):
                assert less.trainable < more.trainable
                assert less.optimizer_state < more.optimizer_state
                assert less.gradients < more.gradients
                assert less.flops_per_token <= more.flops_per_token

    @pytest.mark.parametrize(("wrong", "message"), [
        ({"stage": 4}, "stage 4"), ({"world_size": 0}, "no ranks"), ({"stage": 1, "offload": True}, "offloaded"),
    ])  # fmt: skip
    def test_what_does_not_exist(self, wrong, message):
        with pytest.raises(UserError, match=message):
            price(TOY, {}, **wrong)


class TestAgainstDeepSpeedsEstimator:
    """Oracle: DeepSpeed's own estimator, in bf16, nothing frozen. What it counts more is what ours leaves out and says so: an
    fp32 gradient (4 bytes an element beside the bf16 one at stage 2, 2 in its place at stage 3), which 0.19.8 does not keep
    (see the bytes counted in test_zero_engine.py), and the largest gathered layer."""

    LINEARS = Anatomy("linears", "linear", tuple(
        Layer(f"layers.{i}", (Tensor(f"{i}.weight", (512, 512), "other"), Tensor(f"{i}.bias", (512,), "bias")), f"{i}")
        for i in range(8)
    ))  # fmt: skip

    @pytest.mark.parametrize("world_size", [1, 2, 8])
    def test_nothing_frozen(self, world_size):
        stage12 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
        stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
        total, layer = 2_101_248, 262_656
        _, at_2 = stage12.estimate_zero2_model_states_mem_needs(total, world_size, 1, cpu_offload=False)
        _, at_3, gathered = stage3.estimate_zero3_model_states_mem_needs(
            total, layer, world_size, 1, cpu_offload=False, cpu_offload_params=False
        )
        shard = total // world_size
        for stage, theirs in ((2, at_2 - 4 * shard), (3, at_3 - gathered - 2 * shard)):
            cost = price(self.LINEARS, {"strategy": "full"}, stage=stage, world_size=world_size, dtype_bytes=2)
            assert cost.weights + cost.gradients + cost.masters + cost.optimizer_state == theirs

    @pytest.mark.parametrize("world_size", [1, 2, 4])
    def test_nothing_frozen_and_offloaded(self, world_size):
        """Without its safety factor of 1.5, and at stage 3 without the bf16 gradients (2 bytes an element) that 0.19.8 keeps in
        host memory beside the fp32 ones; on one node, whose host memory all ranks share."""
        stage12 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
        stage3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
        total, layer = 2_101_248, 262_656
        at = {"world_size": world_size, "dtype_bytes": 2, "offload": True}
        two, three = (price(self.LINEARS, {"strategy": "full"}, stage=stage, **at) for stage in (2, 3))
        host, device = stage12.estimate_zero2_model_states_mem_needs(
            total, world_size, 1, cpu_offload=True, additional_buffer_factor=1
        )
        assert (world_size * two.on_host, two.weights) == (host, device)
        for cpu_offload_params in (False, True):
            host, device, gathered = stage3.estimate_zero3_model_states_mem_needs(
                total, layer, world_size, 1, cpu_offload_params=cpu_offload_params, additional_buffer_factor=1
            )
            moved = three.weights if cpu_offload_params else 0
            assert world_size * (three.on_host + moved) == host + 2 * total
            assert three.weights - moved == device - gathered

    def test_frozen_parameters_are_not_trainable_ones(self):
        """Oracle: by hand; DeepSpeed's counter says 2,101,248 of this, as if all trained."""
        cost = price(self.LINEARS, {"count": 7})
        assert (cost.total, cost.trainable) == (2_101_248, 262_656)
        assert (cost.optimizer_state, cost.gradients) == (8 * 262_656, 4 * 262_656)


@pytest.mark.parametrize(("state", "on_host"), [("offload", True), ("clear", True), ("keep", False)])
def test_a_plan_that_moves_is_priced_with_all_that_waits(state, on_host):
    """Oracle: three equal layers of four wait when the last takes its turn: 12 bytes an element in bf16, the master's 4 where the
    rest is cleared; on the host every phase holds as much on the device, so the last one is told."""
    anatomy = anatomies.llama(depth=4)
    plan = make_plan(anatomy, FreezeOptions(strategy="badam", switch_every=10, state=state), 40)
    cost = estimate(anatomy, plan, dtype_bytes=2)
    assert cost.parked == 3 * anatomy.blocks[0].numel * (4 if state == "clear" else 12)
    assert cost.on_host == (cost.parked if on_host else 0)


def test_the_price_of_one_phase():
    """Oracle: the price of a plan that trains the same throughout; beside it waits what trained in the phases before, 12 bytes an element,
    on one rank of two the half of it."""
    anatomy = anatomies.llama(depth=4)
    plan = make_plan(anatomy, FreezeOptions(strategy="badam", switch_every=10, state="offload"), 80)
    for number, phase in enumerate(plan.phases):
        alone = estimate(anatomy, replace(plan, phases=(Phase(0, None, phase.trainable),)), dtype_bytes=2, world_size=2)
        found = estimate(anatomy, plan, dtype_bytes=2, world_size=2, phase=phase)
        waits = 12 * min(number, 3) * anatomy.blocks[0].numel // 2
        assert (found.parked, found.on_host) == (waits, waits)
        assert replace(found, parked=0, on_host=0) == alone


def test_adapters_in_place_or_not_give_one_price():
    plan = plan_of(TOY, strategy="lora")
    assert estimate(TOY, plan) == estimate(plan.adapted(TOY), plan)
    assert estimate(TOY, plan).full_flops_per_token == price(TOY, PLANS["full"]).flops_per_token


@pytest.mark.parametrize(
    ("stage", "expected"),
    [(0, (26, 19)), (2, (26, 24)), (3, (30, 21))],
)
def test_elements_with_deepspeeds_padding(stage, expected):
    """Oracle: by hand for three ranks. Layers train 10, 9 and 0 elements of tensors of 4, 6, 9 and 7: stage 2 pads a layer to a multiple of 6
    (12 + 12), stage 3 each tensor to one of 3 (6 + 6 + 9 + 9, of them 21 train)."""
    layers = [
        Layer(name, tuple(Tensor(f"{name}.{n}", (n,), "other") for n in sizes))
        for name, sizes in (("one", (4, 6)), ("two", (9,)), ("three", (7,)))
    ]
    anatomy = Anatomy("toy", "none", tuple(layers))
    assert aligned(anatomy, ["one.4", "one.6", "two.9"], stage, 3) == expected


def test_percent():
    cost = price(TOY, {"strategy": "full"})
    assert (cost.percent, cost.flops_ratio) == (100, 1)
