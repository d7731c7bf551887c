"""Bytes of model states on one rank: weights, gradients, masters, moments.

Bytes, for P elements of which P_t train, on W ranks, b bytes an element (counted from live tensors of DeepSpeed 0.19.8
on two ranks; masters m and the two moments are fp32):

    stage  weights  gradients      masters    moments
    0      b P      b P_t          4 P_t (0)  8 P_t      (0): in fp32 the weight is its own master
    1      b P      b P_t          4 P_t / W  8 P_t / W
    2      b P      b P_t / W      4 P_t / W  8 P_t / W
    3      b P / W  b P_t / W      4 P_t / W  8 P_t / W

With the optimizer offloaded (2, 3), masters, moments and gradients lie in host memory, gradients as fp32 ones, 4 P_t / W,
and as those that are reduced, b P_t / W: at stage 3 always, at stage 2 while several micro-steps accumulate (and then of
a tensor that ranks share the whole on each). Stage 1 holds whole gradients during backward and b P_t / W after it. A tensor that never trained has its weight and nothing
else. One that trained in an earlier phase has, by the plan's state rule, an element: moments (8) and, in bf16, its master
(4) with `keep` on the device and with `offload` in host memory; with `clear` in bf16 its master (4) in host memory, and
with `drop_master` nothing. Over W ranks where masters are sharded.
DeepSpeed pads: stages 1 and 2 each group (a layer of ours, in two with weight decay) to a multiple of 2 W elements, stage 3
every tensor to one of W. `aligned` says by how much; with it, bytes are those of live objects to the byte, on every rank
(tests/distributed/test_state_bytes.py: six plans, all stages, offload, fp32 and bf16).
Left out: buckets, gathered layers and the transient fp32 gradient of a step (see `buffers`), activations, and what the
framework itself takes.
"""

from __future__ import annotations

from collections.abc import Iterable

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.plan import FreezePlan
from dsfreeze.setting import Setting


def state_bytes(
    total: int, trained: int, stage: int, world_size: int, dtype_bytes: int, offload: bool, *, accumulation: int = 1
) -> dict[str, int]:
    """The table above, each rounded up to whole elements a rank; `accumulation` is the micro-steps of a step."""

    def shard(count: int) -> int:
        return -(-count // world_size)

    weights = dtype_bytes * (shard(total) if stage == 3 else total)
    gradients = dtype_bytes * (shard(trained) if stage >= 2 else trained)
    states = shard(trained) if stage else trained
    masters = 0 if stage == 0 and dtype_bytes == 4 else 4 * states
    if offload:
        gradients = (4 + dtype_bytes * (stage == 3 or accumulation > 1)) * states
    on_host = masters + 8 * states + gradients if offload else 0
    return {
        "weights": weights,
        "gradients": gradients,
        "masters": masters,
        "optimizer_state": 8 * states,
        "on_host": on_host,
    }


def aligned(anatomy: Anatomy, trainable: Iterable[str], stage: int, world_size: int) -> tuple[int, int]:
    """(elements, elements that train) with DeepSpeed's padding, for `state_bytes`; one group a layer, as without weight decay."""
    chosen = frozenset(trainable)

    def padded(count: int, to: int) -> int:
        return -(-count // to) * to

    if stage == 3:
        shares = {t.name: padded(t.numel, world_size) for t in anatomy.tensors}
        return sum(shares.values()), sum(shares[name] for name in chosen)
    groups = [sum(t.numel for t in layer.tensors if t.name in chosen) for layer in anatomy.layers]
    return anatomy.numel, sum(padded(group, 2 * world_size) for group in groups) if stage else sum(groups)


def check_setting(stage: int, world_size: int, offload: bool) -> None:
    if stage not in (0, 1, 2, 3):
        raise UserError(f"There is no ZeRO stage {stage}. Valid: 0, 1, 2, 3.")
    if world_size < 1:
        raise UserError(f"A world size of {world_size} has no ranks. Write 1 or more.")
    if offload and stage < 2:
        raise UserError(f"The optimizer can be offloaded at ZeRO stages 2 and 3, not at {stage}.")


def parked_bytes(plan: FreezePlan, idle: int, dtype_bytes: int) -> int:
    master = 4 if dtype_bytes < 4 and not plan.drop_master else 0
    return idle * (master + (0 if plan.state == "clear" else 8))


def on_device(held: dict[str, int]) -> int:
    return sum(held[key] for key in ("weights", "gradients", "masters", "optimizer_state", "parked")) - held["on_host"]


def bytes_on_device(total: int, trained: int, setting: Setting) -> int:
    """Bytes of model states on one rank's device when `trained` of `total` elements train from the start."""
    held = state_bytes(total, trained, setting.stage, setting.world_size, setting.dtype_bytes, setting.offload)
    return on_device({**held, "parked": 0})
