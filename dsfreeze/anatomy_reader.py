"""Reads a module's anatomy: which layer and category each parameter belongs to, and what it costs.

Rules by leaf module name, one short table for all architectures, because transformers' families differ in few names; a
matrix whose name no rule knows is `other`, and the anatomy's notes say so. Nothing is computed, so a module on the meta
device will do. What a model has beside its text model (a vision tower, a projector) is part of `embed` and costs
nothing, for a text passes none of it. Not covered: layers that are run more than once a token (ALBERT), whose FLOPs
are counted once.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from dsfreeze.anatomy import FUSED, Anatomy, Layer, Tensor
from dsfreeze.errors import UserError
from dsfreeze.fused import pattern_of

#: Matrices inside an attention module, by the name of the module (or parameter) that holds them. Latent attention makes
#: keys and values from one latent: what reads it off (with the shared rotary key) is counted as `k`, what unfolds it
#: into both (rows of either, head by head) as `v`.
ATTENTION_NAMES = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "q", "wq", "q_a_proj", "q_b_proj", "pos_query_proj"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "k", "wk", "pos_key_proj", "kv_a_proj_with_mqa"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "v", "wv", "kv_b_proj"),
    "o": ("o_proj", "out_proj", "dense", "c_proj", "out_lin", "o", "wo", "Wo"),
    "qkv": ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv", "in_proj"),
}
#: Matrices of a block outside its attention modules; the two-part names come first because `dense` alone says nothing.
MLP_NAMES = {
    "up": ("intermediate.dense", "up_proj", "fc1", "fc_in", "c_fc", "dense_h_to_4h", "lin1", "wi", "wi_1", "w3"),
    "gate": ("gate_proj", "wi_0", "w1"),
    "down": ("output.dense", "down_proj", "fc2", "fc_out", "c_proj", "dense_4h_to_h", "lin2", "wo", "w2", "Wo"),
    "gate_up": ("gate_up_proj", "Wi"),
    # a router over experts, a gate on shared experts, T5's table of position biases: known, and none of the above
    "other": ("gate", "router", "shared_expert_gate", "relative_attention_bias"),
}
HEAD_NAMES = {
    "lm_head", "score", "classifier", "classification_head", "cls", "pooler", "qa_outputs", "project_out", "embed_out",
}  # fmt: skip
EMBED_NAMES = {"wte", "wpe", "shared", "project_in"}
DEPTHS = ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
#: In the paths of towers for something else than text.
OTHER_SENSES = ("vision", "visual", "image", "audio", "speech")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")


def read_anatomy(module: nn.Module, name: str) -> Anatomy:
    """The module's layers in the order data flows through them; every parameter once, aliases told by identity.

    An encoder-decoder's encoder layers come first and its decoder layers are numbered on, with `stack` set; the
    encoder's final norm is part of its last layer. FLOPs per token are two per multiply-add through each matrix
    (experts: the share that is routed to); a pooler or classifier is counted as if it ran on every token, which BERT's
    does not. Warns when the architecture is unknown and the layers are those of the longest ModuleList; UserError when
    there is none.
    """
    reader = _Reader(module)
    layers = tuple(reader.layers())
    config = reader.config
    for note in reader.notes:
        warnings.warn(f"{name}: {note}", stacklevel=2)
    return Anatomy(
        name=name,
        model_type=str(getattr(config, "model_type", "") or type(module).__name__),
        layers=layers,
        hidden_size=int(getattr(config, "hidden_size", 0) or 0),
        attention_width=_attention_width(config),
        vocab_size=int(getattr(config, "vocab_size", 0) or 0),
        structural=reader.structural,
        notes=tuple(reader.notes),
    )


@dataclass(frozen=True)
class _Stack:
    """One run of transformer layers: the ModuleList's path and length, and the number of its first layer."""

    path: str
    length: int
    first: int = 0
    stack: str = ""


