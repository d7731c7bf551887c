"""Probe runs: a few training steps of all layers from the start weights, to see which of them move.

Trained by the engine that the recipe names, so a probe takes the memory of full tuning; the analyzed model lies beside it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsfreeze.analyze.bench import Bench, Delta
from dsfreeze.engine import Engine
from dsfreeze.engine.process import build_engine
from dsfreeze.errors import UserError
from dsfreeze.job import task_module
from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe import Recipe
from dsfreeze.strategies.evidence import Change


def probe(bench: Bench, half: np.ndarray, *, keep: bool) -> tuple[dict[str, Change], Delta]:
    """How far each tensor of the layers moves in analyze.probe_steps steps at train.learning_rate on the examples of `half`,
    and with `keep` its way there, else {} (collective)."""
    plan = FreezePlan("full", (Phase(0, None, tuple(t.name for t in bench.anatomy.tensors)),))
    module = task_module(bench.recipe, bench.data, bench.recipe.model)
    recipe = _accumulating(bench.recipe, bench.num_micro_batches)
    engine = build_engine(module, bench.anatomy, recipe, plan)
    try:
        kept = bench.tensors if keep else ()
        engine.write_weights({t.name: bench.engine.read_weight(t.name) for t in bench.anatomy.tensors})
        start = {name: engine.read_weight(name) for name in kept}
        engine.enter(plan.phases[0])
        engine.watch(changes=True)
        for batch in bench.rounds(half, bench.options.probe_steps):
            _step(replace(bench, engine=engine), batch)
        changes = engine.changes()
        delta = {name: engine.read_weight(name) - before for name, before in start.items()}
    finally:
        engine.close()
    return {name: Change(*changes[name]) for name in bench.tensors}, delta


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
