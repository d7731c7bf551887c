"""DeepSpeed configurations. Oracles: the recipe's own values; DeepSpeed's parser and key tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsfreeze import zero_config, zero_keys
from dsfreeze.errors import UserError
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.zero_config import deepspeed_config, ds_configs, find_ds_config, is_local, offload_of, stage_of

ROOT = Path(__file__).parents[1]
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


def recipe(*overrides: str):
    return load_recipe(None, ["model=m", *overrides])


@pytest.fixture
def resolve(tmp_path):
    """Resolve a config given as a dict or as text, with overrides of the recipe, for two ranks."""

    def call(given, *overrides: str, largest_set: int | None = None):
        path = tmp_path / "mine.json"
        path.write_text(given if isinstance(given, str) else json.dumps(given))
        return deepspeed_config(recipe(f"zero={path}", *overrides), 2, largest_set)

    return call


def told(resolve, given, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        resolve(given, *overrides)
    assert "mine.json" in str(caught.value)
    return str(caught.value)


# -- the shipped files ---------------------------------------------------------------------------------------------


def test_the_shipped_files_are_those_of_the_table():
    """Oracle: the table in ds_configs/README.md, and STAGES."""
    assert set(ds_configs()) == set(STAGES)
    table = (ROOT / "ds_configs" / "README.md").read_text()
    for name in STAGES:
        assert f"| `{name}` |" in table


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_every_key_that_matters_is_written_and_no_auto_is_left(name, bf16):
    """Oracle: arithmetic on the recipe's own values."""
    asked = recipe(
        f"zero={name}", f"train.bf16={bf16}", "train.per_device_train_batch_size=3",
        "train.gradient_accumulation_steps=5", "train.max_grad_norm=0",
    )  # fmt: skip
    config = deepspeed_config(asked, 2, largest_set=1000)
    assert "auto" not in json.dumps(config)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 5
    assert config["train_batch_size"] == 3 * 5 * 2
    assert config["gradient_clipping"] == 0
    assert config["bf16"]["enabled"] is bf16
    assert config["data_types"]["grad_accum_dtype"] == ("bf16" if bf16 else "fp32")
    assert config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False
    assert not {"optimizer", "scheduler", "fp16"} & set(config)
    assert stage_of(config) == STAGES[name]
    assert offload_of(config) is ("offload" in name)
    if STAGES[name]:
        assert config["zero_optimization"]["reduce_bucket_size"] == 1000


def test_the_bucket_is_the_largest_set_and_never_deepspeeds_gigabyte():
    def bucket(largest_set):
        return deepspeed_config(recipe(), 1, largest_set)["zero_optimization"]["reduce_bucket_size"]

    assert bucket(12_344) == 12_344
    assert bucket(None) == bucket(10**12) == 50_000_000


