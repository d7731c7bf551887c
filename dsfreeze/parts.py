"""Reading a part of a model: only the named tensors get memory and are read from disk; the rest of the model stands empty.

transformers builds a model without memory and then reads what it has a place for. In between we take the other places away: a
parameter becomes None under its module, so that the checkpoint's tensor of that name is one the model does not use. The class,
the modules and the names of what is kept are those of the whole model. A fresh head is the whole load's to the last bit as long as it
is kept whole: nothing else draws numbers, for a part may lack nothing but its head.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dsfreeze.anatomy import Anatomy
from dsfreeze.anatomy_reader import read_anatomy


@dataclass
class Reading:
    """What is kept of the next model that is read, by name (None: everything), and once that is known the whole one's anatomy."""

    kept: Collection[str] | None
    anatomy: Anatomy | None = None


@contextmanager
def reading_only(kept: Collection[str] | None) -> Iterator[Reading]:
    """Within it `from_pretrained` reads the named tensors alone. One model at a time: the switch is transformers' own class."""
    reading = Reading(kept)
    if kept is None:
        yield reading
        return
    base: Any = PreTrainedModel
    read = base._load_pretrained_model

    def read_part(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reading.anatomy = read_anatomy(model, "")
        empty(model, kept, head_names(reading.anatomy))
        return read(model, *args, **kwargs)

    base._load_pretrained_model = staticmethod(read_part)
    try:
        yield reading
        assert reading.anatomy is not None, "this version of transformers reads models another way"
    finally:
        base._load_pretrained_model = staticmethod(read)


def head_names(anatomy: Anatomy) -> set[str]:
    """Names of the head's tensors, aliases included: what a checkpoint may rightly lack."""
    return {n for layer in anatomy.layers if layer.name == "head" for t in layer.tensors for n in (t.name, *t.aliases)}


def empty(model: PreTrainedModel, kept: Collection[str], head: Collection[str]) -> None:
    """Take away every parameter that `kept` does not name (tied ones stay under all their names), and the buffers of modules that
    lose all of theirs.

    What loses some is marked as initialised, so that no rule looks for the weights; unless it has some of a fresh head, or buffers
    of its own, to initialise."""
    named = dict(model.named_parameters(remove_duplicate=False))
    ties = (
        model.all_tied_weights_keys
    )  # {name: name of what it is tied to}; before reading they are parameters of their own
    tied = {name for tie in ties.items() if not set(tie).isdisjoint(kept) for name in tie}
    stay = {id(named[name]) for name in {*kept, *tied} if name in named}
    fresh = {id(named[name]) for name in head} & stay
    lost: list[Any] = [m for m in model.modules() if any(id(p) not in stay for p in m.parameters())]
    for module in lost:
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in stay:
                module._parameters[leaf] = None
                module.extra_repr = _told  # its own may ask for the weight's shape
    for module in lost:
        if not holds_any(module):
            module._buffers.update(dict.fromkeys(module._buffers))
        has_fresh = any(id(p) in fresh for p in module.parameters())
        if not (has_fresh or any(b is not None for b in module._buffers.values())):
            module._is_hf_initialized = True
    model.all_tied_weights_keys = {target: source for target, source in ties.items() if source in tied}


def _told() -> str:
    return "not held"


def holds_any(module: nn.Module) -> bool:
    """Whether the module has a parameter."""
    return next(module.parameters(), None) is not None
