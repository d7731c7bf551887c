"""The passes of an analysis, one for each source of scores; each gives `Observations` more to go by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import torch

from dsfreeze.analyze.ablation import ablation_losses
from dsfreeze.analyze.bench import Bench, halves_of
from dsfreeze.analyze.gates import fit_gates
from dsfreeze.analyze.gradients import batch_gradients, example_gradients
from dsfreeze.analyze.inputs import column_sums, squared_inputs
from dsfreeze.analyze.layers import require_one_stack
from dsfreeze.analyze.probe import probe
from dsfreeze.analyze.states import Seen, see_states
from dsfreeze.analyze.targets import require_labels
from dsfreeze.analyze.traces import make_traces, read_head
from dsfreeze.engine.process import evaluation_engine
from dsfreeze.errors import UserError
from dsfreeze.job import task_module
from dsfreeze.model import read_anatomy
from dsfreeze.scores.observations import Observations
from dsfreeze.scores.spectrum import matrices, spectrum_of
from dsfreeze.strategies.scores_file import model_digest

Pass = Callable[[Bench, Observations], Observations]


def states(bench: Bench, so_far: Observations) -> Observations:
    """Block influence and states for CKA."""
    return _seen(so_far, see_states(bench, 0))


def traces(bench: Bench, so_far: Observations) -> Observations:
    """Transition traces, and all that `states` sees beside them."""
    require_labels(bench.data)
    require_one_stack(bench.anatomy, "The deviation")
    head = read_head(bench.engine, bench.anatomy, bench.options, words=bench.data.labels is None)
    seen = see_states(bench, bench.options.positions)
    return replace(_seen(so_far, seen), traces=make_traces(seen, head, bench.options), labels=[s.labels for s in seen])


def _seen(so_far: Observations, seen: list[Seen]) -> Observations:
    influence = np.asarray([s.influence for s in seen])
    return replace(so_far, tables={**so_far.tables, "influence": influence}, spaces=_stacked(seen))


def _stacked(seen: list[Seen]) -> list[torch.Tensor]:
    return list(torch.stack([s.spaces for s in seen], dim=1))


def reference(bench: Bench, so_far: Observations) -> Observations:
    """The states of the reference model on the same examples."""
    name = bench.options.reference
    assert name is not None, "asked for with a reference alone"
    module = task_module(bench.recipe, bench.data, bench.recipe.model.model_copy(update={"name": name}))
    anatomy = read_anatomy(module, name)
    if model_digest(anatomy) != model_digest(bench.anatomy):
        raise UserError(
            f"analyze.reference: {name} has {len(anatomy.blocks)} layers and other tensors than {bench.anatomy.name} "
            f"({len(bench.anatomy.blocks)} layers). Name a model of the same shape, such as the one this was trained from."
        )
    engine = evaluation_engine(module, anatomy, bench.recipe)
    try:
        return replace(so_far, reference_spaces=_stacked(see_states(replace(bench, engine=engine), 0)))
    finally:
        engine.close()


def spectra(bench: Bench, so_far: Observations) -> Observations:
    """Singular values, the matrices dealt out among the ranks."""
    tensors, engine = matrices(bench.anatomy), bench.engine
    mine = {}
    for number, tensor in enumerate(bench.watch(tensors)):
        weight = engine.read_weight(tensor.name)  # every rank reads: at stage 3 that is collective
        if number % engine.world_size == engine.rank:
            mine[tensor.name] = spectrum_of(weight)
    found = {name: numbers for share in engine.gather(mine) for name, numbers in share.items()}
    kinds: Iterable[str] = next(iter(found.values()), {})
    return replace(so_far, spectra={kind: {t.name: found[t.name][kind] for t in tensors} for kind in kinds})


def weights(bench: Bench, so_far: Observations) -> Observations:
    """Their squared norms."""
    found = {name: float(bench.engine.read_weight(name).double().square().sum()) for name in bench.tensors}
    return replace(so_far, weights=found)


def inputs(bench: Bench, so_far: Observations) -> Observations:
    """What comes into each matrix, and the weights it meets there."""
    squared, columns = squared_inputs(bench), column_sums(bench)
    return replace(so_far, inputs=squared, columns={name: columns[name] for name in squared[0]})


def gradients(bench: Bench, so_far: Observations) -> Observations:
    """And the weights, which they are held against."""
    return replace(weights(bench, so_far), tables={**so_far.tables, **batch_gradients(bench)})


def fisher(bench: Bench, so_far: Observations) -> Observations:
    return replace(so_far, tables={**so_far.tables, "fisher": example_gradients(bench)})


def ablation(bench: Bench, so_far: Observations) -> Observations:
    require_one_stack(bench.anatomy, "Ablation")
    found = ablation_losses(bench.first(bench.options.ablation_examples))
    return replace(so_far, tables={**so_far.tables, "ablation": found})


def probes(bench: Bench, so_far: Observations) -> Observations:
    """Two, each on its own half of the examples."""
    runs = [probe(bench, half, keep=False) for half in halves_of(len(bench.examples))]
    return replace(so_far, changes=[run.changes for run in runs], sizes=[run.sizes for run in runs])


def gated_probes(bench: Bench, so_far: Observations) -> Observations:
    """The same, and gates on each probe's change, fitted on the other probe's half."""
    changes, sizes, fits = [], [], []
    for half, other in _pairs(halves_of(len(bench.examples))):
        probed = probe(bench, half, keep=True)
        changes.append(probed.changes)
        sizes.append(probed.sizes)
        fits.append(fit_gates(bench, other, probed.delta))
    return replace(so_far, changes=changes, sizes=sizes, gates=fits)


def _pairs(halves: tuple[np.ndarray, np.ndarray]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    return halves, halves[::-1]


#: In this order. A pass may see all that the one named in `COVERS` would, which is then not made.
PASSES: Mapping[str, Pass] = {
    "traces": traces, "states": states, "reference": reference, "spectra": spectra, "inputs": inputs, "gradients": gradients, "weights": weights,
    "fisher": fisher, "ablation": ablation, "gates": gated_probes, "probe": probes,
}  # fmt: skip
COVERS = {"traces": "states", "gates": "probe", "gradients": "weights"}
