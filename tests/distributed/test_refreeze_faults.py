"""What `refreeze` refuses: an error on every rank, in time, that names the reason, before anything has changed.

Oracle of "nothing has changed": an engine that never saw the refused calls; its weights stay bit-equal to the end.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from forks import outcomes_of, run_ranks
from refreeze_kit import ALL, ENDS, Case, Odd, full_weights, loss_of, make_engine, names_of
from tiny import recipe_of

from dsfreeze.engine import support
from dsfreeze.engine.process import process_group
from dsfreeze.engine.refreeze import live_names, refreeze
from dsfreeze.errors import UserError

pytestmark = pytest.mark.slow

SMALL, LARGE = names_of(3, also=ENDS), names_of(2, 3, also=ENDS)


def step(engine, case, number, rank):
    for micro in range(case.accumulation):
        engine.backward(loss_of(engine, number, rank, micro, case))
        engine.step()


def refused(engine, match, *args, **options):
    flags = [p.requires_grad for p in engine.module.parameters()]
    live = live_names(engine)
    with pytest.raises(UserError, match=match):
        refreeze(engine, *args, **options)
    assert [p.requires_grad for p in engine.module.parameters()] == flags
    assert live_names(engine) == live


def asked_wrongly(zero, bf16):
    """Two engines in turn on the same batches, one of which refuses between its steps; their weights."""
    case, results = Case("freeze", zero, bf16=bf16, accumulation=2), []
    with process_group(recipe_of()) as ranks:
        for mistaken in (False, True):
            engine = make_engine(case, LARGE)
            for number in range(4):
                if mistaken:
                    mistakes(engine)
                engine.backward(loss_of(engine, number, ranks.rank, 0, case))
                if mistaken:
                    refused(engine, "not yet stepped", SMALL)  # between backward and step
                engine.step()
                if mistaken:
                    refused(engine, "not yet stepped", SMALL)  # in the middle of accumulation
                engine.backward(loss_of(engine, number, ranks.rank, 1, case))
                if mistaken:
                    refused(engine, "not yet stepped", SMALL)
                engine.step()
                if number == 1:
                    engine = refreeze(engine, SMALL)
            results.append(full_weights(engine))
    never, asked = results
    return [name for name in never if not torch.equal(never[name], asked[name])]


def mistakes(engine):
    refused(engine, "set is empty", [])
    refused(engine, "no tensor 'lm_head.wieght'.*Did you mean 'lm_head.weight'", ["lm_head.wieght"])
    refused(engine, "no tensor 'norm'", "norm")
    refused(engine, "state is 'kept'", SMALL, "kept")
    refused(engine, "method 'fast'", SMALL, method="fast")
    refused(engine, "drop_master goes with state='clear'", SMALL, "offload", drop_master=True)
    refused(engine, "no 'weight_decoy'.*'weight_decay'", SMALL, settings={SMALL[0]: {"weight_decoy": 0.0}})
    refused(engine, "no tensor 'lm_head'", SMALL, settings={"lm_head": {"weight_decay": 0.0}})


@pytest.mark.parametrize(
    ("zero", "bf16"),
    [("zero0", False), ("zero0", True), ("zero1", False), ("zero2", True), ("zero3", False), ("zero2_offload", False),
     ("zero3_offload", True)],
)  # fmt: skip
def test_mistakes_change_nothing(zero, bf16):
    assert run_ranks(asked_wrongly, zero, bf16) == [[], []]


def manual_boundary(zero):
    """As accelerate drives an engine: `step` once for all micro-steps, of which the engine then counts one."""
    case = Case("freeze", zero)
    with process_group(recipe_of()) as ranks:
        engine = make_engine(Case("freeze", zero, accumulation=3), LARGE)
        for number in range(2):
            for micro in range(3):
                engine.set_gradient_accumulation_boundary(micro == 2)
                engine.backward(loss_of(engine, 3 * number + micro, ranks.rank, 0, case))
                refused(engine, "not yet stepped", SMALL)
            engine.step()
            engine = refreeze(engine, SMALL if number else ALL)
        assert set(live_names(engine)) == set(SMALL)


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_the_boundary_is_where_no_gradient_waits(zero):
    """With 1 of 3 micro-steps counted, the engine's own counter says "in the middle" for ever."""
    run_ranks(manual_boundary, zero)