class _Reader:
    """Everything known about one module while its anatomy is read."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        config: Any = getattr(module, "config", None)
        self.config: Any = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.has_more_than_text = bool(getattr(config, "sub_configs", None)) and self.config is not config
        self.notes: list[str] = []
        self.structural = False
        self.stacks = self._find_stacks()
        self.names = _names_and_aliases(module)
        self.output_weights = self._output_weights()
        order = list(self.names)
        self.first_block = next(i for i, n in enumerate(order) if self._block(n) is not None)
        self.position = {n: i for i, n in enumerate(order)}

    # -- structure ---------------------------------------------------------------------------------------------

    def _find_stacks(self) -> tuple[_Stack, ...]:
        lists = list(_outermost_lists(self.module))
        if self.has_more_than_text:
            lists = [row for row in lists if not any(word in row[0] for word in OTHER_SENSES)] or lists
        if not lists:
            raise UserError(
                f"{type(self.module).__name__} has no ModuleList with parameters, so it has no layers to choose from. "
                "Keep its repeated blocks in a torch.nn.ModuleList."
            )
        depths = {getattr(self.config, field, None) for field in DEPTHS}
        fitting = {path: length for path, length in lists if length in depths}
        two = [self._longest(_under(fitting, stack)) for stack in ("encoder", "decoder")]
        if all(two):
            encoder, decoder = two
            return (
                _Stack(encoder, fitting[encoder], 0, "encoder"),
                _Stack(decoder, fitting[decoder], fitting[encoder], "decoder"),
            )
        path = self._longest(fitting or dict(lists))
        if not fitting:
            self.structural = True
            self.notes.append(
                f"unknown architecture {type(self.module).__name__}: no config says how many layers it has, so the "
                f"layers are the {dict(lists)[path]} entries of its longest ModuleList, '{path}'"
            )
        return (_Stack(path, dict(lists)[path]),)

    @staticmethod
    def _longest(lists: dict[str, int]) -> str:
        return max(lists, key=lists.__getitem__, default="")

    def _block(self, name: str) -> int | None:
        """Number of the transformer layer that holds a parameter, None for one outside the layers."""
        for stack in self.stacks:
            if name.startswith(stack.path + "."):
                return stack.first + int(name[len(stack.path) + 1 :].partition(".")[0])
        return None

    def _output_weights(self) -> set[str]:
        """Names, aliases included, of the output embedding's parameters (`lm_head.weight`)."""
        get = getattr(self.module, "get_output_embeddings", None)
        output = get() if callable(get) else None
        mine = {id(p) for p in output.parameters()} if isinstance(output, nn.Module) else set()
        return {n for n, p in self.module.named_parameters(remove_duplicate=False) if id(p) in mine}

    # -- layers ------------------------------------------------------------------------------------------------

    def layers(self) -> Iterator[Layer]:
        """embed, layers.0 .. layers.L-1, norm, head; those without a tensor are left out."""
        parts: dict[str, list[Tensor]] = {}
        for name in self.names:
            parts.setdefault(self._place(name), []).append(self._tensor(name))
        blocks = [
            (f"layers.{stack.first + i}", f"{stack.path}.{i}", stack.stack)
            for stack in self.stacks
            for i in range(stack.length)
        ]
        for layer, path, stack_name in [("embed", "", ""), *blocks, ("norm", "", ""), ("head", "", "")]:
            if layer in parts:
                yield Layer(layer, tuple(parts[layer]), path, stack_name)
        self._note_unknown(t for tensors in parts.values() for t in tensors)

    def _place(self, name: str) -> str:
        """The layer that a parameter belongs to; names decide first, then where it stands among the blocks."""
        block = self._block(name)
        if block is not None:
            return f"layers.{block}"
        parts = _module_parts(name)
        is_embed = any("embed" in p.lower() or p in EMBED_NAMES for p in parts)
        if self._beside_text(name):
            return "embed"
        if HEAD_NAMES & set(parts) or self._outside_base(name):
            return "head"
        if name in self.output_weights and not is_embed:
            return "head"
        if is_embed:
            return "embed"
        if _is_norm(self._owner(name), parts, self.names[name][0]):
            return self._norm_place(name)
        return "embed" if self.position[name] < self.first_block else "head"

    def _beside_text(self, name: str) -> bool:
        """Whether the parameter belongs to a tower or projector beside the text model, and is no head's."""
        text = tuple(stack.path.rpartition(".")[0] + "." for stack in self.stacks)
        is_head = name in self.output_weights or self._outside_base(name)
        return self.has_more_than_text and not name.startswith(text) and not is_head

    def _norm_place(self, name: str) -> str:
        for stack in self.stacks:
            if stack.stack == "encoder" and name.startswith(stack.path.rpartition(".")[0] + "."):
                return f"layers.{stack.first + stack.length - 1}"
        return "norm" if self.position[name] > self.first_block or not self.structural else "embed"

    def _outside_base(self, name: str) -> bool:
        """Whether transformers counts the parameter to the task's head rather than to the base model."""
        prefix = getattr(self.module, "base_model_prefix", "")
        return bool(prefix) and hasattr(self.module, prefix) and not name.startswith(prefix + ".")

    # -- tensors -----------------------------------------------------------------------------------------------

    def _owner(self, name: str) -> nn.Module:
        return self.module.get_submodule(name.rpartition(".")[0])

    def _tensor(self, name: str) -> Tensor:
        parameter, aliases = self.names[name]
        owner = self._owner(name)
        category = self._category(name)
        tensor = Tensor(
            name=name,
            shape=tuple(parameter.shape),
            category=category,
            flops_per_token=self._flops_per_token(name, parameter, owner),
            aliases=aliases,
            fan_in_fan_out=isinstance(owner, Conv1D) and category != "bias",
        )
        is_fused = category in FUSED and len(tensor.shape) == 2  # experts packed in one tensor are not taken apart
        return replace(tensor, parts=pattern_of(self.config, category, tensor.outputs)) if is_fused else tensor

    def _category(self, name: str) -> str:
        parts, leaf = _module_parts(name), name.rpartition(".")[2]
        if any(p.startswith("lora_") for p in parts):
            return "adapter"
        if leaf == "bias" or leaf.endswith("_bias"):
            return "bias"
        if _is_norm(self._owner(name), parts, self.names[name][0]):
            return "norm"
        place = self._place(name)
        return place if place in ("embed", "head") else _matrix_category(parts, leaf) or "other"

    def _flops_per_token(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> int:
        if parameter.ndim < 2 or name.endswith("bias") or self._beside_text(name):
            return 0
        looked_up = isinstance(owner, nn.Embedding) or (
            self._place(name) == "embed" and not isinstance(owner, nn.Linear | Conv1D)
        )
        if looked_up and name not in self.output_weights:
            return 0
        parts = name.split(".")
        if "experts" not in parts:
            return 2 * parameter.numel()
        experts = self.module.get_submodule(".".join(parts[: parts.index("experts") + 1]))
        count = len(experts) if isinstance(experts, nn.ModuleList) else parameter.shape[0]
        top_k = next((k for field in TOP_K if (k := getattr(self.config, field, None))), count)
        return 2 * parameter.numel() * min(int(top_k), count) // count

    def _note_unknown(self, tensors: Iterable[Tensor]) -> None:
        unknown = [
            t.name
            for t in tensors
            if t.category == "other"
            and len(t.shape) > 1
            and _matrix_category(_module_parts(t.name), t.name.rpartition(".")[2]) is None
        ]
        if unknown:
            self.notes.append(
                f"{len(unknown)} matrices have names that no rule knows ({unknown[0]}, ...): their category is 'other'"
            )


def _names_and_aliases(module: nn.Module) -> dict[str, tuple[nn.Parameter, tuple[str, ...]]]:
    """Every parameter under its first name, with the other names of the same parameter."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    return {
        name: (parameter, tuple(n for n in aliases[id(parameter)] if n != name))
        for name, parameter in module.named_parameters()
    }


def _outermost_lists(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(path, length) of each ModuleList that holds parameters and lies in no other one."""
    found: list[str] = []
    for path, child in module.named_modules():
        if not isinstance(child, nn.ModuleList) or any(path.startswith(outer + ".") for outer in found):
            continue
        if next(child.parameters(), None) is not None:
            found.append(path)
            yield path, len(child)


def _under(lists: dict[str, int], component: str) -> dict[str, int]:
    return {path: length for path, length in lists.items() if component in path.split(".")}


def _module_parts(name: str) -> list[str]:
    """Components of the path of the module that owns a parameter, without peft's wrapper."""
    return [part for part in name.split(".")[:-1] if part != "base_layer"]


def _is_norm(owner: nn.Module, parts: list[str], parameter: nn.Parameter) -> bool:
    if parameter.ndim > 1:
        return False
    leaf = parts[-1].lower() if parts else ""
    return "norm" in type(owner).__name__.lower() or "norm" in leaf or re.fullmatch(r"ln(_\w+|\d*)", leaf) is not None


def _matrix_category(parts: list[str], leaf: str) -> str | None:
    """Category of a matrix inside a block by its name; None when no rule knows it."""
    path = parts if leaf == "weight" else [*parts, leaf.removesuffix("_weight")]
    in_attention = any("attn" in p.lower() or "attention" in p.lower() for p in path[:-1])
    table = _ATTENTION if in_attention else _MLP
    last = path[-1] if path else ""
    return table.get(".".join(path[-2:])) or table.get(last) or (_MLP.get(last) if last in MLP_NAMES["other"] else None)


def _inverted(table: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {name: category for category, names in table.items() for name in names}


_ATTENTION, _MLP = _inverted(ATTENTION_NAMES), _inverted(MLP_NAMES)


def _attention_width(config: Any) -> int:
    """Query heads x head size, 0 when the config does not say; the mean of keys' and values' where they differ."""
    heads = getattr(config, "num_attention_heads", None) or 0
    latent: list[Any] = [getattr(config, f"{part}_head_dim", None) for part in ("qk_nope", "qk_rope", "v")]
    if all(latent):
        return int(heads * sum(latent)) // 2
    size = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    if not size and heads:
        size = (getattr(config, "hidden_size", 0) or 0) // heads
    return int(heads * (size or 0))
