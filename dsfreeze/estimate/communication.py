"""Bytes that one rank sends in one optimizer step, item by item, as DeepSpeed 0.19.8 moves them.

For P_t elements that train, b bytes each, on W ranks, over A micro-steps (gradient accumulation); frozen tensors are
never reduced. A collective over n elements is counted as a ring sends it: all-reduce 2 (W-1)/W n b, all-gather and
reduce-scatter half of that.

    stage  gradients                 updated weights   weights for a pass
    0      all-reduce P_t, once      -                 -                   `engine.py: buffered_allreduce_fallback`
    1      all-reduce P_t, once      all-gather P_t    -                   `stage_1_and_2.py: reduce_gradients`
    2      all-reduce P_t, A times   all-gather P_t    -                   `stage_1_and_2.py: average_tensor`
    3      reduce-scatter P_t, A x   persistent ones   A (forward + backward), see `gathering`

Stages 1 and 2 all-reduce although each rank keeps a share: `reduce_scatter` (on in our configurations) only cuts the
bucket into the ranks' slices, and with `use_multi_rank_bucket_allreduce`, DeepSpeed's default, the slices travel in one
all-reduce (`allreduce_and_scatter`). Stage 1 waits for the last micro-step, also with overlap_comm; stage 2 reduces at
every one. The updated weights go group by group (`utils.py: all_gather_into_tensor_dp_groups`). At stage 3 every
persistent tensor, frozen ones too, is gathered again after a step (`stage3.py: _post_step`), one by one. Gradients
travel in the model's dtype also where they accumulate in fp32 (`communication_data_type`; from the source).

With the optimizer offloaded, shares of gradients and weights also pass between device and host memory, in all

    stage  down                              up
    2      4 P_t / W + (A b P_t / W, A > 1)  A b P_t / W          `async_accumulate_grad_in_cpu_via_gpu`
    3      (4 + A b) P_t / W                 (A + 1) b P_t / W    `stage3.py: partition_grads`

and `offload_param` spares the way up of the updated weights, b P_t / W, and takes b / W for each gathered element. Read in
the source, not measured: on a CPU there is no such way.

Measured (tests/distributed/test_communication.py, two ranks, six plans, all stages): no difference to what DeepSpeed's own
collectives carry, but for the few per cent of stage 3's gathers that `gathering` names. Left out: the gradient norm and
overflow flags (single elements, a few a step), padding (under W elements a tensor at stage 3, 2 W a group at 1 and 2),
what a change of the trainable set and the loop's own sums send, and that `use_multi_rank_bucket_allreduce: false` sends
half the gradients.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dsfreeze.anatomy import Anatomy
from dsfreeze.estimate.gathering import Limits, gathers, persistent
from dsfreeze.estimate.states import check_setting


@dataclass(frozen=True)
class Elements:
    """What the formulas need of a plan's phase: elements in all and trained, and for stage 3 those gathered in one pass
    before forwards and before backwards, those that stay gathered, and the most gathered at once beyond these."""

    total: int
    trainable: int
    gathered_forward: int
    gathered_backward: int
    persistent: int
    peak: int


@dataclass(frozen=True)
class Communication:
    """Bytes of one rank and one optimizer step; the first five cross to other ranks, the last two to host memory."""

    gradients: int
    updated_weights: int
    forward_weights: int
    backward_weights: int
    persistent_weights: int
    to_host: int
    from_host: int

    @property
    def sent(self) -> int:
        """Bytes that the rank sends to other ranks."""
        weights = self.updated_weights + self.forward_weights + self.backward_weights + self.persistent_weights
        return self.gradients + weights


def elements(
    anatomy: Anatomy, trainable: Iterable[str], limits: Limits | None = None, *, checkpointing: bool = False,
    cached: bool = False, evicted: frozenset[str] = frozenset(),
) -> Elements:  # fmt: skip
    """Counted from the anatomy, adapters in place, and the names that train; `limits` are stage 3's; `cached` when the prefix is read
    from a cache, `evicted` its tensors that are not there at all."""
    chosen, limits = frozenset(trainable), limits or Limits()
    passes = gathers(anatomy, chosen, limits, checkpointing=checkpointing, cached=cached)
    return Elements(
        total=anatomy.numel - sum(anatomy.by_name[name].numel for name in evicted),
        trainable=sum(t.numel for t in anatomy.tensors if t.name in chosen),
        gathered_forward=passes.forward,
        gathered_backward=passes.backward,
        persistent=persistent(anatomy, limits, evicted),
        peak=passes.peak,
    )


def communication(
    sizes: Elements, *, stage: int = 2, world_size: int = 1, dtype_bytes: int = 4, accumulation: int = 1,
    offload: bool = False, offload_param: bool = False,
) -> Communication:  # fmt: skip
    """The table above in bytes; UserError for a stage, a world size or an offload that does not exist."""
    check_setting(stage, world_size, offload)

    def ring(count: int) -> int:
        """Bytes of an all-gather or a reduce-scatter."""
        return count * dtype_bytes * (world_size - 1) // world_size

    reductions = accumulation if stage >= 2 else 1
    sharded = stage == 3
    down, up = _optimizer_traffic(sizes.trainable, stage, dtype_bytes, accumulation) if offload else (0, 0)
    if offload_param:
        gathered = accumulation * (sizes.gathered_forward + sizes.gathered_backward) + sizes.persistent
        up += dtype_bytes * (gathered - (sizes.trainable if offload else 0))
    return Communication(
        gradients=reductions * ring(sizes.trainable if sharded else 2 * sizes.trainable),
        updated_weights=ring(sizes.trainable) if stage in (1, 2) else 0,
        forward_weights=accumulation * ring(sizes.gathered_forward) if sharded else 0,
        backward_weights=accumulation * ring(sizes.gathered_backward) if sharded else 0,
        persistent_weights=ring(sizes.persistent) if sharded else 0,
        to_host=down // world_size,
        from_host=up // world_size,
    )


def _optimizer_traffic(trainable: int, stage: int, dtype_bytes: int, accumulation: int) -> tuple[int, int]:
    """(down, up) bytes of all ranks between devices and the offloaded optimizer."""
    passes, step = dtype_bytes * trainable * accumulation, 4 * trainable
    if stage == 3:
        return passes + step, passes + dtype_bytes * trainable
    return (passes if accumulation > 1 else 0) + step, passes