def test_local_is_local():
    assert is_local(recipe("zero=local"))
    assert not is_local(recipe())


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_reads_what_we_write(name, bf16):
    """Oracle: DeepSpeed's own parser, which checks the batch sizes and forbids unknown keys."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = deepspeed_config(recipe(f"zero={name}", f"train.bf16={bf16}"), 1, 1000)
    parsed = DeepSpeedConfig(json.loads(json.dumps(config)))
    assert parsed.zero_optimization_stage == STAGES[name]
    assert parsed.gradient_clipping == 1.0
    assert parsed.bfloat16_config.enabled is bf16
    assert parsed.timers_config.enabled is False


@pytest.mark.slow
def test_the_tables_name_the_keys_of_the_installed_deepspeed():
    """Oracle: the fields of DeepSpeed's models and its table of removed keys."""
    from deepspeed.runtime import config as upstream
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    def names(model):
        return {info.alias or name for name, info in model.model_fields.items()}

    assert set(zero_keys.ZERO) == names(DeepSpeedZeroConfig)
    assert set(zero_keys.BF16) == names(DeepSpeedBF16Config)
    assert set(zero_keys.OFFLOAD_OPTIMIZER) == names(offload_config.DeepSpeedZeroOffloadOptimizerConfig)
    assert set(zero_keys.OFFLOAD_PARAM) == names(offload_config.DeepSpeedZeroOffloadParamConfig)
    assert set(upstream._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(zero_keys.REFUSED)
    assert {f"zero_optimization.{key}" for key in upstream._REMOVED_ZERO_CONFIG_KEYS} <= set(zero_keys.REFUSED)


# -- finding -------------------------------------------------------------------------------------------------------


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(UserError, match=r"Did you mean 'zero2'.*Valid: zero0, zero1"):
        find_ds_config("zer02")
    with pytest.raises(UserError, match="'local'"):
        deepspeed_config(recipe("zero=locl"), 1)


def test_an_installed_package_brings_its_own_files(tmp_path, monkeypatch):
    """The wheel holds ds_configs/ as dsfreeze/_ds_configs, and no repository lies beside it."""
    (tmp_path / "zero9.json").write_text("{}")
    monkeypatch.setattr(zero_config, "_PACKAGED", tmp_path)
    assert find_ds_config("zero9") == tmp_path / "zero9.json"


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"There is no ds_config nowhere/mine\.json"):
        deepspeed_config(recipe("zero=nowhere/mine.json"), 1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", ":1: not JSON"),
        ('{\n"a": 1\n"b": 2}', ":3: not JSON"),
        ("[1]", "is an object"),
        ('{"a": 1, "a": 2}', '"a" is given twice'),
        ('{"gradient_clipping": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        (b"\xff\x00junk", "not a text file"),
    ],
    ids=["cut", "comma", "list", "twice", "nan", "deep", "digits", "bytes"],
)
def test_what_is_no_config_is_said(text, expected, tmp_path):
    path = tmp_path / "mine.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"mine\.json") as caught:
        deepspeed_config(recipe(f"zero={path}"), 1)
    assert expected in str(caught.value)


# -- a file of the user's ------------------------------------------------------------------------------------------


def test_auto_off_and_absent_all_leave_it_to_the_recipe(resolve):
    config = resolve(
        {
            "train_batch_size": "auto", "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0},
            "steps_per_print": "auto", "gradient_clipping": 1, "wall_clock_breakdown": True,
            "zero_optimization": {
                "stage": 3, "reduce_bucket_size": 5e8, "stage3_prefetch_bucket_size": "auto",
                "sub_group_size": "auto", "offload_optimizer": {"device": "none"}, "offload_param": {"device": "cpu"},
            },
        },
        largest_set=7,
    )  # fmt: skip
    assert config["train_batch_size"] == 16
    assert config["gradient_clipping"] == 1.0
    assert config["wall_clock_breakdown"] is True
    assert not {"fp16", "steps_per_print"} & set(config)
    zero = config["zero_optimization"]
    assert zero["reduce_bucket_size"] == 500_000_000
    assert isinstance(zero["reduce_bucket_size"], int)
    assert zero["allgather_bucket_size"] == 8  # even: DeepSpeed asserts it
    assert zero["sub_group_size"] == 1_000_000_000
    assert "offload_optimizer" not in zero
    assert zero["offload_param"] == {"device": "cpu"}


def test_no_zero_section_is_stage_0(resolve):
    assert stage_of(resolve({})) == 0


