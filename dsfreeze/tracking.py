"""What an adaptive strategy sees of a run: gradients, the way from the start, hidden states of a fixed probe batch.

Nothing here keeps a second copy on the device: gradients are added up as norms, the start's weights lie in host memory
as this rank's shares, and of hidden states a sample of positions is kept, likewise in host memory.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

import torch

from dsfreeze.engine import Engine
from dsfreeze.errors import UserError
from dsfreeze.job import Job
from dsfreeze.scores.similarity import linear_cka, plasticity
from dsfreeze.strategies.evidence import Change, Evidence, Gradient, Measure, Similarity

#: Examples of the probe batch, and positions of its hidden states that are compared (ours).
PROBE_EXAMPLES, PROBE_POSITIONS = 8, 256


class Tracker:
    """Measures what `needs` names, from the run's start on; `reset` after each decision."""

    def __init__(self, job: Job, needs: Collection[Measure]) -> None:
        self.job, self.needs = job, frozenset(needs)
        self._losses: list[float] = []
        self._rate = 0.0
        self._gradients: dict[str, Gradient] = {}
        self._start: dict[str, torch.Tensor] = {}

    def start(self, engine: Engine) -> None:
        """Note where the run starts (collective); a resumed run calls it before the checkpoint's weights are loaded."""
        engine.watch(gradients="gradient" in self.needs, changes="change" in self.needs)
        if "activations" in self.needs:
            self._start = self._hidden_states(engine)

    def after_step(self, engine: Engine, loss: float, learning_rate: float) -> None:
        self._losses.append(loss)
        self._rate = learning_rate
        if "gradient" in self.needs:
            for name, (l1, squared) in engine.gradients().items():
                old = self._gradients.get(name, Gradient())
                self._gradients[name] = Gradient(
                    old.l1 + l1, old.l2 + squared**0.5, old.squared + squared, old.steps + 1
                )

    def evidence(self, engine: Engine, step: int) -> Evidence:
        """Everything measured since the last decision (collective)."""
        changes = engine.changes() if "change" in self.needs else {}
        return Evidence(
            step, tuple(self._losses), self._rate, dict(self._gradients),
            {name: Change(*pair) for name, pair in changes.items()}, self._similarities(engine),
        )  # fmt: skip

    def reset(self) -> None:
        """A decision was made: sums start anew."""
        self._losses, self._gradients = [], {}

    def host_bytes(self, engine: Engine) -> int:
        """Bytes of this rank's copies in host memory: the start's weights and hidden states."""
        return engine.host_bytes() + sum(t.nbytes for t in self._start.values())

    # -- hidden states -----------------------------------------------------------------------------------------

    def _similarities(self, engine: Engine) -> dict[str, Similarity]:
        if "activations" not in self.needs:
            return {}
        now = self._hidden_states(engine)
        return {
            name: Similarity(linear_cka(self._start[name], value), plasticity(self._start[name], value))
            for name, value in now.items()
        }

    def _hidden_states(self, engine: Engine) -> dict[str, torch.Tensor]:
        """Of each transformer layer its output on the probe batch: (positions, hidden), fp32 in host memory."""
        data = self.job.data
        assert data.train is not None
        examples = [data.train[index] for index in range(min(PROBE_EXAMPLES, len(data.train)))]
        batch = {key: value for key, value in data.collate(examples).items() if key != "labels"}
        outputs = engine.no_grad_forward(batch, output_hidden_states=True)
        states = getattr(outputs, "hidden_states", None)
        blocks = [layer.name for layer in self.job.anatomy.blocks]
        if states is None or len(states) != len(blocks) + 1:
            raise UserError(
                f"Strategy '{self.job.plan.strategy}' compares the layers' hidden states, and {self.job.base.name} gives "
                f"{0 if states is None else len(states)} of them for {len(blocks)} layers. Choose a strategy that looks at "
                "gradients or weights: autofreeze, tang_like, adt_h."
            )
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool().flatten()
        chosen = mask.nonzero().flatten()[:PROBE_POSITIONS]
        return {
            name: state.flatten(0, 1)[chosen.to(state.device)].float().cpu()
            for name, state in zip(blocks, states[1:], strict=True)
        }

    # -- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        gradients = {name: asdict(value) for name, value in self._gradients.items()}
        return {"losses": self._losses, "rate": self._rate, "gradients": gradients}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses, self._rate = list(state["losses"]), state["rate"]
        self._gradients = {name: Gradient(**value) for name, value in state["gradients"].items()}
