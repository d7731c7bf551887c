"""What a forward pass stores for the backward one, and what the backward pass works with, in bytes, for any set that trains.

A profile is read once per architecture (`activation_reader.py`, by running the model on tensors without memory) and is kept with the
shipped anatomies; pricing it needs no torch. It rests on one rule of autograd: an operation stores an operand if and only if
some gradient that needs the operand is wanted, and a gradient is wanted if anything that trains feeds it. So what a layer
stores is a union over **causes**:

    stored(S) = union over c in S of stored({c}),   S = the layer's tensors that train, and its input where anything below trains

Each stored tensor therefore has a size, a polynomial in the micro-batch's shape, and the set of its causes; one that several causes
share, or several layers (rotary tables, a mask), is counted once. With gradient checkpointing a layer keeps its input alone,
and one layer at a time is stored in full.

Adapters are not in a profile, they are derived: B (out, r) is wanted like its matrix's output and stores r elements a token;
A (r, in) stores the matrix's input besides, or a dropped-out copy of it and a mask. DoRA stores its two products (2 out)
besides.

Left out: padding masks (a batch of unequal lengths adds a mask, and repeats keys and values to all heads where they are
shared), what kernels of a GPU hold inside, and dropout of attention weights, which fused kernels do not store and the CPU's
fall-back does. Against `saved_tensors_hooks`, measured in tests/test_activations.py: 0 for full, bottom, top, interval, matrix-level, bias and LoRA plans.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from typing import Any

from dsfreeze.anatomy import Anatomy, Tensor, head_task
from dsfreeze.errors import UserError
from dsfreeze.files import parse_json

#: Bytes as a polynomial in positions s and tokens T of a micro-batch: coefficients of 1, s, s^2, T and T s.
Size = tuple[int, int, int, int, int]
#: The cause that stands for a layer's input; a matrix's name and this for its output.
INPUT, OUTPUT = "", ">"
ATTENTIONS = ("sdpa", "eager")


def evaluate(size: Size, batch: int, length: int) -> int:
    """Bytes for `batch` sequences of `length` positions."""
    tokens = batch * length
    return sum(c * v for c, v in zip(size, (1, length, length**2, tokens, tokens * length), strict=True))


@dataclass(frozen=True)
class Stored:
    """One tensor (a storage), its bytes, and what makes it stored. `shared` numbers those that layers have in common, else -1."""

    size: Size
    causes: frozenset[str]
    shared: int = -1


@dataclass(frozen=True)
class Part:
    """What comes before the layers, one kind of layer, or what comes after them (the loss included).

    `carried`: what a layer is given beside its input (rotary tables, a mask), which checkpointing keeps alive. `forward` and `backward`: the most that the pass holds beyond what is alive when it enters the part, as alternatives of
    which the largest counts; `idle`: the same of a forward pass that records nothing. `unrepeated`: matrices that checkpointing does not run again, since nothing is stored after them.
    """

    stored: tuple[Stored, ...]
    carried: tuple[Stored, ...] = ()
    idle: tuple[Size, ...] = ()
    forward: tuple[Size, ...] = ()
    backward: tuple[Size, ...] = ()
    unrepeated: tuple[str, ...] = ()

    def bytes_of(self, active: frozenset[str], batch: int, length: int) -> tuple[int, dict[int, int]]:
        """(its own bytes, those that it shares by number) of what the active causes store."""
        kept = [item for item in self.stored if not item.causes.isdisjoint(active)]
        own = sum(evaluate(item.size, batch, length) for item in kept if item.shared < 0)
        return own, {item.shared: evaluate(item.size, batch, length) for item in kept if item.shared >= 0}


@dataclass(frozen=True)
class Ends:
    """The parts before and after the layers; they differ from task to task."""

    embed: Part
    end: Part


@dataclass(frozen=True)
class Profile:
    """One way to run a model (attention and precision): its kinds of layers, and its ends by task."""

    blocks: tuple[Part, ...]
    ends: Mapping[str, Ends]


@dataclass(frozen=True)
class Activations:
    """The profiles of a model, by (attention, bytes of an element), and the kind of each of its layers."""

    kinds: tuple[int, ...]
    profiles: Mapping[tuple[str, int], Profile] = field(default_factory=dict)

    def of(self, task: str, attention: str | None, dtype_bytes: int) -> TaskActivations:
        """For a task and a way to run it; `attention` None is what transformers would choose. UserError when it was not read."""
        task = head_task(task)
        able = [name for name in ATTENTIONS if (name, dtype_bytes) in self.profiles]
        if not able:
            raise UserError(f"The activations of this model are not known at {dtype_bytes} bytes an element.")
        chosen = "sdpa" if (attention or able[0]).startswith("flash") else attention or able[0]
        if chosen not in able:
            raise UserError(f"The activations are not known for attention '{chosen}'; they are for {', '.join(able)}.")
        profile = self.profiles[chosen, dtype_bytes]
        if task not in profile.ends:
            raise UserError(f"The activations are not known for task '{task}'; they are for {', '.join(profile.ends)}.")
        blocks = tuple(profile.blocks[kind] for kind in self.kinds)
        return TaskActivations(blocks, profile.ends[task], chosen, dtype_bytes)

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        return json.dumps(self.to_plain(), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Activations:
        """Read `to_json`'s form; UserError when it is not one."""
        try:
            raw = parse_json(text)
        except ValueError as error:
            raise UserError(f"Not a profile of activations: {error}.") from None
        return cls.from_plain(raw)

    def to_plain(self) -> dict[str, Any]:
        """Plain values: runs of equal kinds, causes by number."""
        return {
            "kinds": [[kind, len(list(run))] for kind, run in groupby(self.kinds)],
            "profiles": {
                f"{attention}.{width}": {
                    "blocks": [_part_to_plain(part) for part in profile.blocks],
                    "ends": {t: [_part_to_plain(e.embed), _part_to_plain(e.end)] for t, e in profile.ends.items()},
                }
                for (attention, width), profile in self.profiles.items()
            },
        }

    @classmethod
    def from_plain(cls, raw: Mapping[str, Any]) -> Activations:
        """Read `to_plain`'s form; UserError when it is not one."""
        try:
            profiles = {}
            for key, entry in raw["profiles"].items():
                attention, _, width = key.partition(".")
                ends = {task: Ends(*map(_part_from_plain, pair)) for task, pair in entry["ends"].items()}
                profiles[attention, int(width)] = Profile(tuple(map(_part_from_plain, entry["blocks"])), ends)
            return cls(tuple(kind for kind, count in raw["kinds"] for _ in range(count)), profiles)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"Not a profile of activations: {error}.") from None


