"""Reads what a model stores between its passes (`activations.py`), by running it on tensors that have a shape and no memory.

The model is cut to the first layers that show every kind of layer it has, each at its true size, so that reading 405B parameters takes
as long as reading 135M. One run with everything trainable at five shapes gives every stored tensor's size; then each tensor of
a layer trains alone, once, and tells what it causes. Runs are matched by the order in which tensors come to be.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel, masking_utils
from transformers.initialization import no_init_weights

from dsfreeze.activations import ATTENTIONS, INPUT, OUTPUT, Activations, Ends, Part, Profile, Size, Stored
from dsfreeze.anatomy import Anatomy, Layer
from dsfreeze.anatomy_reader import read_anatomy
from dsfreeze.errors import UserError
from dsfreeze.quiet import quiet_transformers

#: (sequences, positions) of the runs with everything trainable; they tell apart 1, s, s^2, T and T s. Never one sequence
#: alone, for torch then takes views where it copies otherwise.
SHAPES = ((2, 64), (4, 64), (2, 128), (4, 128), (2, 256))
DTYPES = {2: torch.bfloat16, 4: torch.float32}
#: Dropout of attention weights, which fused kernels apply without storing them.
ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")

#: A stored tensor within a part: made there ("own", order), its input, or made before ("shared", order).
Label = tuple[str, int]
Build = Callable[[PreTrainedConfig], PreTrainedModel]


def read_activations(
    config: PreTrainedConfig,
    builds: Mapping[str, Build],
    *,
    attentions: Sequence[str] = ATTENTIONS,
    widths: Sequence[int] = (2, 4),
) -> Activations:
    """Profiles of the model that `builds` make of the config for each task ("causal_lm", "classification", ...).

    A way of running it that the architecture does not offer (an attention, experts in fp32) is left out; UserError when none is left.
    """
    with torch.device("meta"), quiet_transformers(), no_init_weights():
        kinds = _kinds(read_anatomy(next(iter(builds.values()))(config), "model"), config)
    profiles: dict[tuple[str, int], Profile] = {}
    for attention in attentions:
        for width in widths:
            ends: dict[str, Ends] = {}
            blocks: tuple[Part, ...] = ()
            for task, build in builds.items():
                with _fake_model(config, build, attention, width) as model:
                    if model is not None and _runs(model):
                        reading = _Reading(model, kinds, task)
                        ends[task] = reading.ends()
                        blocks = blocks or reading.blocks()
            if ends:
                profiles[attention, width] = Profile(blocks, ends)
    if not profiles:
        raise UserError(f"A {config.model_type} model cannot be run without data, so its activations are not known.")
    return Activations(tuple(kinds), profiles)


def _kinds(anatomy: Anatomy, config: PreTrainedConfig) -> list[int]:
    """A number for each layer; equal ones have the same tensors and the same type of attention."""
    types = list(getattr(config.get_text_config(), "layer_types", None) or [])
    seen: dict[Any, int] = {}
    kinds = []
    for i, layer in enumerate(anatomy.blocks):
        rows = tuple((t.name.removeprefix(layer.path), t.shape) for t in layer.tensors)
        key = (layer.stack, rows, types[i] if i < len(types) else "")
        kinds.append(seen.setdefault(key, len(seen)))
    return kinds


@contextmanager
def _fake_model(config: PreTrainedConfig, build: Build, attention: str, width: int) -> Iterator[nn.Module | None]:
    """The model without memory, in training mode, inside the mode that keeps it so; None where it lacks the attention."""
    config = deepcopy(config)
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name in ATTENTION_DROPOUTS:
            if attention != "eager" and hasattr(part, name):
                setattr(part, name, 0.0)
    config._attn_implementation = attention
    config.use_cache = False
    usual = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(quiet_transformers())
        stack.enter_context(no_init_weights())
        # it cannot look whether several sequences share a row, and would take it that they do: a mask, and keys repeated for it
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        torch.set_default_dtype(DTYPES[width])
        try:
            model = build(config)
        except ValueError as error:
            if attention not in str(error) and "scaled_dot_product_attention" not in str(error):
                raise
            yield None
            return
        finally:
            torch.set_default_dtype(usual)
        model.tie_weights()  # left undone where weights are not initialised
        yield model.train()


def _runs(model: nn.Module) -> bool:
    """Whether the model runs without memory: some kernels of experts do not in fp32, some models look at values."""
    ids = torch.zeros(*SHAPES[0], dtype=torch.long)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it logs the traceback of what is caught here
    try:
        model(input_ids=ids)
    except (RuntimeError, ValueError, AttributeError, TypeError):
        return False
    finally:
        log.setLevel(level)
    return True


def _shorten(model: nn.Module, anatomy: Anatomy, kinds: Sequence[int]) -> Anatomy:
    """Leave the first layers, those that show every kind, and return the anatomy of what is left; two stacks stay whole."""
    depth = max(2, 1 + max(list(kinds).index(kind) for kind in set(kinds)))
    if depth >= len(kinds) or anatomy.blocks[0].stack:
        return anatomy
    parent, _, name = anatomy.blocks[0].path.rpartition(".")[0].rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, name, getattr(owner, name)[:depth])
    left = {layer.name for layer in anatomy.blocks[:depth]}
    return replace(anatomy, layers=tuple(x for x in anatomy.layers if not x.is_block or x.name in left))


class _Reading:
    """One model under one way of running it: runs it, and turns what it saw into parts."""

    def __init__(self, model: nn.Module, kinds: Sequence[int], task: str) -> None:
        self.model, self.task = model, task
        with quiet_transformers():
            self.anatomy = _shorten(model, read_anatomy(model, "model"), kinds)
        self.kinds = list(kinds)[: len(self.anatomy.blocks)]
        self.named = dict(model.named_parameters(remove_duplicate=False))
        self.watch = _Watch(model, self.anatomy)
        everything = list(self.named)
        self.whole = [self._run(everything, shape, backward=True) for shape in SHAPES]
        self.idle = [self._run([], shape) for shape in SHAPES]
        first = [layer for layer in self.anatomy.layers if layer.name == "embed"] or [self.anatomy.blocks[0]]
        self.under_first, self.under_rest = (
            self._run(t.name for t in x.tensors) for x in (first[0], self.anatomy.blocks[0])
        )

    def blocks(self) -> tuple[Part, ...]:
        """A part for each kind of layer, read where something lies below it if it can be."""
        parts = []
        for kind in sorted(set(self.kinds)):
            places = [i for i, k in enumerate(self.kinds) if k == kind]
            index = next((i for i in places if i), places[0])
            layer = self.anatomy.blocks[index]
            sources = {t.name.removeprefix(layer.path + "."): t.name for t in layer.tensors}
            parts.append(self._part(index + 1, sources, layer))
        return tuple(parts)

    def ends(self) -> Ends:
        last = len(self.anatomy.blocks) + 1
        first = [t for layer in self.anatomy.layers if layer.name == "embed" for t in layer.tensors]
        after = [t for layer in self.anatomy.layers if layer.name in ("norm", "head") for t in layer.tensors]
        embed = self._part(0, {t.name: t.name for t in first})
        return Ends(embed, self._part(last, {t.name: t.name for t in [*after, *(t for t in first if t.aliases)]}))

    # -- parts -------------------------------------------------------------------------------------------------

    def _part(self, index: int, sources: Mapping[str, str], layer: Layer | None = None) -> Part:
        causes: dict[Label, set[str]] = {}

        def add(source: str, run: _Run) -> None:
            for label in self._aligned(run, index):
                causes.setdefault(label, set()).add(source)

        if index:
            # a tied embedding would also train what comes after the layers, so that for these the first layer is what lies below
            add(INPUT, self.under_first if index == 1 else self.under_rest)
        for source, name in sources.items():
            if id(self.named[name]) not in self.watch.reached:
                continue  # a vision tower, which text does not pass
            add(source, self._run([name]))
            if layer is not None and (matrix := self._module_of(name)) is not None:
                add(source + OUTPUT, self._run_output(name, matrix))
        stored = tuple(
            Stored(self._size(label, index), frozenset(found), label[1] if label[0] == "shared" else -1)
            for label, found in sorted(causes.items())
        )
        path = layer.path + "." if layer else ""
        return Part(
            stored,
            carried=tuple(
                Stored(_fitted([run.carried[index][number] for run in self.whole]), frozenset(), number)
                for number in sorted(self.whole[0].carried.get(index, ()))
            ),
            idle=_most([run.forward.get(index, []) for run in self.idle]),
            forward=_most([run.forward.get(index, []) for run in self.whole]),
            backward=_most([run.backward.get(index, []) for run in self.whole]),
            unrepeated=tuple(f"{n.removeprefix(path)}.weight" for n in self.whole[0].last_matrices.get(index, ())),
        )

    def _aligned(self, run: _Run, index: int) -> Iterator[Label]:
        """The labels of what a run stores in a part, as the run with everything trainable numbers them.

        Some operations are left out where nothing asks for a gradient, and what follows then comes to be earlier.
        """
        mine, theirs = run.births.get(index, []), self.whole[0].births.get(index, [])
        place = {i: i for i in range(len(mine))}
        if mine != theirs:
            blocks = SequenceMatcher(None, mine, theirs, autojunk=False).get_matching_blocks()
            place = {a + i: b + i for a, b, size in blocks for i in range(size)}
        for kind, number in run.stored[index]:
            if kind == "own" and number not in place:
                raise UserError("The model runs otherwise when part of it trains, so its activations cannot be read.")
            label = (kind, place[number] if kind == "own" else number)
            if label in self.whole[0].stored[index]:  # else it is a view's copy of what is stored there
                yield label

    def _run_output(self, name: str, matrix: nn.Module) -> _Run:
        """The run in which a matrix's output alone wants a gradient; that of its weight where something writes into the output."""
        try:
            return self._run([], output_of=matrix)
        except RuntimeError as error:
            if "in-place" not in str(error):
                raise
            return self._run([name])

    def _module_of(self, name: str) -> nn.Module | None:
        """The module whose output a matrix makes; None for a tensor that is not a linear module's weight."""
        module = self.model.get_submodule(name.rpartition(".")[0])
        return module if name.endswith(".weight") and self.named[name].ndim == 2 else None

    def _size(self, label: Label, index: int) -> Size:
        return _fitted([run.stored[index][label] for run in self.whole])

    # -- runs --------------------------------------------------------------------------------------------------

    def _run(self, names: Iterable[str], shape: tuple[int, int] = SHAPES[0], *, backward: bool = False,
             output_of: nn.Module | None = None) -> _Run:  # fmt: skip
        chosen = {id(self.named[name]) for name in names}
        for parameter in self.named.values():
            parameter.requires_grad_(id(parameter) in chosen)
        with ExitStack() as stack:
            if output_of is not None:
                stack.callback(output_of.register_forward_hook(_wanted).remove)
            return self.watch.run(self._batch(*shape), backward)

    def _batch(self, batch: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(batch, length, dtype=torch.long)
        labels = torch.zeros(batch, dtype=torch.long) if self.task == "classification" else torch.zeros_like(ids)
        return {"input_ids": ids, "labels": labels}


def _wanted(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Ask for the gradient of a module's output, as an adapter beside it does."""
    for value in tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.is_leaf:
            value.requires_grad_()


def _fitted(values: Sequence[int]) -> Size:
    """The polynomial through bytes at `SHAPES`, in whole bytes."""
    rows = [(1, s, s * s, b * s, b * s * s) for b, s in SHAPES]
    found = np.linalg.solve(np.array(rows, dtype=float), np.array(values, dtype=float))
    one, s, s2, t, ts = (round(x) for x in found)
    return one, s, s2, t, ts


def _most(lines: Sequence[Sequence[int]]) -> tuple[Size, ...]:
    """Of the moments of a pass at each of `SHAPES`, those that can be the fullest one, each as a polynomial."""
    if len({len(line) for line in lines}) > 1:
        raise UserError("The model's passes differ from shape to shape, so its activations cannot be read.")
    sizes = {_fitted(moment) for moment in zip(*lines, strict=True)}
    return tuple(s for s in sorted(sizes) if max(s) > 0 and not any(_covers(other, s) for other in sizes - {s}))


def _covers(one: Size, other: Size) -> bool:
    """Whether `one` is no less than `other` at any shape."""
    return all(a >= b for a, b in zip(one, other, strict=True))


# -- watching ----------------------------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What one run showed, by part (0: before the layers, 1 .. L: layers, L + 1: after them).

    `stored`: bytes of each stored tensor. `births`: what made each new storage, and its bytes. `carried`: of what a layer is given beside its input, by number. `forward`, `backward`: bytes alive after each operation of the pass in the part, beyond those
    alive on entering it. `last_matrices`: modules that multiply after the part's last tensor is stored.
    """

    stored: dict[int, dict[Label, int]]
    births: dict[int, list[tuple[str, int]]] = field(default_factory=dict)
    carried: dict[int, dict[int, int]] = field(default_factory=dict)
    forward: dict[int, list[int]] = field(default_factory=dict)
    backward: dict[int, list[int]] = field(default_factory=dict)
    last_matrices: dict[int, tuple[str, ...]] = field(default_factory=dict)


class _Watch:
    """Runs a model and follows every tensor that comes to be: in which part, how large, how long it lives, and whether it is stored."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self.model = model
        self.outside = {_key(t) for t in (*model.parameters(), *model.buffers())}
        self.reached: set[int] = set()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._reaches)
        self.last = len(anatomy.blocks) + 1
        for index, layer in enumerate(anatomy.blocks, start=1):
            block = model.get_submodule(layer.path)
            block.register_forward_pre_hook(self._enters(index), with_kwargs=True)
            block.register_forward_hook(self._leaves(index))
            for name, module in block.named_modules(prefix=layer.path):
                if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 2:
                    module.register_forward_pre_hook(self._multiplies(name))

    def run(self, batch: dict[str, torch.Tensor], backward: bool) -> _Run:
        self.part, self.with_backward, self.passing_back = 0, backward, False
        self.run_ = _Run({i: {} for i in range(self.last + 1)})
        self.ledger = _Ledger(self.outside, self._note, self._born)
        self.inputs: dict[int, int | None] = {}
        self.firsts: dict[int, int] = {0: 0}
        self.bases: dict[int, int] = {}
        self.since: dict[int, list[str]] = {}
        for value in batch.values():
            self.ledger.meet(value)
        self.bases[0] = self.ledger.live
        with self.ledger:
            with torch.autograd.graph.saved_tensors_hooks(self._store, lambda value: value):
                outputs = self.model(**batch)
            loss = outputs.loss
            del outputs
            if backward:
                self.part, self.passing_back = self.last, True
                loss.backward()
        self.run_.last_matrices = {part: tuple(names) for part, names in self.since.items()}
        return self.run_

    def _reaches(self, parameter: torch.Tensor) -> None:
        """A gradient lives until it is taken over; what waits for the step is priced elsewhere."""
        self.reached.add(id(parameter))
        parameter.grad = None

    # -- hooks -------------------------------------------------------------------------------------------------

    def _enters(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, *others = (v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor))
            self._begin(index, hidden)
            storages = [v.untyped_storage() for v in others if _key(v) in self.ledger.numbers]
            self.run_.carried[index] = {self.ledger.numbers[s._cdata]: s.nbytes() for s in storages}
            if index == 1:
                self._on_gradient(hidden, 0)

        return hook

    def _leaves(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
            hidden = next(v for v in tree_leaves(outputs) if isinstance(v, torch.Tensor))
            self._on_gradient(hidden, index)
            self._begin(self.last if index == self.last - 1 else 0, hidden)

        return hook

    def _begin(self, part: int, hidden: torch.Tensor) -> None:
        self.part = part
        if part:
            self.firsts[part], self.inputs[part] = self.ledger.made, self.ledger.numbers.get(_key(hidden))
            self.bases[part] = self.ledger.live

    def _on_gradient(self, hidden: torch.Tensor, part: int) -> None:
        """When the gradient of a part's output is there, the backward pass enters the part."""

        def hook(gradient: torch.Tensor) -> None:
            self.part, self.bases[part] = part, self.ledger.live - gradient.untyped_storage().nbytes()
            self._note()

        if self.with_backward and hidden.requires_grad:
            hidden.register_hook(hook)

    def _multiplies(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.ledger.multiplied = False
            self.since.setdefault(self.part, []).append(name)

        return hook

    def _store(self, value: torch.Tensor) -> torch.Tensor:
        """An operand is stored before its product is computed: that product is still to come."""
        recent = self.since.setdefault(self.part, [])
        self.since[self.part] = recent[-1:] if recent and not self.ledger.multiplied else []
        storage = value.untyped_storage()
        if storage._cdata not in self.outside:
            number = self.ledger.numbers[storage._cdata]
            self.run_.stored[self.part][self._label(number)] = storage.nbytes()
        return value

    def _label(self, number: int) -> Label:
        first = self.firsts.get(self.part, 0)
        if number >= first:
            return "own", number - first
        return ("input", 0) if number == self.inputs.get(self.part) else ("shared", number)

    def _born(self, operation: str, nbytes: int) -> None:
        if not self.passing_back:
            self.run_.births.setdefault(self.part, []).append((operation, nbytes))

    def _note(self) -> None:
        moments = self.run_.backward if self.passing_back else self.run_.forward
        moments.setdefault(self.part, []).append(self.ledger.live - self.bases[self.part])


class _Ledger(TorchDispatchMode):
    """Numbers every storage that comes to be, in order, and adds up those alive; `note` is called after each operation."""

    def __init__(self, outside: set[int], note: Callable[[], None], born: Callable[[str, int], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.outside, self.note, self.born = outside, note, born
        self.operation = ""
        self.numbers: dict[int, int] = {}
        self.made = self.live = 0
        self.multiplied = False

    def meet(self, value: torch.Tensor) -> None:
        storage = value.untyped_storage()
        if storage._cdata in self.numbers or storage._cdata in self.outside:
            return
        self.numbers[storage._cdata] = self.made
        self.made += 1
        self.born(self.operation, storage.nbytes())
        self.live += storage.nbytes()
        weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, nbytes: int) -> None:
        self.live -= nbytes
        del self.numbers[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operation = func.name()
        self.multiplied = self.multiplied or "mm" in func.name()
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.meet(leaf)
        self.note()
        return out


def _key(value: torch.Tensor) -> int:
    key: int = value.untyped_storage()._cdata
    return key