def diverge(zero, calls):
    """Every rank its own call; the error is raised in each rank, which then trains on with the others."""
    case = Case("freeze", zero)
    with process_group(recipe_of()) as ranks:
        engine, told = make_engine(case, LARGE), []
        before = time.monotonic()
        for call in calls:
            with pytest.raises(UserError) as caught:
                refreeze(engine, *call[ranks.rank][0], **call[ranks.rank][1])
            told.append(str(caught.value))
        step(engine, case, 0, ranks.rank)
        return told, time.monotonic() - before


DIVERGING = [
    (((names_of(1),), {}), ((names_of(2),), {})),  # as large: DeepSpeed itself trains it wrong (0-2) or hangs (3)
    (((names_of(1),), {}), ((names_of(1, 2),), {})),
    (((SMALL, "keep"), {}), ((SMALL, "clear"), {})),
    (((SMALL, "clear"), {}), ((SMALL, "clear"), {"drop_master": True})),
    (((SMALL,), {}), ((SMALL,), {"method": "anew"})),
    (((SMALL,), {"settings": {SMALL[0]: {"weight_decay": 0.0}}}), ((SMALL,), {})),
]


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_ranks_that_disagree(zero):
    """Oracle: peers.md row 22, where DeepSpeed itself says nothing."""
    for told, seconds in run_ranks(diverge, zero, DIVERGING, timeout=30):
        assert all("ranks disagree about which tensors train: rank 1" in text for text in told)
        assert seconds < 30


def test_a_mistake_of_one_rank_is_told_by_all():
    call = (((["lm_head.weigth"],), {}), ((SMALL,), {}))
    (first, _), (second, _) = run_ranks(diverge, "zero2", [call], timeout=30)
    assert first == ["The model has no tensor 'lm_head.weigth'. Did you mean 'lm_head.weight'?"]
    assert second == [f"On rank 0: {first[0]}"]


def tied():
    with process_group(recipe_of()):
        engine = make_engine(Case("odd", "zero2"), ["embed.weight", "gate"])
        refused(engine, "'head.weight' is tied to 'embed.weight'.*Name 'embed.weight'", ["head.weight", "gate"])
        odd = SimpleNamespace(module=Odd())
        with pytest.raises(UserError, match="not a SimpleNamespace"):
            refreeze(odd, ["gate"])


def test_a_tied_alias_is_named():
    run_ranks(tied)


# -- engines and versions that are not known ------------------------------------------------------------------------


def build(config, optimizer=torch.optim.AdamW):
    model = Odd().to(torch.bfloat16 if config.get("bf16") else torch.float32)
    base = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    made = optimizer(model.parameters(), lr=1e-3) if optimizer else None
    engine, *_ = deepspeed.initialize(model=model, optimizer=made, config=base | config, dist_init_required=False)
    return engine


def zero(stage, **more):
    return {"zero_optimization": {"stage": stage, "reduce_bucket_size": 5000, **more}}


