"""Which DeepSpeed, and which of its engines, `refreeze` understands; everything else is refused by name, with the reason.

`refreeze` and the layouts lean on private names of DeepSpeed. They were tested with the versions below; within them, a
missing name (a patched build) makes `refreeze` fall back to building the engine anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version

from dsfreeze.errors import UserError

#: First and last DeepSpeed version that tests/distributed/test_refreeze.py was run with. (0.19.7 trains wrong at stage 1
#: with contiguous_gradients: false, whatever is frozen and without any change of it; 0.19.8 does not.)
TESTED = ("0.19.7", "0.19.8")

#: Private names of the wrapper, by stage, that tell where masters and gradients lie: nothing goes without them.
READ_NAMES: dict[int, tuple[str, ...]] = {
    0: (),
    1: (
        "bit16_groups", "single_partition_of_fp32_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets",
        "micro_step_id",
    ),
    3: (
        "fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "micro_step_id",
        "_epilogue_ran_this_backward",
    ),
}  # fmt: skip
READ_NAMES[2] = READ_NAMES[1]
#: Further private names that changing the set in place leans on.
ENGINE_NAMES = ("_backward_post_hook", "_support_torch_style_backward")
WRAPPER_NAMES: dict[int, tuple[str, ...]] = {
    0: (),
    1: ("_link_all_hp_params", "_lazy_init_hp_params_optimizer_state", "destroy"),
    3: ("ipg_buckets", "parameter_offload", "initialize_ds_offload", "_grad_acc_hooks", "_leaf_module_hooks"),
}
WRAPPER_NAMES[2] = WRAPPER_NAMES[1]


def require_tested_version() -> None:
    """UserError when the installed DeepSpeed is outside the tested range."""
    import deepspeed

    first, last = map(Version, TESTED)
    # a local build (0.19.8+abc) counts as its release
    if not first <= Version(Version(deepspeed.__version__).base_version) <= last:
        raise UserError(
            f"DeepSpeed {deepspeed.__version__} is installed, and dsfreeze reads private parts of DeepSpeed that were "
            f"tested from {TESTED[0]} to {TESTED[1]}. Install one of those: pip install deepspeed=={TESTED[1]}."
        )


def unreadable_names(engine: Any) -> list[str]:
    """Private names without which masters cannot be found; none in the tested versions."""
    lacking = [] if hasattr(engine, "param_names") else ["param_names"]
    return lacking + [
        name for name in READ_NAMES[engine.zero_optimization_stage()] if not hasattr(engine.optimizer, name)
    ]


def missing_names(engine: Any) -> list[str]:
    """Private names that an in-place change needs and this engine lacks; none in the tested versions."""
    stage = engine.zero_optimization_stage()
    builder = "_configure_fp16_optimizer" if stage == 0 else "_configure_zero_optimizer"
    lacking = [name for name in (*ENGINE_NAMES, builder) if not hasattr(engine, name)]
    return lacking + [name for name in WRAPPER_NAMES[stage] if not hasattr(engine.optimizer, name)]


def _asked(name: str) -> Callable[[Any], bool]:
    """Whether a method or property of the engine of that name says yes; a DeepSpeed without it has no such feature."""

    def answer(engine: Any) -> bool:
        value = getattr(engine, name, False)
        return bool(value() if callable(value) else value)

    return answer


def _zero(name: str) -> Callable[[Any], bool]:
    return lambda engine: bool(getattr(engine._config.zero_config, name, False))


def _on_nvme(engine: Any) -> bool:
    sections = (engine._config.zero_config.offload_optimizer, engine._config.zero_config.offload_param)
    return any(str(getattr(section, "device", "")).endswith("nvme") for section in sections if section)


def _partly_offloaded(engine: Any) -> bool:
    section = engine._config.zero_config.offload_optimizer
    return bool(section) and getattr(section, "ratio", 1.0) < 1.0


def _class_is(*names: str) -> Callable[[Any], bool]:
    return lambda engine: type(engine.optimizer).__name__ in names


def _optimizer_is_unknown(engine: Any) -> bool:
    return type(engine.basic_optimizer).__name__ not in ("Adam", "AdamW", "SGD", "DeepSpeedCPUAdam", "FusedAdam")


def _counts_one_step_per_group(engine: Any) -> bool:
    return engine.optimizer is engine.basic_optimizer and type(engine.optimizer).__name__ == "FusedAdam"


def _splits_models(engine: Any) -> bool:
    return engine.mpu is not None or getattr(engine, "dp_world_size", 1) != dist.get_world_size()


#: (whether an engine has the feature, its name, why it is refused); the first that applies is told
UNSUPPORTED: tuple[tuple[Callable[[Any], bool], str, str], ...] = (
    (lambda e: getattr(e, "basic_optimizer", None) is None, "an engine without an optimizer", "nothing trains"),
    (lambda e: type(e).__name__ == "PipelineEngine", "pipeline parallelism", "its stages hold different layers"),
    (_asked("has_moe_layers"), "MoE expert groups", "experts are sharded over groups of their own"),
    (_splits_models, "tensor or sequence parallelism", "a tensor's shards are not one per rank"),
    (_asked("fp16_enabled"), "fp16", "its loss scaling counts skipped steps per wrapper; use bf16"),
    (_asked("torch_autocast_enabled"), "torch_autocast", "it is untested here; use bf16"),
    (_asked("bf16_master_weights_and_gradients"), "bf16_master_weights_and_grads", "there is no fp32 master to carry"),
    (_class_is("MiCS_Optimizer"), "MiCS", "it shards over groups of ranks"),
    (_zero("zero_quantized_weights"), "ZeRO++ quantized weights", "a frozen tensor would be stored rounded"),
    (_zero("zero_quantized_nontrainable_weights"), "quantized frozen weights", "they could not be thawed again"),
    (_zero("zero_quantized_gradients"), "ZeRO++ quantized gradients", "they are untested here"),
    (lambda e: e._config.zero_config.zero_hpz_partition_size > 1, "ZeRO++ hpZ", "it keeps a second copy of each shard"),
    (_on_nvme, "NVMe offload", "its swap files are laid out once"),
    (_partly_offloaded, "partial optimizer offload", "it steps a second optimizer; set ratio to 1"),
    (_asked("zenflow"), "ZenFlow", "it splits the optimizer's state by importance"),
    (_asked("super_offload"), "SuperOffload", "its optimizer runs in a process of its own"),
    (_asked("is_deepcompile_active"), "DeepCompile", "the compiled graph fixes what trains"),
    (_class_is("BF16_Optimizer"), "stage 1 in bf16 with grad_accum_dtype fp32",
     "it keeps a full fp32 gradient of every trained tensor; use stage 2, or drop the key"),
    (_class_is("FP16_Optimizer"), "stage 0 in bf16 with DeepSpeed's FusedAdam",
     'it flattens masters of its own; use torch\'s AdamW ("torch_adam": true)'),
    (_counts_one_step_per_group, "DeepSpeed's FusedAdam at stage 0",
     "it counts the steps of one tensor of each group only; use torch's AdamW (\"torch_adam\": true)"),
    (_optimizer_is_unknown, "the optimizer {optimizer}", "only Adam, AdamW and SGD, of torch or DeepSpeed, are known to take slices"),
    (lambda e: bool(getattr(e.optimizer, "offloaded_states", ())), "states put away by engine.offload_states",
     "they are elsewhere; call engine.reload_states first"),
)  # fmt: skip


def unsupported(engine: Any) -> Iterator[str]:
    """A sentence for every feature of a live engine that `refreeze` cannot serve."""
    for has_it, name, reason in UNSUPPORTED:
        if has_it(engine):
            optimizer = type(getattr(engine, "basic_optimizer", None)).__name__
            yield f"{name.format(optimizer=optimizer)} is not supported by refreeze: {reason}"


def is_rounded(engine: Any) -> bool:
    """Whether weights are kept in a lower precision than their masters."""
    return bool(next(engine.module.parameters()).dtype != torch.float32)
