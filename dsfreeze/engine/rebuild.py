"""How the optimizer wrapper of a live DeepSpeed engine is taken apart and built again around other parameter groups.

In place: engine, module and torch optimizer stay, and the ZeRO wrapper alone is made anew; at stage 3 its module hooks
and coordinator stay too. Anew (the fallback): the engine is destroyed and initialised again. Neither carries any state:
that is `refreeze`'s part. What upstream leaves behind (#7204, #4856, #5674) is removed here.
"""

from __future__ import annotations

import gc
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dsfreeze.engine.modes import train_exactly
from dsfreeze.engine.support import is_rounded

#: What stages 1 and 2 leave on a parameter; `safe_get_*` would read zeros through it for a frozen one.
STALE = (
    "_hp_mapping", "_dp_group", "_index_in_param_group", "_zero_optimizer", "_hp_grad", "grad_accum", "param_idx_in_group",
    "get_full_hp_grad", "set_full_hp_grad", "get_full_hp_param", "set_full_hp_param", "load_hp_checkpoint_state",
)  # fmt: skip

#: Parameter groups of torch's optimizer: "params" and hyper-parameters.
ParamGroups = Sequence[dict[str, Any]]


def rebuild_in_place(engine: Any, groups: ParamGroups) -> Any:
    """The same engine, its optimizer over `groups`; every parameter in them trains, no other does."""
    with quiet():
        _BUILDERS[_kind(engine)](engine, groups)
    return engine


def _kind(engine: Any) -> str:
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return "bare" if engine.optimizer is engine.basic_optimizer else "masters"
    return "sharded weights" if stage == 3 else "sharded state"


def _bare(engine: Any, groups: ParamGroups) -> None:
    """Stage 0 in fp32: the optimizer steps the weights themselves."""
    _regroup(engine, groups)


def _masters(engine: Any, groups: ParamGroups) -> None:
    """Stage 0 in bf16."""
    _regroup(engine, groups)
    basic = engine.basic_optimizer
    with _at_rate_zero(basic):
        engine.optimizer = engine._configure_fp16_optimizer(basic, torch.bfloat16)
    basic.state.clear()


def _sharded_state(engine: Any, groups: ParamGroups) -> None:
    """Stages 1 and 2. A frozen weight stays a view of its old group's buffer where that holds nothing else."""
    old = engine.optimizer
    _unpin(engine, groups)
    overflow = old.check_grad_overflow
    old.destroy()
    for parameter in (p for group in old.bit16_groups for p in group):
        _forget(parameter)
    engine.optimizer = old = None
    _regroup(engine, groups)
    _wrap(engine)
    engine.optimizer.check_grad_overflow = overflow


def _sharded_weights(engine: Any, groups: ParamGroups) -> None:
    """Stage 3. Module hooks and coordinator stay; what was traced of the old set goes."""
    old = engine.optimizer
    offload = old.parameter_offload
    offload.empty_partition_cache()
    for hook in (*old._grad_acc_hooks, *old._leaf_module_hooks):
        hook.remove()
    forget_trace(offload)
    old.ipg_buckets.clear()
    synchronize()
    _unpin(engine, groups)
    for parameter in engine.module.parameters():  # else the old wrapper lives on while the new one is built
        parameter.__dict__.pop("_z3_optimizer", None)
    cls = type(old)
    engine.optimizer = old = None
    _regroup(engine, groups)
    make = cls.initialize_ds_offload
    cls.initialize_ds_offload = lambda *_, **__: offload
    try:
        _wrap(engine)
    finally:
        cls.initialize_ds_offload = make


_BUILDERS: dict[str, Callable[[Any, ParamGroups], None]] = {
    "bare": _bare,
    "masters": _masters,
    "sharded state": _sharded_state,
    "sharded weights": _sharded_weights,
}