BF16 = {"bf16": {"enabled": True}}
#: configurations that DeepSpeed builds on a CPU
REAL = [
    ({**BF16, **zero(1), "data_types": {"grad_accum_dtype": "fp32"}}, "stage 1 in bf16 with grad_accum_dtype fp32"),
    ({**zero(1), "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast"),
]


def real_engines():
    with process_group(recipe_of()):
        for config, name in REAL:
            with pytest.raises(UserError, match=f"^{name} is not supported by refreeze: "):
                refreeze(build(config), ["gate"])
        refused(build(zero(1), torch.optim.Adagrad), "^the optimizer Adagrad is not supported", ["gate"])
        for stage in (1, 2):  # at 3 DeepSpeed itself asks for its FusedAdam
            engine = build(BF16 | zero(stage))
            engine.offload_states()
            refused(engine, "^states put away by engine.offload_states is not supported", ["gate"])
            engine.reload_states()
            refreeze(engine, ["gate"])
        with pytest.raises(UserError, match="an engine without an optimizer"):
            refreeze(build(zero(0), None), ["gate"])


def test_engines_that_are_refused_by_name():
    run_ranks(real_engines)


def stubs():
    """Engines that need what is not here (experts, disks, kernels): a known one with the one feature pretended."""
    with process_group(recipe_of()):
        engine = build(BF16 | zero(3))
        section = engine._config.zero_config
        nvme, part = SimpleNamespace(device="nvme", ratio=1.0), SimpleNamespace(device="cpu", ratio=0.5)
        pretended = [
            (engine, "fp16_enabled", lambda: True, "fp16"),
            (engine, "has_moe_layers", True, "MoE expert groups"),
            (engine, "mpu", object(), "tensor or sequence parallelism"),
            (section, "zero_quantized_weights", True, r"ZeRO\+\+ quantized weights"),
            (section, "zero_quantized_gradients", True, r"ZeRO\+\+ quantized gradients"),
            (section, "zero_quantized_nontrainable_weights", True, "quantized frozen weights"),
            (section, "zero_hpz_partition_size", 2, r"ZeRO\+\+ hpZ"),
            (section, "offload_optimizer", nvme, "NVMe offload"),
            (section, "offload_param", nvme, "NVMe offload"),
            (section, "offload_optimizer", part, "partial optimizer offload"),
            (engine, "super_offload", lambda: True, "SuperOffload"),
            (engine, "zenflow", True, "ZenFlow"),
            (engine, "is_deepcompile_active", lambda: True, "DeepCompile"),
            (engine, "bf16_master_weights_and_gradients", lambda: True, "bf16_master_weights_and_grads"),
        ]
        for owner, name, value, told in pretended:
            was = owner.__dict__.get(name, ...)
            owner.__dict__[name] = value
            refused(engine, f"^{told} is not supported by refreeze: ", ["gate"])
            if was is ...:
                del owner.__dict__[name]
            else:
                owner.__dict__[name] = was
        for cls, told in (("PipelineEngine", "pipeline parallelism"),):
            disguise = type(cls, (type(engine),), {})
            kind, engine.__class__ = engine.__class__, disguise
            refused(engine, f"^{told} is not supported by refreeze: ", ["gate"])
            engine.__class__ = kind
        for cls, told in (("FP16_Optimizer", "stage 0 in bf16 with DeepSpeed's FusedAdam"), ("MiCS_Optimizer", "MiCS")):
            fake = SimpleNamespace(optimizer=type(cls, (), {})(), **vars_of(engine))
            assert any(text.startswith(told) for text in support.unsupported(fake))
        bare = SimpleNamespace(
            optimizer=(fused := type("FusedAdam", (), {})()), **vars_of(engine) | {"basic_optimizer": fused}
        )
        assert any(text.startswith("DeepSpeed's FusedAdam at stage 0") for text in support.unsupported(bare))
        refreeze(engine, ["gate"])  # and as it is, it is served


def vars_of(engine):
    return {"_config": engine._config, "basic_optimizer": engine.basic_optimizer, "mpu": None, "dp_world_size": 2}


def test_features_that_are_refused_by_name():
    run_ranks(stubs)


def other_versions():
    with process_group(recipe_of()):
        engine = build(zero(2))
        installed = deepspeed.__version__
        for version in ("0.18.9", "0.20.0"):
            deepspeed.__version__ = version
            refused(engine, f"DeepSpeed {version} is installed.*method='anew'", ["gate"])
        engine = refreeze(engine, ["gate"], method="anew")
        deepspeed.__version__ = f"{installed}+local"
        assert live_names(refreeze(engine, ["score.bias"])) == ("score.bias",)


def test_versions_outside_the_tested_range():
    run_ranks(other_versions)


def missing_name(stage, name):
    """A patched build without the name: announced and built anew, or refused where in place was asked for."""
    with process_group(recipe_of()):
        engine = build(BF16 | zero(stage))
        asked = {2: "_link_all_hp_params", 3: "_leaf_module_hooks"}[stage]
        support.WRAPPER_NAMES[stage] = (*support.WRAPPER_NAMES[stage], name)
        refused(engine, f"no {name}, which a change in place needs", ["gate"], method="in_place")
        with pytest.warns(UserWarning, match=f"no {name}: the engine is built anew"):
            other = refreeze(engine, ["gate"])
        assert other is not engine
        assert asked in support.WRAPPER_NAMES[stage]
        # without a name that says where masters lie, there is nothing to carry either way
        support.READ_NAMES[stage] = (*support.READ_NAMES[stage], "elsewhere")
        refused(other, "no elsewhere, where", ["score.bias"])
        refused(other, "no elsewhere, where", ["score.bias"], method="anew")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_missing_name_is_announced(stage):
    run_ranks(missing_name, stage, "a_name_of_old")


def test_an_error_reaches_every_rank():
    """The forks' own words: no rank is left waiting for the one that raised."""
    for outcome in outcomes_of(raises, timeout=30):
        assert outcome.error == "UserError"


def raises():
    with process_group(recipe_of()) as ranks:
        refreeze(build(zero(2)), ["gate"] if ranks.rank else [])
