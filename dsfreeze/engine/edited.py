"""A step's gradients, a piece of each tensor at a time: seen, edited, or taken and given up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from dsfreeze.engine import MicroBatches, Piece
from dsfreeze.engine.core import Core
from dsfreeze.engine.gradients import view_of
from dsfreeze.objectives import Objective


class Edited(Core):
    """The part of an engine that hands out gradients between the passes and the step."""

    def pieces(self) -> list[Piece]:
        return [
            Piece(part.slot.name, part.first, part.last, part.of(flat.tensor.detach().reshape(-1)))
            for flat in self.flats
            for part in flat.parts()
        ]

    @contextmanager
    def edited_gradients(self) -> Iterator[list[Piece]]:
        with torch.no_grad():
            parts = [
                (part, view_of(held, part.at, part.last - part.first))
                for flat, held in zip(self.flats, self._gradient_views(), strict=True)
                for part in flat.parts()
            ]
            yield [replace(piece, gradient=gradient) for piece, (_, gradient) in zip(self.pieces(), parts, strict=True)]
            for part, gradient in parts:  # an edit knows of no masks, and norms are of what trains
                self.holding.zero(part.slot.name, gradient, part.first)
            self._renew_norms()

    def scratch_gradients(
        self,
        micro_batches: MicroBatches,
        take: Callable[[list[Piece]], None],
        *,
        objective: Objective | None = None,
        squared: bool = False,
    ) -> float:
        assert self._modes is not None, "enter a phase first"
        self._check_flags()
        if squared:
            self._modes.evaluate()
        else:
            self._modes.train()
        hooks = [self._named[name].register_hook(self._square) for name in self._trainable if squared]
        try:
            loss = sum(self._pass(batch, weight, objective or self.objective) for batch, weight in micro_batches)
        finally:
            for hook in hooks:
                hook.remove()
        with self.edited_gradients() as pieces:
            take(pieces)
            self._drop(pieces)
        return loss

    def _square(self, gradient: torch.Tensor) -> torch.Tensor:
        """Of a gradient that is `world_size` times one batch's, and will be averaged over the ranks: what sums up to squares."""
        return gradient.square() / self.world_size

    def _drop(self, pieces: list[Piece]) -> None:
        """Give a step up: one whose gradient is not finite is not taken at any stage, and leaves every count in order."""
        for piece in pieces[:1]:
            assert piece.gradient is not None
            piece.gradient[:1] = torch.inf
        self._renew_norms()
        norm = self._update()
        assert not math.isfinite(norm), "the step was given up"
        for piece in pieces:  # some of the buffers are used again
            assert piece.gradient is not None
            piece.gradient.zero_()

    def _renew_norms(self) -> None:
        """Make what is known of gradients follow an edit."""

    def join(self, name: str, first: int, mine: torch.Tensor | None) -> torch.Tensor:
        assert mine is not None, "what is not sharded is held by every rank"
        return mine.float()
