"""Probe runs: a few training steps of all layers from the start weights, to see which of them move.

Trained by the engine that the recipe names, so a probe takes the memory of full tuning; the analyzed model lies beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from dsfreeze.analyze.bench import Bench, Delta
from dsfreeze.engine import Engine
from dsfreeze.engine.process import build_engine
from dsfreeze.errors import UserError
from dsfreeze.job import task_module
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import Recipe
from dsfreeze.strategies.evidence import Change


@dataclass(frozen=True)
class Probed:
    """Of each tensor of the layers: how far it moved, its way there (empty unless kept), and its gradient's mean L1 norm in the first
    half of the steps and in the second."""

    changes: dict[str, Change]
    delta: Delta
    sizes: dict[str, tuple[float, float]]


def probe(bench: Bench, half: np.ndarray, *, keep: bool) -> Probed:
    """analyze.probe_steps steps of everything at train.learning_rate on the examples of `half`; `keep` keeps the way (collective)."""
    plan = FreezePlan("full", (Phase(0, None, tuple(t.name for t in bench.anatomy.tensors)),))
    module = task_module(bench.recipe, bench.data, bench.recipe.model)
    recipe = _accumulating(bench.recipe, bench.num_micro_batches)
    engine = build_engine(module, bench.anatomy, recipe, plan)
    try:
        kept = bench.tensors if keep else ()
        engine.write_weights({t.name: bench.engine.read_weight(t.name) for t in bench.anatomy.tensors})
        start = {name: engine.read_weight(name) for name in kept}
        engine.enter(plan.phases[0])
        engine.watch(changes=True, gradients=True)
        norms = []
        for batch in bench.rounds(half, bench.options.probe_steps):
            _step(replace(bench, engine=engine), batch)
            norms.append({name: l1 for name, (l1, _) in engine.gradients().items()})
        changes = engine.changes()
        delta = {name: engine.read_weight(name) - before for name, before in start.items()}
    finally:
        engine.close()
    return Probed({name: Change(*changes[name]) for name in bench.tensors}, delta, _sizes(norms, bench.tensors))


def _sizes(norms: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Of one step there are no halves: both are it."""
    middle = len(norms) // 2
    first, second = norms[:middle] or norms, norms[middle:]
    return {name: (fmean(row[name] for row in first), fmean(row[name] for row in second)) for name in names}


def _accumulating(recipe: Recipe, steps: int) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"gradient_accumulation_steps": steps})})


def _step(bench: Bench, batch: np.ndarray) -> None:
    """One optimizer step on the ranks' parts of a batch: the same step at every world size."""
    engine: Engine = bench.engine
    loss = sum(engine.forward_backward(part, weight) for part, weight in bench.micro_batches(batch))
    norm = engine.step(bench.recipe.train.learning_rate)
    if not np.isfinite(engine.sum([loss, norm])).all():
        raise UserError(
            f"The probe's loss or gradient is not finite: train.learning_rate {bench.recipe.train.learning_rate:g} is too high to "
            "learn anything from where the weights go. Lower it, or leave the family 'change' out of analyze.scores."
        )
