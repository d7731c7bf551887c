"""From states at the answer positions to transition traces: deviation from the label, and what it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy, linear

from dsfreeze.analyze.layers import output_head
from dsfreeze.analyze.states import Seen
from dsfreeze.anatomy import Anatomy
from dsfreeze.engine import Engine
from dsfreeze.errors import UserError
from dsfreeze.recipe import AnalyzeOptions
from dsfreeze.scores.deviation import deviation, fitted_basis, semantic_basis


@dataclass(frozen=True)
class Head:
    """The output head, on the CPU: `weight` (v, d), `bias` (v,). `gain` (d,): the final norm's, where it is folded.
    `embedding` (v, d): the input's, where the labels are words of a vocabulary. `fresh`: it was drawn at random."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    gain: torch.Tensor | None
    embedding: torch.Tensor | None
    fresh: bool


def read_head(engine: Engine, anatomy: Anatomy, options: AnalyzeOptions, *, words: bool) -> Head:
    """UserError where the model has no such head, or no norm that folds (collective)."""
    name, module = output_head(engine.module, anatomy)
    embedding = next((t for t in anatomy.tensors if t.category == "embed"), None)
    return Head(
        engine.read_weight(name).float(),
        engine.read_weight(f"{name.rpartition('.')[0]}.bias").float() if module.bias is not None else None,
        _gain(engine, anatomy) if options.final_norm == "fold" else None,
        engine.read_weight(embedding.name).float() if words and embedding is not None else None,
        not words and bool(getattr(engine.module, "has_fresh_head", False)),
    )


def _gain(engine: Engine, anatomy: Anatomy) -> torch.Tensor:
    norms = [t for layer in anatomy.layers if layer.name == "norm" for t in layer.tensors]
    if len(norms) != 1:
        raise UserError(
            f"analyze.final_norm is 'fold', which needs a final RMSNorm, and {anatomy.name} has "
            f"{'a norm with a bias' if norms else 'none'}. Write apply or none."
        )
    gain = engine.read_weight(norms[0].name).float()
    return 1 + gain if "gemma" in anatomy.model_type else gain  # Gemma keeps the gain less one


def make_traces(seen: Sequence[Seen], head: Head, options: AnalyzeOptions) -> dict[str, np.ndarray]:
    """(rows, L + 1) of each trace by name; a row for each example, or with targets `vote` for each answer position."""
    raw, views = torch.cat([s.raw for s in seen]), torch.cat([s.views for s in seen])
    labels = torch.tensor([label for s in seen for label in s.labels])
    owner = torch.tensor([k for k, s in enumerate(seen) for _ in s.labels])
    states = views if options.final_norm == "apply" else raw
    found = {
        name: deviation(states, basis) for name, basis in _bases(states, labels, owner, head, options.seed).items()
    }
    found["final_state"] = deviation(states, states[:, -1])
    found["logit_lens"] = _lens(views, labels, owner, head)
    return {name: _rows(trace.numpy(), owner.numpy(), options.targets) for name, trace in found.items()}


def _bases(
    states: torch.Tensor, labels: torch.Tensor, owner: torch.Tensor, head: Head, seed: int
) -> dict[str, torch.Tensor]:
    """(n, d) what each trace measures the distance to."""
    random = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed))
    bases = {"deviation": head.weight[labels], "deviation_random": random[labels]}
    if head.fresh:
        bases["deviation"] = torch.stack([rows[label] for rows, label in _fitted(states, labels, owner, head)])
    elif head.embedding is not None:
        kinds, where = torch.unique(labels, return_inverse=True)
        bases |= {"deviation_unembedding": head.weight[labels], "deviation_input": head.embedding[labels]}
        bases["deviation"] = semantic_basis(head.weight, kinds)[where]
    return bases if head.gain is None else {name: basis / head.gain for name, basis in bases.items()}


def _lens(views: torch.Tensor, labels: torch.Tensor, owner: torch.Tensor, head: Head) -> torch.Tensor:
    """(n, L + 1) cross-entropy of the head on every space, in nats; position by position: the logits of all would not fit."""
    heads = _fitted(views, labels, owner, head) if head.fresh else ((head.weight, label) for label in labels)
    bias = None if head.fresh else head.bias
    rows = [
        cross_entropy(linear(view, weight.float(), bias), label.expand(len(view)), reduction="none")
        for view, (weight, label) in zip(views, heads, strict=True)
    ]
    return torch.stack(rows).double()


def _fitted(
    states: torch.Tensor, labels: torch.Tensor, owner: torch.Tensor, head: Head
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each row the class rows fitted to the last space of the examples of the other fold, and its label: rows that had
    seen an example would always find it."""
    folds = [fitted_basis(states[owner % 2 == k, -1], labels[owner % 2 == k], len(head.weight)) for k in (1, 0)]
    return ((folds[int(k) % 2], label) for k, label in zip(owner, labels, strict=True))


def _rows(trace: np.ndarray, owner: np.ndarray, targets: str) -> np.ndarray:
    """A row for each answer position, or each example's mean over its own."""
    if targets == "vote":
        return trace
    return np.stack([trace[owner == example].mean(axis=0) for example in np.unique(owner)])
