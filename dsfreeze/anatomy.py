"""The anatomy: a model read as an ordered tuple of layers, each holding named tensors.

No torch here: an anatomy is a value with a JSON form, so that plans can be made and priced without a
framework. `model.read_anatomy` makes one from a module on the meta device; shapes of well-known models are
shipped under `anatomies/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

from dsfreeze.errors import UserError, did_you_mean
from dsfreeze.files import parse_json

CATEGORIES = (
    "q", "k", "v", "o", "up", "gate", "down", "norm", "bias", "embed", "head", "other",
    "qkv", "gate_up", "adapter",
)  # fmt: skip
#: Fused tensors hold several matrices as blocks of rows.
FUSED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
ATTENTION = ("q", "k", "v", "o", "qkv")
MLP = ("up", "gate", "down", "gate_up")
SHIPPED = Path(__file__).parent / "anatomies"
#: transformers' name of the token-classification head where it is not `score`.
TOKEN_HEADS = dict.fromkeys(("gpt2", "gpt_neox", "bloom", "falcon"), "classifier")
#: Attribute under which a task model keeps its base encoder.
ENCODER_PREFIXES = {"bert": "bert", "modernbert": "model"}
#: Encoders whose task models have a dense layer and a norm before the classifier.
DENSE_HEADS = ("modernbert",)
#: Decoders of which transformers has no token classifier.
NO_TOKEN_HEADS = ("gemma3_text", "olmo2")
#: Tasks of a decoder's language model.
LANGUAGE_TASKS = ("causal_lm", "sft", "preference")


@dataclass(frozen=True)
class Tensor:
    """One parameter, once, under the name `module.named_parameters()` gives it.

    `flops_per_token` counts the forward multiply-adds of a token through this tensor (two FLOPs each; 0 for
    gains, biases and look-ups). `aliases` are further names of the same storage (a tied head). A matrix whose
    rows are its inputs (GPT-2's Conv1D) has `fan_in_fan_out`. `parts` are what a fused matrix holds along its outputs,
    (category, number of outputs), in turn until it ends; empty for any other, and where they are not known.
    """

    name: str
    shape: tuple[int, ...]
    category: str
    flops_per_token: int = 0
    aliases: tuple[str, ...] = ()
    fan_in_fan_out: bool = False
    parts: tuple[tuple[str, int], ...] = ()

    @cached_property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def is_bias(self) -> bool:
        return self.category == "bias"

    @property
    def module(self) -> str:
        """The path of the module that owns the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def outputs(self) -> int:
        return self.shape[1 if self.fan_in_fan_out else 0] if self.shape else 1

    def outputs_of(self, part: str) -> tuple[tuple[int, int], ...]:
        """The outputs of a fused matrix that are `part`, as blocks [first, last)."""
        ends = list(accumulate((size for _, size in self.parts), initial=0))
        return tuple(
            (start + first, start + last)
            for start in range(0, self.outputs if self.parts else 0, ends[-1] or 1)
            for (category, _), (first, last) in zip(self.parts, pairwise(ends), strict=True)
            if category == part
        )


@dataclass(frozen=True)
class Layer:
    """A named group of tensors: `embed`, `layers.0` .. `layers.L-1`, `norm` or `head`.

    `path` is the module path of a transformer layer (`model.layers.3`), empty for the other three, whose
    tensors may live in several modules. `stack` tells an encoder's layers from a decoder's where a model has both.
    """

    name: str
    tensors: tuple[Tensor, ...]
    path: str = ""
    stack: str = ""

    @cached_property
    def numel(self) -> int:
        return sum(t.numel for t in self.tensors)

    @cached_property
    def flops_per_token(self) -> int:
        return sum(t.flops_per_token for t in self.tensors)

    @property
    def is_block(self) -> bool:
        """Whether this is one of the L transformer layers."""
        return self.name.startswith("layers.")


@dataclass(frozen=True)
class Anatomy:
    """A model as an ordered tuple of layers, input first.

    `hidden_size` d and `attention_width` (query heads x head size) are elements; `vocab_size` 0 where there is no
    token embedding. Where values are narrower than keys (multi-head latent attention), the width is the mean of the
    two, so that 4 s width is still what scores and their use cost. `structural` is true when the architecture was
    unknown and the layers were found by structure.
    """

    name: str
    model_type: str
    layers: tuple[Layer, ...]
    hidden_size: int = 0
    attention_width: int = 0
    vocab_size: int = 0
    structural: bool = False
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """Every tensor under its own name and under each alias."""
        names = {t.name: t for t in self.tensors}
        for tensor in self.tensors:
            names.update(dict.fromkeys(tensor.aliases, tensor))
        return names

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for layer in self.layers for t in layer.tensors)

    @cached_property
    def blocks(self) -> tuple[Layer, ...]:
        """The L transformer layers, `layers.0` first."""
        return tuple(layer for layer in self.layers if layer.is_block)

    @cached_property
    def block_tensors(self) -> tuple[Tensor, ...]:
        """Those of the transformer layers."""
        return tuple(t for layer in self.blocks for t in layer.tensors)

    @cached_property
    def numel(self) -> int:
        return sum(t.numel for t in self.tensors)

    @cached_property
    def tied(self) -> tuple[Tensor, ...]:
        """Tensors with more than one name (an embedding that is also the head)."""
        return tuple(t for t in self.tensors if t.aliases)

    @cached_property
    def layer_of(self) -> dict[str, Layer]:
        return {t.name: layer for layer in self.layers for t in layer.tensors}

    def layer(self, name: str) -> Layer:
        """The layer of that name; UserError with the nearest name when there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise UserError(f"{self.name} has no layer '{name}'.{did_you_mean(name, self.layer_names)}")

    @property
    def layer_names(self) -> tuple[str, ...]:
        return tuple(layer.name for layer in self.layers)

    def in_order(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names sorted into model order, each once; UserError for a name the model lacks."""
        wanted = set(names)
        unknown = sorted(wanted - {t.name for t in self.tensors})
        if unknown:
            raise UserError(f"{self.name} has no tensor '{unknown[0]}'.{did_you_mean(unknown[0], self.by_name)}")
        return tuple(t.name for t in self.tensors if t.name in wanted)

    def lowest_trainable(self, trainable: Iterable[str]) -> int:
        """Index into `layers` of the lowest layer with a trainable tensor; `len(layers)` when there is none."""
        chosen = set(trainable)
        for index, layer in enumerate(self.layers):
            if any(t.name in chosen for t in layer.tensors):
                return index
        return len(self.layers)

    def prefix(self, trainable: Iterable[str]) -> tuple[Layer, ...]:
        """The layers below the lowest trainable one, the embedding included if it is frozen."""
        return self.layers[: self.lowest_trainable(trainable)]

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and shapes in order: two models with one digest take the same plans."""
        rows = [(layer.name, t.name, t.shape) for layer in self.layers for t in layer.tensors]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    # -- tasks -------------------------------------------------------------------------------------------------

    def for_task(self, task: str, num_labels: int | None) -> Anatomy:
        """The anatomy of the model that transformers builds for `task`, from a causal LM's or a base encoder's.

        A causal LM's head gives way to a `score`, a base encoder moves under its attribute's name and gains a
        `classifier`; `num_labels` None means 2. UserError when the model cannot do the task.
        """
        is_decoder = any("lm_head.weight" in (t.name, *t.aliases) for t in self.tensors)
        if is_decoder and head_task(task) == "causal_lm":
            return self
        able = self._tasks(is_decoder)
        if task not in able:
            raise UserError(
                f"Model '{self.name}' ({self.model_type}) cannot do task '{task}'. Its tasks: {', '.join(able)}."
            )
        parts = _without_lm_head(self) if is_decoder else _under_prefix(self, ENCODER_PREFIXES[self.model_type], task)
        stem = (
            "classifier"
            if not is_decoder
            else TOKEN_HEADS.get(self.model_type, "score")
            if task == "tokens"
            else "score"
        )
        shape = (num_labels or 2, self.hidden_size)
        head = [Tensor(f"{stem}.weight", shape, "head", 2 * prod(shape))]
        if task == "tokens" or not is_decoder:
            head.append(Tensor(f"{stem}.bias", shape[:1], "bias"))
        kept = tuple(layer for layer in parts if layer.name != "head")
        before = [t for layer in parts if layer.name == "head" for t in layer.tensors]  # a pooler
        if self.model_type in DENSE_HEADS:
            before.append(Tensor("head.dense.weight", (self.hidden_size,) * 2, "head", 2 * self.hidden_size**2))
            before.append(Tensor("head.norm.weight", (self.hidden_size,), "norm"))
        return replace(self, layers=(*kept, Layer("head", (*before, *head))))

    def _tasks(self, is_decoder: bool) -> tuple[str, ...]:
        able = ("classification", "tokens") if is_decoder or self.model_type in ENCODER_PREFIXES else ()
        kept = [task for task in able if task == "classification" or self.model_type not in NO_TOKEN_HEADS]
        return (*kept, *(LANGUAGE_TASKS if is_decoder else ()))

    def with_labels(self, num_labels: int) -> Anatomy:
        """A two-label classifier's anatomy for `num_labels`: what has two rows in its head gets as many."""

        def relabelled(tensor: Tensor) -> Tensor:
            if tensor.shape[0] != 2:
                return tensor
            shape = (num_labels, *tensor.shape[1:])
            return replace(tensor, shape=shape, flops_per_token=tensor.flops_per_token // 2 * num_labels)

        layers = (
            replace(layer, tensors=tuple(map(relabelled, layer.tensors))) if layer.name == "head" else layer
            for layer in self.layers
        )
        return replace(self, layers=tuple(layers))

    # -- adapters ----------------------------------------------------------------------------------------------

    def with_adapters(self, targets: Iterable[str], r: int, dora: bool) -> Anatomy:
        """The anatomy after low-rank adapters (peft's names) joined the matrices named in `targets`.

        A target W of shape (out, in) gains A (r, in), B (out, r) and, for DoRA, a magnitude (out,) [arXiv 2106.09685;
        2402.09353]; its own weight and bias move under `base_layer`.
        """
        chosen = set(self.in_order(targets))
        modules = {self.by_name[name].module for name in chosen}
        layers = tuple(
            replace(layer, tensors=tuple(_adapted(layer.tensors, chosen, modules, r, dora))) for layer in self.layers
        )
        return replace(self, layers=layers)

    # -- JSON --------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        head = {k: getattr(self, k) for k in ("name", "model_type", "hidden_size", "attention_width", "vocab_size")}
        head |= {"structural": self.structural, "notes": list(self.notes), "layers": list(_runs(self.layers))}
        return json.dumps(head, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Anatomy:
        """Read `to_json`'s form; UserError when it is not one."""
        try:
            raw = parse_json(text)
            layers = tuple(layer for row in raw.pop("layers") for layer in _expand(row))
            return cls(layers=layers, notes=tuple(raw.pop("notes", ())), **raw)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise UserError(
                f"Not an anatomy: {error}. Write one with `dsfreeze plan model=... --anatomy FILE`."
            ) from None


def head_task(task: str) -> str:
    """The task whose head a task's model has: chats and preferences take the language model's."""
    return "causal_lm" if task in LANGUAGE_TASKS else task


def _without_lm_head(anatomy: Anatomy) -> tuple[Layer, ...]:
    """A causal LM's layers without its head; a tied embedding is a mere look-up then."""

    def untied(tensor: Tensor) -> Tensor:
        if "lm_head.weight" not in tensor.aliases:
            return tensor
        aliases = tuple(alias for alias in tensor.aliases if alias != "lm_head.weight")
        return replace(tensor, aliases=aliases, flops_per_token=0)

    layers = (layer for layer in anatomy.layers if layer.name != "head")
    return tuple(replace(layer, tensors=tuple(map(untied, layer.tensors))) for layer in layers)


def _under_prefix(anatomy: Anatomy, prefix: str, task: str) -> tuple[Layer, ...]:
    """A base encoder's layers under `prefix`; token classification does without the pooler."""
    layers = (layer for layer in anatomy.layers if layer.name != "head" or task == "classification")
    return tuple(
        replace(
            layer,
            path=layer.path and f"{prefix}.{layer.path}",
            tensors=tuple(replace(t, name=f"{prefix}.{t.name}") for t in layer.tensors),
        )
        for layer in layers
    )


def _adapted(tensors: Iterable[Tensor], chosen: set[str], modules: set[str], r: int, dora: bool) -> Iterator[Tensor]:
    """The tensors in peft's order: a module's own, under `base_layer`, then its adapter."""
    adapter: list[Tensor] = []
    for tensor in tensors:
        if adapter and not adapter[0].name.startswith(tensor.module + ".lora_"):
            yield from adapter
            adapter = []
        if tensor.module not in modules:
            yield tensor
            continue
        leaf = tensor.name.rpartition(".")[2]
        yield replace(tensor, name=f"{tensor.module}.base_layer.{leaf}")
        if tensor.name in chosen:
            adapter = list(_adapter_tensors(tensor, r, dora))
    yield from adapter


def _adapter_tensors(matrix: Tensor, r: int, dora: bool) -> Iterator[Tensor]:
    width_out, width_in = matrix.shape[::-1] if matrix.fan_in_fan_out else matrix.shape
    for letter, shape in (("A", (r, width_in)), ("B", (width_out, r))):
        yield Tensor(f"{matrix.module}.lora_{letter}.default.weight", shape, "adapter", 2 * prod(shape))
    if dora:
        yield Tensor(f"{matrix.module}.lora_magnitude_vector.default.weight", (width_out,), "adapter")


def shipped() -> dict[str, Path]:
    """The anatomies that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.json"))}


def load_shipped(name: str) -> Anatomy:
    """The shipped anatomy of that name; UserError with the nearest name when there is none."""
    files = shipped()
    if name not in files:
        raise UserError(f"No shipped anatomy '{name}'.{did_you_mean(name, files)}")
    return Anatomy.from_json(files[name].read_text(encoding="utf-8"))


# Layers that differ in nothing but their index are stored once, as a run: `{i}` is the index in the path and
# `{n}` the number in the layer's name.


def _row(layer: Layer) -> dict:
    def generic(name: str) -> str:
        return name.replace(layer.path, "{path}", 1) if layer.path and name.startswith(layer.path + ".") else name

    tensors = []
    for t in layer.tensors:
        row: dict = {"name": generic(t.name), "shape": list(t.shape), "category": t.category}
        row |= {"flops_per_token": t.flops_per_token} if t.flops_per_token else {}
        row |= {"aliases": list(t.aliases)} if t.aliases else {}
        row |= {"fan_in_fan_out": True} if t.fan_in_fan_out else {}
        row |= {"parts": [list(part) for part in t.parts]} if t.parts else {}
        tensors.append(row)
    return {"stack": layer.stack, "tensors": tensors}


def _runs(layers: Iterable[Layer]) -> Iterator[dict]:
    run: dict | None = None
    for layer in layers:
        row = _row(layer)
        stem, _, index = layer.path.rpartition(".")
        if not layer.is_block or not index.isdigit():
            if run:
                yield run
                run = None
            yield {"layer": layer.name, "path": layer.path, **row}
            continue
        if run and run["stem"] == stem and {"stack": run["stack"], "tensors": run["tensors"]} == row:
            run["count"] += 1
            continue
        if run:
            yield run
        first = int(layer.name.partition(".")[2])
        run = {"first": first, "first_index": int(index), "stem": stem, "count": 1, **row}
    if run:
        yield run


def _expand(row: dict) -> Iterator[Layer]:
    if "layer" in row:
        yield _layer(row["layer"], row["path"], row)
        return
    for i in range(row["count"]):
        yield _layer(f"layers.{row['first'] + i}", f"{row['stem']}.{row['first_index'] + i}", row)


def _layer(name: str, path: str, row: dict) -> Layer:
    tensors = tuple(
        Tensor(
            name=t["name"].replace("{path}", path, 1),
            shape=tuple(int(n) for n in t["shape"]),
            category=t["category"],
            flops_per_token=int(t.get("flops_per_token", 0)),
            aliases=tuple(t.get("aliases", ())),
            fan_in_fan_out=bool(t.get("fan_in_fan_out", False)),
            parts=tuple((str(category), int(size)) for category, size in t.get("parts", ())),
        )
        for t in row["tensors"]
    )
    return Layer(name, tensors, path, row.get("stack", ""))
