"""The process group, and the one place that chooses an engine.

Works under the deepspeed launcher, under torchrun, and without any launcher (one rank, its own free port). Nothing here
or in the engines makes DeepSpeed compile an op: the one it would build for communication on CPUs is skipped.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import Engine, whereabouts
from dsfreeze.engine.masks import make_masks
from dsfreeze.engine.ranks import Ranks, device_of, read_ranks
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.recipe import Recipe
from dsfreeze.zero_config import deepspeed_config, is_local

T = TypeVar("T")
#: What a launcher sets, and `_join` where there is none.
_LAUNCHERS = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")


@contextmanager
def process_group(recipe: Recipe) -> Iterator[Ranks]:
    """Join the other ranks, and leave in order on every path. Within another such block it does nothing more.

    A `local` recipe needs no group; it is a UserError to launch one with several ranks.
    """
    ranks = read_ranks()
    if is_local(recipe):
        if ranks.world_size > 1:
            raise UserError(
                f"zero: local runs in one process, and {ranks.world_size} ranks were launched. "
                "Set zero: zero0 (or zero1, zero2, zero3), or launch one."
            )
        yield ranks
        return
    with _restored_environment():
        joined = _join(ranks, timedelta(seconds=recipe.train.ddp_timeout))
        try:
            yield ranks
        except RuntimeError as error:
            if (told := whereabouts.explained(error)) is None:
                raise
            raise told from error
        finally:
            if joined:
                _leave(in_order=sys.exception() is None)


@contextmanager
def _restored_environment() -> Iterator[None]:
    """The launcher's variables as they were: a Trainer made later in the same notebook would take ours for a launcher's and use DDP."""
    before = {name: os.environ.get(name) for name in _LAUNCHERS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _join(ranks: Ranks, timeout: timedelta) -> bool:
    """Start the process group unless there is one; whether this call started it."""
    if dist.is_initialized():
        return False
    deepspeed = import_deepspeed()
    if (
        ranks.world_size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    ):  # torchrun serves the store itself
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(_free_port())
    alone: dict[str, str | int] = {"RANK": ranks.rank, "WORLD_SIZE": ranks.world_size, "LOCAL_RANK": ranks.local_rank}
    # without LOCAL_SIZE DeepSpeed counts CPU devices by numactl, which need not be there
    alone["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", ranks.world_size)
    for name, value in alone.items():
        os.environ.setdefault(name, str(value))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if ranks.rank == 0:
        warn_of_locks()
    try:
        deepspeed.init_distributed(verbose=False, timeout=timeout)
    except dist.DistError as error:
        raise UserError(_unmet(ranks, timeout, error)) from error
    whereabouts.listen()
    return True


def _unmet(ranks: Ranks, timeout: timedelta, error: BaseException) -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    said = " ".join(str(error).split())
    return (
        f"The ranks did not meet at {where} (MASTER_ADDR, MASTER_PORT) within {timeout.total_seconds():.0f} s; this is rank {ranks.rank} of "
        f"{ranks.world_size} on {socket.gethostname()}. Start all of them, let that address be one that every machine reaches, and the port "
        f"be free. Where ranks start more than that apart, set train.ddp_timeout. ({said:.200})"
    )


def _leave(in_order: bool) -> None:
    """Destroy the process group, without which some runs abort at exit. After an error nobody is waited for."""
    if not dist.is_initialized():
        return
    if in_order:
        dist.barrier()
    import_deepspeed().comm.destroy_process_group()


def import_deepspeed() -> Any:
    """deepspeed, its log on standard error and its op for CPUs switched off: a minute's compilation for nothing."""
    if device_of(0).type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # it warns on standard output when it must find that out itself
    import deepspeed
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:  # not one that somebody else put there
            handler.stream = sys.stderr  # setStream would flush the former one, which may be closed by now
    # its calls to functions that torch has renamed; nobody here can mend that
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def warn_of_locks() -> list[Path]:
    """Lock files of extension builds, a warning each: a killed build leaves one, and later ones wait on it for ever.

    dsfreeze builds no extension and waits on none; other programs that share the folder do.
    """
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    locks = sorted(folder.rglob("lock")) if folder.is_dir() else []
    for path in locks:
        warnings.warn(
            f"{path} locks a compiled extension. If no build is running, one was killed: delete that file, "
            "or whatever needs the extension waits for ever.",
            stacklevel=2,
        )
    return locks