def test_all_conflicts_at_once_with_both_values(resolve):
    """Oracle: the values in both; 16 = 8 x 1 x 2 ranks."""
    message = told(
        resolve,
        {
            "train_micro_batch_size_per_gpu": 4, "train_batch_size": 64, "gradient_accumulation_steps": 2,
            "gradient_clipping": 0.5, "bf16": {"enabled": True},
        },
        "train.max_grad_norm=1.5",
    )  # fmt: skip
    for theirs, ours, where in [
        ('"train_micro_batch_size_per_gpu" is 4', "says 8", "train.per_device_train_batch_size"),
        ('"train_batch_size" is 64', "says 16", "8 x 1 x 2"),
        ('"gradient_accumulation_steps" is 2', "says 1 ", "train.gradient_accumulation_steps"),
        ('"gradient_clipping" is 0.5', "says 1.5", "train.max_grad_norm"),
        ('"bf16.enabled" is true', "says false", "train.bf16"),
    ]:
        (line,) = (line for line in message.splitlines() if theirs in line)
        assert ours in line
        assert where in line


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "the loop owns the optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "train.lr_scheduler_type"),
        ({"fp16": {"enabled": True}}, "train.bf16: true"),
        ({"checkpoint": {"load_universal": True}}, "#5430"),
        ({"compile": {"deepcompile": True}}, "trainable set"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_nontrainable_weights": True}}, "8 bits"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "wrapper"),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, '"offload_optimizer": {"device": "cpu"}'),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, '"device": "cpu"'),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "must be 1.0"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpuu"}}}, "Did you mean 'cpu'"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "needs stage 2"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "needs stage 3"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "must be true"),
        ({"elasticity": {"enabled": True}}, "no longer has it"),
        ({"zero_force_ds_cpu_optimizer": True}, "must be false"),
        ({"gradient_allreduce_op": "sum"}, 'must be "mean"'),
        ({"tensor_parallel": {"autotp_size": 2}}, "only ZeRO shards"),
        ({"activation_checkpointing": {"partition_activations": True}}, "train.gradient_checkpointing"),
        ({"zero_optimisation": {}}, "Did you mean 'zero_optimization'"),
        ({"zero_optimization": {"reduce_bucket": 1}}, "Did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, "Did you mean 'device'"),
        ({"bf16": {"enable": True}}, "Did you mean 'enabled'"),
        ({"bf16": True}, "it is an object"),
        ({"bf16": {}, "bfloat16": {}}, "old name"),
        ({"zero_optimization": True}, "it is an object"),
        ({"zero_optimization": {"stage": 4}}, "it takes 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "auto"}}, "it takes 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "yes"}}, "it takes true or false"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}, "it takes a whole number"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "but train.bf16 is false"),
        ({"gradient_accumulation_steps": True}, "is true, but the recipe says 1 "),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_reason(given, expected, resolve):
    assert expected in told(resolve, given)


@pytest.mark.parametrize(("stage", "refused"), [(0, True), (1, True), (2, False), (3, False)])
def test_fp32_accumulation_in_bf16_where_it_is_sharded(stage, refused, resolve):
    """Stage 1 would keep a whole fp32 gradient on every rank, stage 0 has no such engine."""
    given = {"zero_optimization": {"stage": stage}, "data_types": {"grad_accum_dtype": "fp32"}}
    if refused:
        assert f"stage {stage}" in told(resolve, given, "train.bf16=true")
    else:
        assert resolve(given, "train.bf16=true")["data_types"]["grad_accum_dtype"] == "fp32"


def test_the_old_name_of_bf16_is_understood(resolve):
    config = resolve({"bfloat16": {"enabled": True}}, "train.bf16=true")
    assert config["bf16"]["enabled"] is True
    assert "bfloat16" not in config


KEYS = [*zero_keys.TOP_LEVEL, *zero_keys.REFUSED, "nonsense", "zero_optimization", "data_types"]
INNER_KEYS = [*zero_keys.ZERO, *zero_keys.BF16, "device", "enabled", "grad_accum_dtype"]
WORDS = st.sampled_from(["auto", "cpu", "", "bf16"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(INNER_KEYS), inner, max_size=4),
)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_config=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_json_gives_a_config_or_a_user_error(given_config, resolve):
    """Oracle: no other exception, and never an "auto"."""
    try:
        config = resolve(given_config)
    except UserError:
        return
    assert '"auto"' not in json.dumps(config)
    assert stage_of(config) in range(4)


@pytest.mark.parametrize("largest_set", [1, 6545, 6546])
def test_bucket_sizes_are_even_whatever_trains(largest_set):
    """Oracle: DeepSpeed's own assertion (stage_1_and_2.py, nccl_start_alignment_factor)."""
    zero = deepspeed_config(recipe("zero=zero2"), 1, largest_set)["zero_optimization"]
    assert zero["allgather_bucket_size"] == zero["reduce_bucket_size"] == largest_set + largest_set % 2
