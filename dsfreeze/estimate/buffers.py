"""Bytes on one rank's device beyond model states: what DeepSpeed 0.19.8 sends from, gathers into and steps with.

For a bucket of B elements, b bytes an element, P_t that train (m of them in the largest tensor, g in the largest layer),
W ranks:

    reduce bucket     1, 2: b B during backward, twice with overlap_comm (`stage_1_and_2.py: setup_buckets`)
                      3: b B for ever, once (`stage3.py: _setup_for_real_optimizer`, after it)
    reduce copy       what a bucket holds, flattened once more to be sent: b min(max(B, m), P_t)
                      (1, 2: `allreduce_bucket`; 3: `coalesced_collectives.py`; 0: `engine.py: allreduce_bucket`, B = 5e8)
    step gradient     1, 2, 3: a layer's gradient, flattened and in fp32: (b + 4) g / W, in fp32 4 g / W, since our groups are
                      layers (`step`, `_prepare_fp32_grad_for_sub_group`); 0 in bf16: 4 P_t (`unfused_optimizer.py`)
    gathered weights  3: b x the most that lie gathered (see `gathering`), persistent ones apart
    persistent        3: b x elements of small tensors, frozen ones too
    gather copy       3: b (prefetch bucket + largest tensor): a prefetch's flat buffer lives until its last tensor is used,
                      beside the tensors cut from it (`partition_parameters.py: AllGatherCoalescedHandle`)
    offload staging   2: b m on the device, and in host memory b (m + P_t / W) (`temp_grad_buffer_for_gpu_offload` and
                      `..._cpu_offload`, `param_buffer_of_bit16_for_cpu_offload_groups`)

There is no all-gather bucket: updated weights are gathered into place (`utils.py: all_gather_into_tensor_dp_groups`), whatever
`allgather_bucket_size` says. With the optimizer offloaded the step needs nothing on the device but, at stage 2, one tensor's
share in fp32, 4 m / W.

Measured (tests/distributed/test_buffers.py, against live objects on two ranks): bucket, persistent and gathered weights to the
byte; step gradient to the padding of a group (under 2 W elements), the copy never above the formula. The gather copy is a bound
from the source. Left out: activations, the logits, workspaces of kernels, the communication library's own buffers, the
allocator's fragments.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate.communication import Elements
from dsfreeze.estimate.gathering import Limits
from dsfreeze.estimate.states import check_setting
from dsfreeze.zero_config import bucket_of

#: Elements that stage 0 reduces at once (`runtime/engine.py: MEMORY_OPT_ALLREDUCE_SIZE`).
_STAGE_0_BUCKET = 500_000_000


@dataclass(frozen=True)
class Buffers:
    """Bytes on the device beyond model states (table: above)."""

    reduce_bucket: int
    reduce_copy: int
    step_gradient: int
    gathered_weights: int
    persistent_weights: int
    gather_copy: int
    offload_staging: int
    permanent: int
    """Of the above, what is there from the first step on, whatever runs."""
    on_host: int
    """Besides, in host memory."""

    @property
    def in_backward(self) -> int:
        """What forward and backward need at their worst, activations apart."""
        backward = self.reduce_bucket + self.reduce_copy + self.gathered_weights + self.gather_copy
        return backward + self.persistent_weights + self.offload_staging

    @property
    def in_step(self) -> int:
        """What the optimizer's step needs."""
        return self.permanent + self.step_gradient


def buffers(
    anatomy: Anatomy, trainable: Iterable[str], sizes: Elements, *, stage: int = 2, world_size: int = 1,
    dtype_bytes: int = 4, offload: bool = False, bucket: int | None = None, overlap_comm: bool | None = None,
    limits: Limits | None = None, cached: bool = False,
) -> Buffers:  # fmt: skip
    """The table above. `sizes` are of the same anatomy, set, limits and `cached`; `bucket` (elements) and `overlap_comm` default to what
    the shipped configurations make of them. UserError for a stage, a world size or an offload that does not exist."""
    check_setting(stage, world_size, offload)
    chosen = frozenset(trainable)
    trained = [t.numel for t in anatomy.tensors if t.name in chosen]
    largest = max(trained, default=0)
    held = _STAGE_0_BUCKET if stage == 0 else bucket_of(sizes.trainable) if bucket is None else bucket
    doubled = stage in (1, 2) and bool(overlap_comm)
    reduce_bucket = held * dtype_bytes * (2 if doubled else 1) if stage else 0
    persistent = dtype_bytes * sizes.persistent if stage == 3 else 0
    staging = dtype_bytes * largest if offload and stage == 2 else 0
    return Buffers(
        reduce_bucket=reduce_bucket,
        reduce_copy=dtype_bytes * min(max(held, largest), sizes.trainable) if world_size > 1 else 0,
        step_gradient=_step_gradient(anatomy, chosen, stage, world_size, dtype_bytes, offload),
        gathered_weights=dtype_bytes * sizes.peak if stage == 3 else 0,
        persistent_weights=persistent,
        gather_copy=dtype_bytes * _gather_copy(anatomy, chosen, sizes, limits or Limits(), cached) if stage == 3 else 0,
        offload_staging=staging,
        permanent=persistent + staging + (reduce_bucket if stage == 3 else 0),
        on_host=staging and staging + dtype_bytes * -(-sizes.trainable // world_size),
    )


def _step_gradient(
    anatomy: Anatomy, trainable: frozenset[str], stage: int, world_size: int, dtype_bytes: int, offload: bool
) -> int:
    layers = [[t.numel for t in layer.tensors if t.name in trainable] for layer in anatomy.layers]
    rounded = dtype_bytes < 4
    if stage == 0:
        return 4 * sum(map(sum, layers)) if rounded else 0
    if offload:
        largest = max((numel for layer in layers for numel in layer), default=0)
        return 4 * -(-largest // world_size) if stage == 2 and rounded else 0
    return (4 + (dtype_bytes if rounded else 0)) * -(-max(map(sum, layers)) // world_size)


def _gather_copy(anatomy: Anatomy, trainable: frozenset[str], sizes: Elements, limits: Limits, cached: bool) -> int:
    """A tensor of a cached prefix is gathered only where it is also the head."""
    skipped = {t.name for layer in anatomy.prefix(trainable) for t in layer.tensors if not t.aliases} if cached else ()
    gathered = (t.numel for t in anatomy.tensors if t.numel > limits.persistence and t.name not in skipped)
    return min(limits.prefetch + max(gathered, default=0), sizes.peak)