def _part_to_plain(part: Part) -> dict[str, Any]:
    causes = sorted(set(chain.from_iterable(item.causes for item in part.stored)))
    number = {cause: i for i, cause in enumerate(causes)}
    stored = [[list(s.size), sum(1 << number[c] for c in s.causes), s.shared] for s in part.stored]
    plain: dict[str, Any] = {"causes": causes, "stored": stored}
    plain |= {"carried": [[list(s.size), s.shared] for s in part.carried]} if part.carried else {}
    for name in ("idle", "forward", "backward", "unrepeated"):
        plain |= (
            {name: [list(v) if isinstance(v, tuple) else v for v in getattr(part, name)]} if getattr(part, name) else {}
        )
    return plain


def _part_from_plain(raw: Mapping[str, Any]) -> Part:
    causes: list[str] = raw["causes"]

    def named(mask: int) -> frozenset[str]:
        return frozenset(cause for i, cause in enumerate(causes) if mask >> i & 1)

    idle, forward, backward = (tuple(map(_size, raw.get(name, ()))) for name in ("idle", "forward", "backward"))
    return Part(
        tuple(Stored(_size(size), named(mask), shared) for size, mask, shared in raw["stored"]),
        tuple(Stored(_size(size), frozenset(), shared) for size, shared in raw.get("carried", ())),
        idle,
        forward,
        backward,
        tuple(raw.get("unrepeated", ())),
    )


def _size(values: Sequence[int]) -> Size:
    one, s, s2, t, ts = map(int, values)
    return one, s, s2, t, ts


