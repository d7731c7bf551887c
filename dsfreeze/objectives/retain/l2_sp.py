"""L2-SP (arXiv 1802.01483, equation 2): alpha/2 ||theta - theta_0||^2, a pull to the weights that training started from.

The paper decays a new head to zero; here a head that is fresh is left to weight decay (ours). Over a sequence theta_0 is the start
of each task, or with `start: sequence` that of the first task which trained the tensor (ours: the paper has one task).
"""

from __future__ import annotations

from typing import Any

import torch

from dsfreeze.engine import Engine, Piece
from dsfreeze.engine.process import together
from dsfreeze.objectives.retain.anchors import Anchored, joined
from dsfreeze.objectives.retain.memory import write_memory


class L2Sp(Anchored):
    """Holds a copy of the pieces' start."""

    rule = "L2-SP, arXiv 1802.01483 equation 2; a fresh head left out"

    def _hold(self, piece: Piece) -> tuple[torch.Tensor | float, torch.Tensor]:
        key = f"start/{piece.name}"
        if self.options.start == "sequence" and key in self.memory.shapes:
            anchor = self.memory.read(key, piece.first, piece.last).to(piece.value.device, torch.float32)
        else:
            anchor = piece.value.clone()
        return self.options.strength, anchor

    def finish(self, engine: Engine) -> None:
        if self.options.remember is None:
            return
        known = self.memory.under("start")
        kept = {f"start/{name}": self.memory.read(f"start/{name}") for name in known}
        if self.options.start == "sequence":
            new = tuple(name for name in self.names if name not in known)
            mine = {p.name: (p.first, self._held[p.name][1]) for p in engine.pieces() if p.name in new}
            module: Any = engine.module
            kept |= {f"start/{n}": t.to(module.dtype) for n, t in joined(engine, new, mine).items()}
        together(lambda: None if engine.rank else write_memory(self.job, self.memory, kept))
