"""What every engine does alike: phases, weighted losses, evaluation; its parts are `core`, `edited`, `measured` and `saved`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from dsfreeze.engine.edited import Edited
from dsfreeze.engine.groups import group_tensors, set_learning_rate
from dsfreeze.engine.modes import Modes, set_trainable
from dsfreeze.engine.movement import changed
from dsfreeze.engine.saved import Saved
from dsfreeze.engine.streaming import Take, streamed_gradients
from dsfreeze.errors import UserError
from dsfreeze.plan import Phase


class BaseEngine(Edited, Saved):
    """See `dsfreeze.engine.Engine` for the contract."""

    # -- phases ------------------------------------------------------------------------------------------------

    def enter(self, phase: Phase) -> None:
        """See the protocol. Raises UserError, on every rank, when ranks name different sets, when a set is empty or names
        what the model lacks, and when flags were flipped behind the plan's back."""
        if self._trainable and phase.trainable == self._trainable:
            return
        self._agree(hashlib.sha256("\n".join(phase.trainable).encode()).hexdigest(), "which tensors train")
        if not phase.trainable:
            raise UserError(
                "Nothing to train: every tensor is frozen. Lower freeze.fraction or name some in freeze.trainable."
            )
        names = self.anatomy.in_order(phase.trainable)
        self.groups = group_tensors(self.anatomy, names, self.recipe.train.weight_decay)
        if self._modes is None:
            set_trainable(self.module, names)
            self._set_modes(names)
            self.flats = self._build()
            self._frozen = self._frozen_checksums(set(self._named))
        else:
            self._check_flags()
            self._change(names)
        self._trained = self._trained_checksums()
        self._trainable = names
        self._hold_back()
        self._ever_trained.update(names)

    def _change(self, names: tuple[str, ...]) -> None:
        """Another set: the state moves by the rule, prefix and checkpointing follow the new lowest trainable layer."""
        concerned = set(names) | set(self._trainable)
        thawed = self.gather(changed(self._frozen, self._frozen_checksums(concerned)))
        assert not any(thawed), f"frozen tensors changed: {thawed}"
        self._refreeze(names)
        self._set_modes(names)
        kept = {name: sums for name, sums in self._frozen.items() if name not in concerned}
        self._frozen = {**kept, **self._frozen_checksums(concerned)}

    def _set_modes(self, names: tuple[str, ...]) -> None:
        if self._modes is not None:
            self._modes.close()
            self.module.eval()  # what left the prefix is switched to training with everything else
        self._modes = Modes(self.module, self.anatomy, names, self.recipe.train.gradient_checkpointing)
        self._modes.train()

    # -- training ----------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Mapping[str, torch.Tensor], weight: float) -> float:
        assert self._modes is not None, "enter a phase first"
        self._check_flags()
        self._modes.train()
        return self._pass(batch, weight, self.objective)

    def step(self, learning_rate: float, own_rates: Mapping[str, float] | None = None) -> float:
        self._check_flags()
        if self._watches_gradients:
            self._gradients = self._measure_gradients()
        set_learning_rate(self.optimizer, learning_rate, own_rates or {})
        return self._update()

    # -- evaluation --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def no_grad_forward(self, batch: Mapping[str, torch.Tensor], **options: Any) -> Any:
        self.module.eval()
        return self.module(**self._move(self.objective.inputs(batch)), **self._forward_options, **options)

    def scan_gradients(self, batch: Mapping[str, torch.Tensor], names: Iterable[str], take: Take) -> float:
        assert self._modes is None, "scan before a phase is entered"
        with streamed_gradients(self.module, self.anatomy, names, take):
            batch = self._move(batch)
            loss = self.objective.loss(self.module(**self.objective.inputs(batch), **self._forward_options), batch)
            assert loss is not None, "the batch has labels"
            loss.backward()
        return float(loss.detach())

    @torch.no_grad()
    def generate(self, batch: Mapping[str, torch.Tensor], **options: Any) -> torch.Tensor:
        self.module.eval()
        defaults = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        model: Any = self.module
        options = {**defaults, **self._generate_options(), **options}
        generated: torch.Tensor = model.generate(**self._move(batch), **options)
        return generated

    def _generate_options(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.holding.close()
        if self._modes is not None:
            self._modes.close()
