"""What a prefix cache takes and spares, and whether to keep one. No torch.

With transformer layers below all that trains, the hidden state that leaves them is the same at every visit of an example. Stored
at the first visit (there is no pass of its own for it) and read at each later one, a token costs, in seconds of one device:

    recomputed   FLOPs of the prefix (`flops.prefix_flops`) / (0.5 peak)
    memory       bytes a token / bandwidth between device and host memory
    disk         bytes a token / (storage bandwidth / ranks of the node)

Bytes a token, for hidden size d: fp32 4 d, bf16 and fp16 2 d, int8 d + 4 (an fp32 scale for each token). Writing is taken to be as
fast as reading. For T training tokens, E evaluation tokens and v visits of an example, what a run spares is

    (v - 1) T (recomputed - read) - (T + E) write

so a cache never pays where reading is slower than recomputing, and pays at the end of the first epoch n with
n - 1 > (T + E) write / (T (recomputed - read)). Ranks that share a device (those of a CPU) share its peak and its memory too.

Sources: the idea is AutoFreeze's (arXiv 2102.01386); formulas and the rule of `choose` are ours; the device's figures and their
sources are in `hardware`, the 0.5 in `seconds`. Left out: the prefix's memory traffic (so recomputing is dearer than said), the codec's own
work, reading that hides behind the step (so reading is cheaper than said), what each visit of evaluation data spares, a file
system's cache, more than one node's share of the bytes (each node is taken to hold them all), and of an encoder-decoder whose
cut is in the decoder the encoder's own states.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor
from typing import Literal

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError
from dsfreeze.estimate.flops import prefix_flops
from dsfreeze.estimate.seconds import EFFICIENCY, reading_seconds
from dsfreeze.hardware import Device
from dsfreeze.tables import gib

Tier = Literal["memory", "disk"]
#: The faster first.
TIERS: tuple[Tier, ...] = ("memory", "disk")
#: Of free host memory, what `auto` takes at most (ours: the rest is for data, checkpoints and an offloaded optimizer).
MEMORY_SHARE = 4
#: Of a free disk, what `auto` leaves at least: a tenth, and a GiB (ours).
DISK_SHARE, DISK_LEAST = 10, 2**30


def bytes_a_token(hidden_size: int, storage: str, dtype_bytes: int) -> int:
    """Bytes of a token's stored state; `storage` is a freeze.prefix_cache_dtype, of which auto is the run's own `dtype_bytes`."""
    if storage == "int8":
        return hidden_size + 4
    return hidden_size * {"auto": dtype_bytes, "fp32": 4, "bf16": 2, "fp16": 2}[storage]


@dataclass(frozen=True)
class CacheCost:
    """A cache of one cut over one stretch of training. Seconds are of one device and one token; reading takes as long as writing."""

    layers: int
    """Transformer layers below all that trains; with none there is nothing to store."""
    hidden_size: int
    train_tokens: int
    eval_tokens: int
    token_bytes: int
    visits: float
    """Times that the stretch visits an example, in epochs."""
    recompute_seconds: float
    memory_seconds: float
    disk_seconds: float

    @property
    def size(self) -> int:
        """Bytes of all states."""
        return (self.train_tokens + self.eval_tokens) * self.token_bytes if self.layers else 0

    @property
    def needed_bandwidth(self) -> float:
        """Bytes a second and device above which reading a token beats recomputing it; infinite with nothing to recompute."""
        return self.token_bytes / self.recompute_seconds if self.recompute_seconds else float("inf")

    def read_seconds(self, tier: Tier) -> float:
        return self.memory_seconds if tier == "memory" else self.disk_seconds

    def saved_seconds(self, tier: Tier) -> float:
        """Device-seconds that the stretch is shorter by, all ranks together; below 0 where it is longer."""
        read = self.read_seconds(tier)
        again = (self.visits - 1) * self.train_tokens * (self.recompute_seconds - read)
        return again - (self.train_tokens + self.eval_tokens) * read

    def break_even(self, tier: Tier) -> int | None:
        """The first epoch at whose end less time has passed than without the cache, were there that many; None if never."""
        read = self.read_seconds(tier)
        each = self.train_tokens * (self.recompute_seconds - read)
        return floor((self.train_tokens + self.eval_tokens) * read / each) + 2 if each > 0 else None


def cache_cost(
    anatomy: Anatomy, trainable: Iterable[str], *, train_tokens: int, eval_tokens: int = 0, sequence_length: int, token_bytes: int,
    device: Device, sharers: int = 1, visits: float, dtype_bytes: int = 4, scale: float = 1.0,
) -> CacheCost:  # fmt: skip
    """Price a cache of what lies below `trainable` (one phase's, with the anatomy as it trains).

    `sequence_length` is the mean of the data, in positions; `token_bytes` as stored (`bytes_a_token`); `sharers` the ranks of a
    node, which share its storage; `dtype_bytes` (2 or 4) those of the weights that recomputing would multiply; `scale` a calibration's
    factor, of recomputing alone.
    """
    chosen = frozenset(trainable)
    share = device.sharers(sharers)
    spared = prefix_flops(anatomy, chosen, sequence_length)
    return CacheCost(
        layers=cached_layers(anatomy, chosen),
        hidden_size=anatomy.hidden_size,
        train_tokens=train_tokens,
        eval_tokens=eval_tokens,
        token_bytes=token_bytes,
        visits=visits,
        recompute_seconds=scale * spared * share / (EFFICIENCY * device.flops(dtype_bytes)),
        memory_seconds=reading_seconds(device, token_bytes, sharers, in_memory=True),
        disk_seconds=reading_seconds(device, token_bytes, sharers),
    )


def cached_layers(anatomy: Anatomy, trainable: Iterable[str]) -> int:
    """Transformer layers below all that trains; an embedding alone is looked up, not cached."""
    return sum(layer.is_block for layer in anatomy.prefix(trainable))


def evicted_tensors(anatomy: Anatomy, trainable: Iterable[str]) -> frozenset[str]:
    """What freeze.evict_prefix keeps off the device: all that lies below what trains, but what has another name above (an embedding
    that is also the head). Nothing where no transformer layer does."""
    chosen = frozenset(trainable)
    if not cached_layers(anatomy, chosen):
        return frozenset()
    return frozenset(t.name for layer in anatomy.prefix(chosen) for t in layer.tensors if not t.aliases)


# -- the choice --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What prefix_cache: auto comes to, and why, in a sentence that begins with the tier."""

    tier: Literal["off", "memory", "disk"]
    reason: str


def choose(cost: CacheCost, *, free_memory: int, free_disk: int) -> Choice:
    """The rule of prefix_cache: auto (ours): the faster tier that pays within the stretch and fits, else none.

    Memory where the states take at most a quarter of the node's `free_memory` (bytes, all ranks together); else disk where they
    leave a tenth of its `free_disk` bytes and no less than 1 GiB. Off where no transformer layer is frozen below all that
    trains, where no example comes twice, and where reading does not pay.
    """
    if not cost.layers:
        return Choice("off", "off: no transformer layer lies below all that trains, so there is no state to store")
    if cost.visits <= 1:
        return Choice("off", f"off: no example comes a second time in {epochs(cost.visits)}")
    against = []
    for tier in TIERS:
        reason = _against(cost, tier, free_memory if tier == "memory" else free_disk)
        if reason is None:
            return Choice(tier, f"{tier}: {_states(cost)} computed once instead of {_times(cost)}; {_pays(cost, tier)}")
        against.append(reason)
    return Choice("off", f"off: {'; '.join(against)}")


def asked_for(tier: Tier, cost: CacheCost) -> Choice:
    """The tier that a recipe names, in a sentence like `choose`'s."""
    return Choice(tier, f"{tier}: {_states(cost)}, visited {_times(cost)}")


def require_room(tier: str, cost: CacheCost, *, free_memory: int, free_disk: int) -> None:
    """UserError where prefix_cache: memory or disk was asked for and the states are more than the node has free (bytes); `auto` and
    `off` never are. Nothing is kept in reserve: whoever names a tier knows best."""
    if tier not in TIERS or cost.size <= (free := free_memory if tier == "memory" else free_disk):
        return
    place = "of host memory are" if tier == "memory" else "on the disk of freeze.prefix_cache_dir are"
    elsewhere = "freeze.prefix_cache: disk" if tier == "memory" else "a prefix_cache_dir on another disk"
    tokens = cost.train_tokens + cost.eval_tokens
    widths = {"bf16": 2 * cost.hidden_size, "int8": cost.hidden_size + 4}
    narrower = [f"{n} ({gib(tokens * width)})" for n, width in widths.items() if width < cost.token_bytes]
    narrow = f"freeze.prefix_cache_dtype: {' or '.join(narrower)}, " if narrower else ""
    raise UserError(
        f"freeze.prefix_cache: {tier} needs {gib(cost.size)} for the states of {_tokens(cost)}, and {gib(free)} {place} "
        f"free. Write {narrow}{elsewhere}, or freeze.prefix_cache: off."
    )


def _against(cost: CacheCost, tier: Tier, free: int) -> str | None:
    """Why not this tier; None where nothing speaks against it."""
    read = cost.read_seconds(tier)
    if read >= cost.recompute_seconds:
        return (
            f"reading a token from {tier} takes {_micro(read)}, recomputing it through {_layers(cost)} "
            f"{_micro(cost.recompute_seconds)}"
        )
    if cost.saved_seconds(tier) <= 0:
        return f"{tier} pays from epoch {cost.break_even(tier)}, and an example comes {_times(cost)}"
    room = free // MEMORY_SHARE if tier == "memory" else max(0, free - max(free // DISK_SHARE, DISK_LEAST))
    if cost.size <= room:
        return None
    kept = "a quarter of the free host memory" if tier == "memory" else "the disk's free space less its reserve"
    return f"{_states(cost)} are more than {kept}, {gib(room)}"


def _states(cost: CacheCost) -> str:
    return f"{gib(cost.size)} of states ({_tokens(cost)} of {cost.token_bytes:,} B) for {_layers(cost)}"


def _tokens(cost: CacheCost) -> str:
    count = cost.train_tokens + cost.eval_tokens
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit} tokens"
    return f"{count} tokens"


def _layers(cost: CacheCost) -> str:
    return f"{cost.layers} layer{'s' * (cost.layers > 1)}"


def _times(cost: CacheCost) -> str:
    return f"{cost.visits:.3g} times"


def _pays(cost: CacheCost, tier: Tier) -> str:
    return f"pays from epoch {cost.break_even(tier)}"


def epochs(visits: float) -> str:
    return f"{visits:.3g} epoch{'' if visits == 1 else 's'}"


def _micro(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us"
