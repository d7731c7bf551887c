"""Tables of DeepSpeed's configuration keys (0.19.8): which exist, which cannot be used here and why, what "auto" is.

A test compares the names with the installed DeepSpeed.
"""

from __future__ import annotations

#: Top-level keys that DeepSpeed 0.19.8 reads. It ignores any other in silence; here they are errors.
TOP_LEVEL = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "gradient_clipping", "optimizer", "scheduler", "bf16", "bfloat16", "fp16",
    "torch_autocast", "data_types", "zero_optimization", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "communication_data_type", "seq_parallel_communication_data_type",
    "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op", "disable_allgather",
    "disable_python_gc", "dump_state", "steps_per_print", "log_level", "wall_clock_breakdown", "memory_breakdown",
    "flops_profiler", "comms_logger", "timers", "vocabulary_size", "tensorboard", "wandb", "csv_monitor", "comet",
    "activation_checkpointing", "checkpoint", "aio", "datastates", "autotuning", "data_efficiency",
    "dataloader_drop_last", "hybrid_engine", "pipeline", "compile", "weight_quantization", "tensor_parallel",
    "expert_parallel", "sequence_parallel_size", "use_data_before_expert_parallelism",
)  # fmt: skip

#: Keys of zero_optimization with what they hold; a section is checked by its own table.
ZERO: dict[str, type] = {
    "stage": int, "contiguous_gradients": bool, "reduce_scatter": bool, "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool, "allgather_partitions": bool, "allgather_bucket_size": int,
    "overlap_comm": bool, "compute_grad_norm": bool, "load_from_fp32_weights": bool, "elastic_checkpoint": bool,
    "offload_param": dict, "offload_optimizer": dict, "zenflow": dict, "sub_group_size": int,
    "cpu_offload_param": bool, "cpu_offload_use_pin_memory": bool, "cpu_offload": bool,
    "stage3_prefetch_bucket_size": int, "stage3_param_persistence_threshold": int,
    "stage3_model_persistence_threshold": int, "stage3_max_live_parameters": int, "stage3_max_reuse_distance": int,
    "stage3_gather_16bit_weights_on_model_save": bool, "stage3_module_granularity_threshold": int,
    "stage3_use_all_reduce_for_fetch_params": bool, "stage3_allgather_sequential": bool,
    "stage3_gather_fp16_weights_on_model_save": bool, "ignore_unused_parameters": bool, "legacy_stage1": bool,
    "round_robin_gradients": bool, "parameter_alignment": bool, "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool, "zero_quantized_nontrainable_weights": bool, "zero_quantized_gradients": bool,
    "memory_efficient_linear": bool, "pipeline_loading_checkpoint": bool, "override_module_apply": bool,
    "log_trace_cache_warnings": bool, "enable_sanity_checks": bool, "save_muon_momentum_buffer_in_memory": bool,
    "leaf_module": dict,
}  # fmt: skip

OFFLOAD_OPTIMIZER = (
    "device", "nvme_path", "buffer_count", "pin_memory", "pipeline_read", "pipeline_write", "fast_init", "ratio",
    "super_offload", "cpuadam_cores_perc",
)  # fmt: skip
OFFLOAD_PARAM = ("device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory")
BF16 = (
    "enabled",
    "immediate_grad_update",
    "check_grad_overflow",
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
)
DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")

_GONE = "DeepSpeed 0.19.8 no longer has it"
#: Dotted keys that cannot be switched on, with the reason and what to do instead.
REFUSED = {
    "optimizer": "the loop owns the optimizer (AdamW, a group per layer, made anew when the trainable set changes); "
    "write train.learning_rate, train.weight_decay and train.adam_* in the recipe",
    "scheduler": "the loop owns the learning rate (DeepSpeed's schedulers leave groups that come and go at a stale "
    "one); write train.lr_scheduler_type and train.warmup_steps in the recipe",
    "fp16": "fp16 skips steps when it overflows, which a plan and a schedule counted in steps cannot follow; "
    "fp32 and bf16 are offered: write train.bf16: true in the recipe",
    "torch_autocast": "train.bf16 in the recipe decides the precision; autocast would keep frozen weights in fp32",
    "bf16.bf16_master_weights_and_grads": "trainable tensors have fp32 masters here, and checkpoints hold them so",
    "bf16.bf16_optimizer_states": "AdamW's moments are fp32 here, and checkpoints hold them so",
    "checkpoint.load_universal": "a universal checkpoint does not restore frozen weights, so a layer that trained "
    "earlier silently goes back to its base (DeepSpeed #5430, #6691); dsfreeze's checkpoints load at any stage and "
    "world size: write train.resume_from_checkpoint in the recipe",
    "compile.deepcompile": "it compiles one trainable set into the step, and a plan may change the set",
    "zero_optimization.zenflow": "it replaces the optimizer wrapper that a change of the trainable set rebuilds",
    "zero_optimization.zero_quantized_nontrainable_weights": "frozen weights would be stored in 8 bits, so a layer "
    "that is trained later would start from rounded weights",
    "zero_optimization.offload_optimizer.super_offload": "it brings an optimizer of its own, which the loop cannot own",
    "zero_optimization.cpu_offload": 'it is an old name; write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'it is an old name; write "offload_param": {"device": "cpu"}',
    "zero_optimization.cpu_offload_use_pin_memory": 'it is an old name; write "pin_memory" in offload_optimizer',
    "activation_checkpointing": "transformers' models do not read it; write train.gradient_checkpointing in the recipe",
    "autotuning": "it would tune batch sizes, and the recipe owns those",
    "data_efficiency": "the loop reads its own data, so this would have no effect",
    "hybrid_engine": "it is for generation during training of chat models, which dsfreeze does not do",
    "pipeline": "the loop trains whole models on every rank; only ZeRO shards them",
    "tensor_parallel": "every rank counts as a data-parallel one here; only ZeRO shards the model",
    "expert_parallel": "every rank counts as a data-parallel one here; only ZeRO shards the model",
    "sequence_parallel_size": "every rank counts as a data-parallel one here; only ZeRO shards the model",
    "weight_quantization": "it is for inference",
    **dict.fromkeys(
        ("nebula", "compression_training", "amp", "quantize_training", "sparse_gradients", "eigenvalue",
         "sparse_attention", "elasticity", "graph_harvesting", "curriculum_learning", "progressive_layer_drop",
         "zero_optimization.mics_shard_size", "zero_optimization.mics_hierarchical_params_gather",
         "zero_optimization.zeropp_loco_param"),
        _GONE,
    ),
}  # fmt: skip

#: Dotted keys of which only one value works, with the reason; the first two are always written.
REQUIRED: dict[str, tuple[object, str]] = {
    "zero_allow_untested_optimizer": (True, "dsfreeze brings its own AdamW"),
    "zero_force_ds_cpu_optimizer": (False, "dsfreeze brings its own AdamW, also with offload"),
    "managed_gradient_accumulation": (True, "the engine counts micro-steps by it"),
    "gradient_allreduce_op": ("mean", "the loop weighs losses for it"),
    "zero_optimization.compute_grad_norm": (True, "the loop records the norm of every step"),
    "zero_optimization.offload_optimizer.ratio": (1.0, "the rest would come from a second optimizer"),
}

#: Elements in DeepSpeed's reduce and gather buffers (0.1 GB in bf16). Its default, 5e8, takes 1 GB whatever trains.
BUCKET = 50_000_000
#: What "auto" becomes in zero_optimization beside the buckets; any other "auto" leaves the key to DeepSpeed's default.
AUTO_ZERO = {
    "stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000, "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}  # fmt: skip