def agree(value: str, what: str) -> None:
    """UserError on every rank unless all ranks gave the same value (collective; nothing to do alone)."""
    values = everyones(value)
    if len(set(values)) > 1:
        odd = next(rank for rank, v in enumerate(values) if v != values[0])
        raise UserError(
            f"The ranks disagree about {what}: rank 0 has {values[0][:12]}, rank {odd} has {values[odd][:12]}. "
            "Give every rank the same recipe, files and seeds."
        )


def together(action: Callable[[], T]) -> T:
    """What `action` returns here, once it has ended well on every rank (collective).

    Its failure on any rank is an error on all of them, for none may wait for a rank that has gone: its own exception
    where it failed, elsewhere a UserError that names the rank. The action itself must not be collective.
    """
    failed: Exception | None = None
    try:
        result = action()
    except Exception as error:  # noqa: BLE001 (raised again below, when everyone knows)
        failed = error
    problems = everyones("" if failed is None else str(failed) or type(failed).__name__)
    if failed is not None:
        raise failed
    rank, problem = next(((r, p) for r, p in enumerate(problems) if p), (0, ""))
    if problem:
        raise UserError(f"On rank {rank}: {problem}")
    return result


def led(action: Callable[[], T]) -> T:
    """What `action`, which rank 0 alone runs, returns there, on every rank (collective): a value that JSON holds. Its failure is an
    error on all of them, as in `together`."""
    text = together(lambda: json.dumps(action()) if read_ranks().rank == 0 else "")
    value: T = json.loads(everyones(text)[0])
    return value


def everyones(value: str) -> list[str]:
    """The ranks' values in rank order; returns when everyone has heard, so that one may leave."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(values, value)
    if any(v != values[0] for v in values):
        dist.barrier()
    return values


def engine_config(recipe: Recipe, plan: FreezePlan, anatomy: Anatomy, world_size: int) -> dict[str, Any]:
    """What `deepspeed.initialize` gets for this plan on `world_size` ranks; {} for a local recipe.

    `anatomy` is the one whose names the plan uses, as in `Job`: its sizes decide how large buckets are.
    """
    if is_local(recipe):
        return {}
    numel = {tensor.name: tensor.numel for tensor in anatomy.tensors}
    largest_set = max(sum(numel[name] for name in phase.trainable) for phase in plan.phases)
    return deepspeed_config(recipe, world_size, largest_set)


def build_engine(module: nn.Module, anatomy: Anatomy, recipe: Recipe, plan: FreezePlan) -> Engine:
    """The engine that `recipe.zero` names, once all ranks have the same plan (collective, within `process_group`)."""
    agree(plan.digest, "the freeze plan")
    masks = together(lambda: make_masks(plan, anatomy))
    if is_local(recipe):
        from dsfreeze.engine.local import LocalEngine

        return LocalEngine(module, anatomy, recipe, state=plan.state, drop_master=plan.drop_master, masks=masks)
    from dsfreeze.engine.zero import ZeroEngine

    config = engine_config(recipe, plan, anatomy, read_ranks().world_size)
    return ZeroEngine(module, anatomy, recipe, config, state=plan.state, drop_master=plan.drop_master, masks=masks)


def evaluation_engine(module: nn.Module, anatomy: Anatomy, recipe: Recipe) -> Engine:
    """An engine that never trains: every rank holds the whole model, or at stage 3 its share of each weight (within
    `process_group` when not alone)."""
    ranks = read_ranks()
    if ranks.world_size == 1:
        from dsfreeze.engine.local import LocalEngine

        return LocalEngine(module, anatomy, recipe)
    from dsfreeze.engine.zero import ZeroEngine

    engine = ZeroEngine(module, anatomy, recipe, {} if is_local(recipe) else deepspeed_config(recipe, ranks.world_size))
    engine.spread()
    return engine