# -- of a plan -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Passes:
    """Bytes on one rank in one micro-batch's passes, beside the model's states, of each part: what comes before the layers, each
    layer, what comes after.

    `stored`: kept from forward to backward (with checkpointing a layer's input); `shared` among parts. `forward`: the most at
    any moment in the part, all that is stored below it included. `backward`: the same, 0 where no gradient passes; gradients of weights that wait
    for the step are not in it.
    """

    stored: tuple[int, ...]
    shared: int
    forward: tuple[int, ...]
    backward: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes stored at the end of the forward pass."""
        return sum(self.stored) + self.shared


@dataclass(frozen=True)
class TaskActivations:
    """The parts of one model for one task and one way to run it; `width` is the bytes of an element."""

    blocks: tuple[Part, ...]
    ends: Ends
    attention: str
    width: int

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return (self.ends.embed, *self.blocks, self.ends.end)

    def passes(
        self, anatomy: Anatomy, trainable: Iterable[str], batch: int, length: int,
        *, checkpointing: bool = False, dropout: float = 0.0,
    ) -> Passes:  # fmt: skip
        """Price a set; `anatomy` is the one whose names it uses (adapters in place), `dropout` that of its adapters."""
        shape = (batch, length)
        causes = list(_causes_of(anatomy, frozenset(trainable), dropout))
        extra = [batch * length * sum(self._of_adapter(t, dropout) for t in tensors) for tensors, _ in causes]
        held = [part.bytes_of(active, *shape) for part, (_, active) in zip(self.parts, causes, strict=True)]
        whole = [own + more for (own, _), more in zip(held, extra, strict=True)]
        kept, common = list(whole), [shared for _, shared in held]
        if checkpointing:
            hidden = self.width * batch * length * anatomy.hidden_size
            for i in (i for i, (_, active) in enumerate(causes) if active and self._is_block(i)):
                kept[i] = hidden
                common[i] = {item.shared: evaluate(item.size, *shape) for item in self.parts[i].carried}
        shared = sum({number: size for one in common for number, size in one.items()}.values())
        return self._timed(kept, whole, [bool(active) for _, active in causes], shared, shape)

    def busy(self, batch: int, length: int) -> tuple[int, ...]:
        """Bytes of everything that each part would store if all trained: what its element-wise operations write and read."""
        return tuple(sum(evaluate(item.size, batch, length) for item in part.stored) for part in self.parts)

    def _timed(
        self, kept: list[int], whole: list[int], recorded: list[bool], shared: int, shape: tuple[int, int]
    ) -> Passes:
        """The most in each part of either pass; the end's loss works with what it holds before anything above it is freed."""
        forward, backward, below = [], [], shared
        for i, part in enumerate(self.parts):
            recomputed = kept[i] != whole[i]
            working = part.idle if recomputed or not recorded[i] else part.forward
            forward.append(below + max(kept[i], _most(working, shape)))
            # the end's backward pass begins with what its forward pass holds; a checkpointed layer is stored in full once more
            start = below if i == len(self.parts) - 1 else below + kept[i] + (whole[i] if recomputed else 0)
            backward.append(start + _most(part.backward, shape) if recorded[i] else 0)
            below += kept[i]
        return Passes(tuple(kept), shared, tuple(forward), tuple(backward))

    def _is_block(self, index: int) -> bool:
        return 0 < index < len(self.parts) - 1

    def _of_adapter(self, tensor: Tensor, dropout: float) -> int:
        """Bytes a token that an adapter's tensor stores itself."""
        if tensor.category != "adapter":
            return 0
        if ".lora_B." in tensor.name:
            return self.width * tensor.shape[1]
        if ".lora_A." in tensor.name:
            return 2 * self.width * tensor.shape[1] if dropout else 0
        return 2 * self.width * tensor.numel

    def unrepeated(self, anatomy: Anatomy) -> frozenset[str]:
        """Matrices of the layers that a checkpointed layer does not multiply by again; an adapter's B in place of its matrix."""
        names = set()
        for part, layer in zip(self.blocks, anatomy.blocks, strict=True):
            for tensor in layer.tensors:
                local = _local(tensor.name, layer.path)
                last = {name.rpartition(".")[0] for name in part.unrepeated}
                wrapped = ".base_layer" in local
                home = local.partition(".lora_")[0] if ".lora_B." in local else local.rpartition(".")[0]
                if home in last and not wrapped:
                    names.add(tensor.name)
        return frozenset(names)


def _causes_of(
    anatomy: Anatomy, chosen: frozenset[str], dropout: float
) -> Iterator[tuple[list[Tensor], frozenset[str]]]:
    """Of each part: its tensors that train, and the causes that are active. A tied embedding is in the first part and the last."""
    first = [layer for layer in anatomy.layers if layer.name == "embed"]
    last = [layer for layer in anatomy.layers if layer.name in ("norm", "head")]
    tied = [t for layer in first for t in layer.tensors if t.aliases and t.name in chosen]
    below = False
    for layers in (first, *([layer] for layer in anatomy.blocks), last):
        trained = [t for layer in layers for t in layer.tensors if t.name in chosen]
        path = layers[0].path if layers else ""
        active = {_cause(_local(t.name, path), dropout) for t in trained} | ({INPUT} if below else set())
        yield trained, frozenset(active | {t.name for t in tied} if layers is last else active)
        below = below or bool(trained)


def _local(name: str, path: str) -> str:
    return name.removeprefix(path + ".") if path else name


def _cause(name: str, dropout: float) -> str:
    """What a profile knows of it: a tensor by its name, an adapter as its matrix (A reads its input) or as the matrix's output."""
    name = name.replace(".base_layer.", ".")
    if ".lora_" not in name:
        return name
    matrix = name.partition(".lora_")[0] + ".weight"
    return matrix if ".lora_A." in name and not dropout else matrix + OUTPUT


def _most(alternatives: Iterable[Size], shape: tuple[int, int]) -> int:
    return max((evaluate(size, *shape) for size in alternatives), default=0)
