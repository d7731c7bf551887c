"""Where a forward pass begins and ends, and what of it is kept: a model run from the state that left one of its layers.

The model's own forward pass runs, and makes masks, rotary tables and position ids as ever; only the layers that are to be left
out do nothing. The first of the others gets the given state, whatever the skipped ones got, so that the token embedding need
not be looked up either. The modules are as before when the pass is over.

What crosses a cut must be one state a token, (batch, positions, d). `require_passable` tries that out: an architecture whose
upper layers read more from the lower ones (shared keys and values, per-layer embeddings) is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dsfreeze.anatomy import Anatomy
from dsfreeze.errors import UserError

#: A forward pass without a graph (`Engine.no_grad_forward`).
Forward = Callable[[Mapping[str, torch.Tensor]], Any]


@dataclass(frozen=True)
class Span:
    """The transformer layers `start` .. `stop - 1` run (the embedding too, when start is 0); `states` (batch, positions, d) are what
    left layer start - 1, in the model's dtype, on its device. What leaves layer `keep - 1` is kept. None: to the end; nothing."""

    start: int = 0
    states: torch.Tensor | None = None
    stop: int | None = None
    keep: int | None = None


@dataclass
class Kept:
    """The states that `keep` asked for, detached, once the pass has reached them."""

    states: torch.Tensor | None = None


@dataclass
class Passage:
    """A module's layers as a way that can be entered and left in the middle. One stack of layers; UserError for two."""

    module: nn.Module
    anatomy: Anatomy
    #: Whether a layer gives a tuple (state, ...) or the state alone; learnt from the first one that runs.
    gives_tuple: bool | None = field(default=None, init=False)
    #: What stands for the embedding of a token when the pass starts above it.
    blank: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not self.anatomy.blocks or len({layer.stack for layer in self.anatomy.blocks}) > 1:
            raise UserError(
                f"freeze.prefix_cache stores what passes through one stack of layers, and {self.anatomy.name} has "
                f"{'two' if self.anatomy.blocks else 'none'}. Write freeze.prefix_cache: off."
            )
        if getattr(self.module.config, "output_router_logits", False):
            raise UserError(_refusal(self, "its loss reads the routers of all layers (output_router_logits)"))
        self.blocks = [self.module.get_submodule(layer.path) for layer in self.anatomy.blocks]

    @contextmanager
    def over(self, span: Span) -> Iterator[Kept]:
        """Within it forward passes of the module run the span alone."""
        kept, changed = Kept(), []
        stop = len(self.blocks) if span.stop is None else span.stop
        try:
            if span.start:
                model: Any = self.module
                embedding = model.get_input_embeddings()
                changed.append(_replace(embedding, self._blank_for(embedding, span.states)))
            for index, block in enumerate(self.blocks):
                if index < span.start:
                    changed.append(_replace(block, self._giving(span.states)))
                elif index >= stop:
                    changed.append(_replace(block, self._giving(None)))
            with self._noting(span, kept):
                yield kept
        finally:
            for block, forward in changed:
                _restore(block, forward)

    def _blank_for(self, embedding: nn.Module, states: torch.Tensor | None) -> Callable[..., torch.Tensor]:
        """An embedding that looks nothing up: one value in the right shape, which no layer gets to see."""
        assert states is not None, "a pass that starts above the embedding starts from states"
        width = getattr(embedding, "embedding_dim", states.shape[-1])

        def forward(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return states.new_full((1,), self.blank).expand(*ids.shape, width)

        return forward

    def _giving(self, states: torch.Tensor | None) -> Callable[..., Any]:
        """A layer that computes nothing and gives `states`, or what it got."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            state = (args[0] if args else kwargs["hidden_states"]) if states is None else states
            # some take the first of what a layer gives, and never look at the attention weights beside it
            return (state, None) if self.gives_tuple else state

        return forward

    @contextmanager
    def _noting(self, span: Span, kept: Kept) -> Iterator[None]:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            kept.states = _state_of(output).detach()

        def learn(_: nn.Module, __: Any, output: Any) -> None:
            self.gives_tuple = not isinstance(output, torch.Tensor)

        hooks = [self.blocks[span.keep - 1].register_forward_hook(note)] if span.keep else []
        running = self.blocks[span.start : span.stop]
        if self.gives_tuple is None and running:
            hooks.append(running[0].register_forward_hook(learn))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def cut_of(anatomy: Anatomy, trainable: Any) -> int:
    """Number of transformer layers in the prefix."""
    return sum(layer.is_block for layer in anatomy.prefix(trainable))


def require_fixed_positions(passage: Passage, max_length: int) -> None:
    """UserError for rotary tables that depend on the longest sequence of a batch: a state would depend on whom an example met."""
    model: Any = passage.module
    config = model.config.get_text_config()
    told = getattr(config, "rope_parameters", None) or {}
    tables = [told, *(value for value in told.values() if isinstance(value, Mapping))]
    longest = getattr(config, "max_position_embeddings", max_length)
    for table in tables:
        usual = table.get("original_max_position_embeddings") or longest
        if table.get("rope_type") in ("dynamic", "longrope") and max_length > usual:
            why = f"its rotary positions ({table['rope_type']}) depend on whom an example meets in a batch beyond {usual} positions"
            raise UserError(_refusal(passage, f"{why} (data.max_length is {max_length}; at most {usual} would do)"))


def require_passable(
    passage: Passage, forward: Forward, batch: Mapping[str, torch.Tensor], cut: int, dtype: torch.dtype
) -> None:
    """UserError for a model that computes something else when it starts above the cut from the states that leave it (collective
    at stage 3: every rank runs the same batch).

    `batch`: a few examples; `dtype` the run's, which states must have to be stored as they are. Logits must agree within 1e-4 of their
    largest, 300 times that in 16 bits, and so must the loss where there are labels.
    """
    with passage.over(Span(keep=cut)) as kept:
        whole = forward(batch)
    shape = tuple(batch["input_ids"].shape)
    if kept.states is None or tuple(kept.states.shape[:2]) != shape:
        raise UserError(_refusal(passage, "its layers do not pass on one state for each token"))
    if kept.states.dtype != dtype:
        raise UserError(_refusal(passage, f"its layers pass on {kept.states.dtype} in a run in {dtype}"))
    # what a pass leaves lying about for upper layers to find is now that of other tokens
    forward({**batch, "input_ids": _other_tokens(passage.module, batch["input_ids"])})
    try:
        with passage.over(Span(cut, kept.states)):
            again = forward(batch)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError) as error:
        raise UserError(_refusal(passage, f"its upper layers need more than the states ({error})")) from error
    _require_close(passage, again.logits, whole.logits)
    if getattr(whole, "loss", None) is not None and bool(torch.isfinite(whole.loss)):
        _require_close(passage, again.loss, whole.loss)


def _other_tokens(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Tokens at random, the same on every rank."""
    model: Any = module
    known = model.get_input_embeddings().num_embeddings
    return torch.randint(0, known, ids.shape, generator=torch.Generator().manual_seed(0))


def require_suffix(
    passage: Passage, forward: Forward, batch: Mapping[str, torch.Tensor], states: torch.Tensor, cut: int
) -> None:
    """`require_passable` where the prefix is not at hand: UserError when the layers above the cut see more than `states`, which are
    those of the batch's examples. What stands for the embedding must make no difference."""
    choices = (False, True) if passage.gives_tuple is None else (passage.gives_tuple,)
    for passage.gives_tuple in choices:
        try:
            found = _logits_by_blank(passage, forward, batch, Span(cut, states))
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError) as error:
            why = f"its upper layers need more than the states ({error})"
            continue
        if found[0].shape[0] == states.shape[0]:
            return _require_close(passage, *found)
        why = "its layers do not pass on one state for each token"
    raise UserError(_refusal(passage, why))


