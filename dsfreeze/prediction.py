"""What a run was predicted to take, beside what it took.

The peak is held against the fullest micro-batch that the run really had. Bytes that are no model state at the start of the first step (a
CPU process's libraries and data; nothing of note on a GPU) are taken as they were measured then.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from transformers import PreTrainedModel

from dsfreeze.activations import ATTENTIONS, Activations, TaskActivations
from dsfreeze.anatomy import head_task
from dsfreeze.embedded import cache_folder
from dsfreeze.engine import Memory
from dsfreeze.estimate.price import PlanCost, Price
from dsfreeze.files import write_whole
from dsfreeze.job import Job
from dsfreeze.setting import Workload, setting_of, workload_of
from dsfreeze.shapes import known_activations
from dsfreeze.tables import gib

#: A measured peak that differs by more is worth a word.
NOTABLE = 0.10
#: Part of a cached profile's name; raise it when reading changes.
PROFILE_FORMAT = 1


def predict(
    job: Job, world_size: int, num_steps: int, shape: tuple[int, int], start: Memory, end: Memory, *, on_cpu: bool,
    cache_bytes: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Predicted figures of a finished run, for its summary: bytes as `Memory` has them, the peak, and how far the measured one is from it.

    `shape`: sequences and positions of the fullest micro-batch; `start`, `end`: before the first step and after the last;
    `cache_bytes`: what a prefix cache holds in this process's host memory, which on a CPU counts. Of a model that cannot be priced there is a reason in place of figures.
    """
    try:
        return _figures(job, world_size, num_steps, shape, start, end, on_cpu, cache_bytes)
    except Exception as error:  # noqa: BLE001 (of a model of a kind never seen before: the run is over, and neither its export nor the other ranks may suffer)
        return {"reason": str(error) or type(error).__name__}


def _figures(
    job: Job, world_size: int, num_steps: int, shape: tuple[int, int], start: Memory, end: Memory, on_cpu: bool,
    cache_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    setting, work = setting_of(job.recipe, world_size), workload_of(job.recipe)
    activations = stored_of(job, setting.dtype_bytes)

    def priced(work: Workload) -> Price:
        cost = PlanCost(
            job.anatomy, job.plan, activations, replace(work, micro_batch_size=shape[0]), dtype_bytes=setting.dtype_bytes,
            sequence_length=shape[1], num_steps=num_steps,
        )  # fmt: skip
        return cost.at(setting.stage, world_size, offload=setting.offload)

    price = priced(work)
    most = price.peaks.most
    if work.prefix_cache and not work.evict_prefix:  # the first epoch runs the prefix
        most = max(most, priced(replace(work, prefix_cache=False)).peaks.most)
    # on a CPU what is offloaded, parked or cached lies in the same memory
    peak = _besides_states(start, setting.offload and not on_cpu) + most + (price.host + cache_bytes if on_cpu else 0)
    return {
        "weights": price.states.weights, "gradients": price.states.gradients, "masters": price.states.masters,
        "optimizer_state": price.states.optimizer_state, "peak": peak, "peak_error": end.peak / peak - 1,
        "batch": list(shape), "bytes": price.items,
    }  # fmt: skip


def _besides_states(start: Memory, offloaded: bool) -> int:
    """Bytes that were allocated before the first step and are no model state."""
    states = start.weights + (
        0 if offloaded else start.gradients + start.masters + start.optimizer_state + start.parked
    )
    return max(0, start.allocated - states)


def stored_of(job: Job, dtype_bytes: int) -> TaskActivations:
    """What the job's passes store: a shipped model's profile where the run changed nothing of it, else read once from its config and kept
    in the cache."""
    options, module = job.recipe.model, job.module
    known = known_activations(options.name) if options.dropout is None else None
    attention = options.attn_implementation or getattr(module.config, "_attn_implementation", None)
    found = known or _read_once(module, job.recipe.task, attention, dtype_bytes)
    return found.of(job.recipe.task, attention, dtype_bytes)


def _read_once(module: PreTrainedModel, task: str, attention: str | None, dtype_bytes: int) -> Activations:
    from dsfreeze.activation_reader import read_activations

    config, kind = module.config, type(module)
    ways = [attention] if attention in ATTENTIONS else list(ATTENTIONS)
    shape = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    told = [
        kind.__name__,
        json.dumps(shape, sort_keys=True, default=str),
        task,
        ways,
        dtype_bytes,
        version("torch"),
        version("transformers"),
    ]
    key = hashlib.sha256(repr((PROFILE_FORMAT, told)).encode()).hexdigest()[:16]
    file = cache_folder() / "activations" / f"{key}.json"
    if file.is_file():
        return Activations.from_json(file.read_text(encoding="utf-8"))
    found = read_activations(config, {head_task(task): kind}, attentions=ways, widths=[dtype_bytes])
    with suppress(OSError):  # where the cache cannot be written the next run reads anew
        write_whole(file, found.to_json())
    return found


def sentence(predicted: dict[str, Any], peak: int) -> str | None:
    """What a run says whose peak was not the predicted one; None where it was."""
    if "reason" in predicted or abs(predicted["peak_error"]) <= NOTABLE:
        return None
    error = 100 * predicted["peak_error"]
    return (
        f"the measured peak, {gib(peak)}, is {abs(error):.0f} % {'above' if error > 0 else 'below'} the predicted {gib(predicted['peak'])}; "
        "checkpoints and evaluations during the run, and what an allocator keeps, are not predicted"
    )
