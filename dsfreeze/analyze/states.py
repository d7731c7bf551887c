"""The forward pass of an analysis: what each layer does to the states, and where the states stand to their labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from dsfreeze.analyze.bench import Bench
from dsfreeze.analyze.layers import (
    Recording,
    head_inputs,
    output_head,
    recording,
    replaced,
    require_one_stack,
    with_state,
)
from dsfreeze.analyze.targets import Target, targets_of
from dsfreeze.scores.similarity import influence

#: Positions of each example whose states are kept for comparing spaces (ours).
KEPT = 4


@dataclass(frozen=True)
class Seen:
    """Of one example, on the CPU in fp32. L layers, d wide, P answer positions."""

    influence: list[float]
    """(L,)"""
    spaces: torch.Tensor
    """(L + 1, KEPT, d) at positions spread over the example."""
    raw: torch.Tensor
    """(P, L + 1, d) at the answer positions, as the layers give them; P is 0 where no labels were looked for."""
    views: torch.Tensor
    """The same as the head would see them: each space through all that follows the last layer."""
    labels: list[int]
    """(P,)"""


def see_states(bench: Bench, answers: int) -> list[Seen]:
    """Every example's states, on every rank; `answers` is how many answer positions are looked at, 0 for none (collective)."""
    require_one_stack(bench.anatomy, "What passes through the layers")

    def look(chosen: np.ndarray) -> list[Seen]:
        batch = bench.collate(chosen)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with recording(bench.engine.module, bench.anatomy) as found:
            bench.engine.no_grad_forward(inputs)
        targets = targets_of(bench.data, batch, answers) if answers else [([], [])] * len(chosen)
        views = _views(bench, inputs, found) if answers else []
        return _take_apart(found, inputs["attention_mask"], targets, views)

    return bench.over_examples(bench.options.batch_size, look)


def _views(bench: Bench, inputs: Mapping[str, torch.Tensor], found: Recording) -> list[torch.Tensor]:
    """Each space as it reaches the head: final norm, pooler or what else the model has, by the model's own forward pass."""
    module = bench.engine.module
    outputs, spaces = list(found.outputs.values()), found.spaces()
    with head_inputs(output_head(module, bench.anatomy)[1]) as views:
        for space in spaces:
            with replaced(module, bench.anatomy, [with_state(output, space) for output in outputs]):
                bench.engine.no_grad_forward(inputs)
    return views


def _take_apart(
    found: Recording, mask: torch.Tensor, targets: Sequence[Target], views: Sequence[torch.Tensor]
) -> list[Seen]:
    spaces = found.spaces()
    mask = mask.to(spaces[0].device)
    moved = torch.stack([influence(a, b, mask) for a, b in pairwise(spaces)], dim=1).tolist()
    seen = []
    for row, (positions, labels) in enumerate(targets):
        # a pooled view is one state for the whole example, made of its first position
        pooled = bool(views) and views[0].dim() == 2
        raw = _at(spaces, row, [0] if pooled else positions)
        view = _at([v.unsqueeze(1) for v in views], row, [0]) if pooled else _at(views, row, positions)
        spread = np.linspace(0, int(mask[row].sum()) - 1, KEPT).round().astype(int)
        seen.append(Seen(moved[row], _at(spaces, row, spread.tolist()).transpose(0, 1), raw, view, labels))
    return seen


def _at(spaces: Sequence[torch.Tensor], row: int, positions: Sequence[int]) -> torch.Tensor:
    """(positions, spaces, d) of one example, fp32 on the CPU."""
    if not spaces or not positions:
        return torch.empty(0)
    return torch.stack([space[row, list(positions)].float().cpu() for space in spaces], dim=1)