def _logits_by_blank(
    passage: Passage, forward: Forward, batch: Mapping[str, torch.Tensor], span: Span
) -> list[torch.Tensor]:
    found = []
    for passage.blank in (1.0, 0.0):
        with passage.over(span), _state_at(passage, span):
            found.append(forward(batch).logits)
    return found


@contextmanager
def _state_at(passage: Passage, span: Span) -> Iterator[None]:
    """Within it the first layer that runs must get a state of the right shape."""
    assert span.states is not None
    wanted = span.states.shape

    def look(_: nn.Module, args: Any, kwargs: Any) -> None:
        state = args[0] if args else kwargs["hidden_states"]
        if getattr(state, "shape", None) != wanted:
            raise TypeError("the state did not arrive as it was given")

    running = passage.blocks[span.start :]
    hook = running[0].register_forward_pre_hook(look, with_kwargs=True) if running else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def _require_close(passage: Passage, found: torch.Tensor, wanted: torch.Tensor) -> None:
    scale = 300 if wanted.dtype in (torch.float16, torch.bfloat16) else 1
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    if not error <= 1e-4 * scale:
        raise UserError(
            _refusal(
                passage,
                f"its upper layers read more than the states: what they give differs by {float(error):.1e} of their size",
            )
        )


def _refusal(passage: Passage, why: str) -> str:
    return f"freeze.prefix_cache: {type(passage.module).__name__} cannot start above its prefix: {why}. Write freeze.prefix_cache: off."


def _state_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _replace(module: nn.Module, forward: Callable[..., Any]) -> tuple[nn.Module, Any]:
    """Give the module another forward pass; returns what `_restore` needs to take it away again."""
    before = vars(module).get("forward")
    module.forward = forward
    return module, before


def _restore(module: nn.Module, before: Any) -> None:
    del module.forward
    if before is not None:
        module.forward = before