@contextmanager
def _at_rate_zero(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """At stage 0 in bf16 DeepSpeed takes a step while it builds (zero gradients, but weight decay): one of no length."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    yield
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _regroup(engine: Any, groups: ParamGroups) -> None:
    basic = engine.basic_optimizer
    basic.state.clear()
    basic.param_groups[:] = [dict(group) for group in groups]
    train_exactly(engine.module, (parameter for group in groups for parameter in group["params"]))


def _wrap(engine: Any) -> None:
    engine.optimizer = engine._configure_zero_optimizer(engine.basic_optimizer)
    if engine._support_torch_style_backward:  # else a plain loss.backward() would never reduce
        engine.optimizer.register_grad_acc_post_hook(engine._backward_post_hook)


def _chosen(groups: ParamGroups) -> set[int]:
    return {id(parameter) for group in groups for parameter in group["params"]}


def _forget(parameter: nn.Parameter) -> None:
    parameter.grad = None
    for name in STALE:
        if name in parameter.__dict__:
            delattr(parameter, name)


def _unpin(engine: Any, groups: ParamGroups) -> None:
    """See to it that no weight keeps a buffer of the old set alive which is no longer all in use."""
    if engine.zero_optimization_stage() == 3:
        chosen = _chosen(groups)
        for parameter in (p for group in engine.optimizer.fp16_groups for p in group if id(p) not in chosen):
            parameter.ds_tensor.data = _copied(parameter.ds_tensor.data)
    elif engine.zero_optimization_stage() > 0:
        _unpin_views(engine.module, groups)


def _unpin_views(module: nn.Module, groups: ParamGroups) -> None:
    """Give a frozen weight memory of its own where it shares a buffer with one that moves out of it: one that trains on
    (it moves to a new buffer), or comes back. Buffers of frozen weights alone stay."""
    chosen = _chosen(groups)
    left = {_buffer(p) for p in module.parameters() if id(p) in chosen}
    for parameter in module.parameters():
        if id(parameter) not in chosen and _buffer(parameter) in left:
            parameter.data = _copied(parameter.data)
    for group in groups:
        alone = group["params"][0]
        if len(group["params"]) == 1 and alone.untyped_storage().nbytes() > alone.nbytes:
            alone.data = _copied(alone.data)  # DeepSpeed flattens a single tensor to a view of it


def _buffer(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().data_ptr()


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, pin_memory=tensor.is_pinned()).copy_(tensor)


def forget_trace(offload: Any) -> None:
    """Drop stage 3's record of the order in which the old set was fetched, and its cache of what to release."""
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    cached = type(coordinator)._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()  # DeepSpeed wraps it for its profiler


def synchronize() -> None:
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().is_available():
        get_accelerator().synchronize()


# -- the fallback --------------------------------------------------------------------------------------------------

#: Counters of an engine that go on.
COUNTERS = ("global_steps", "micro_steps", "global_samples", "skipped_steps")


def rebuild_anew(engine: Any, groups: ParamGroups) -> Any:
    """A new engine on the same module and torch optimizer; the old one is destroyed and leaves nothing behind."""
    import deepspeed

    module, basic = engine.module, engine.basic_optimizer
    config = {key: value for key, value in engine._config._param_dict.items() if key not in ("optimizer", "scheduler")}
    scheduler, counts = engine.lr_scheduler, {name: getattr(engine, name) for name in COUNTERS}
    overflow, training = getattr(engine.optimizer, "check_grad_overflow", None), engine.training
    with quiet():
        _unpin(engine, groups)
        close(engine)
        _regroup(engine, groups)
        with _at_rate_zero(basic):
            new, *_ = deepspeed.initialize(model=module, optimizer=basic, config=config, dist_init_required=False)
    basic.state.clear()
    new.train(training)
    new.lr_scheduler = scheduler
    for name, value in counts.items():
        setattr(new, name, value)
    if overflow is not None:
        new.optimizer.check_grad_overflow = overflow
    return new


def close(engine: Any) -> None:
    """Destroy an engine, and what `destroy` leaves on the module: both forward hooks and stage 3's backward functions,
    through which a later engine would go on using this one's coordinator."""
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
    if engine.zero_optimization_stage() == 3 and hasattr(engine.optimizer, "parameter_offload"):
        forget_trace(engine.optimizer.parameter_offload)
    engine.destroy()
    for module in engine.module.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(name, None)
    for parameter in engine.module.parameters():
        _forget(parameter)
    engine.optimizer = None
    gc.collect()


@contextmanager
def quiet(level: int = logging.WARNING) -> Iterator[None]:
    """DeepSpeed announces every wrapper it builds; at a switch that is noise. Nothing below `level` is heard of."""
    from deepspeed.utils import logger

    before = logger.level
    logger.setLevel(max(before, level))
    try:
        yield
    finally:
        logger.setLevel(before)


def read_masters(engine: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Full fp32 masters of tensors that the optimizer steps, on the CPU by name, through DeepSpeed's public reader
    (collective). {} where it has none to read: in fp32, where the weight is its own master, and at stage 0; and where
    gradients go round robin, which its reader does not heed: it takes other elements for a tensor's."""
    from deepspeed.utils import safe_get_full_fp32_param

    round_robin = engine.zero_optimization_stage() < 3 and engine.zero_round_robin_gradients()
    if engine.zero_optimization_stage() == 0 or not is_rounded(engine) or round_robin:
        return {}
    named = dict(engine.module.named_parameters())
    return {name: safe_get_full_fp32_param(named[name]).cpu() for name in names}


def write_masters(engine: Any, masters: Mapping[str, torch.Tensor]) -> None:
    """Put back those of the masters whose tensors train, through DeepSpeed's public writer (collective)."""
    from deepspeed.utils import safe_set_full_fp32_param

    for name, parameter in engine.module.named_parameters():
        if name in masters and parameter.requires_grad:
            safe_set_full_fp32_param(parameter, masters[name].to(parameter.device))
