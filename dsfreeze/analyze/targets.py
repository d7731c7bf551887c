"""Where in an example a label is predicted, and which one: what a transition trace is measured against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from dsfreeze.data import TaskData
from dsfreeze.data.examples import IGNORED
from dsfreeze.errors import UserError

#: (positions, labels) of one example.
Target = tuple[list[int], list[int]]


def require_labels(data: TaskData) -> None:
    """UserError for tasks whose deviation is not defined."""
    why = None
    if data.num_labels == 1:
        why = "a regression has no label to deviate from"
    elif data.task == "seq2seq":
        why = "it follows one position through one stack of layers, and this model has two"
    if why:
        raise UserError(
            f"The deviation cannot be measured here: {why}. Leave the family 'deviation' out of analyze.scores."
        )


def targets_of(data: TaskData, batch: Mapping[str, torch.Tensor], most: int) -> list[Target]:
    """For each example of a batch at most `most` positions, evenly spread over those that predict something.

    A classifier's single one is its last token (a decoder) or its first (an encoder's [CLS]; the caller knows which)."""
    labels = batch["labels"]
    if data.task == "classification":
        last = batch["attention_mask"].sum(1) - 1
        return [([int(position)], [int(label)]) for position, label in zip(last, labels, strict=True)]
    if data.task != "tokens":  # position t predicts token t + 1
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
    found = []
    for row in labels:
        counted = (row != IGNORED).nonzero().flatten().numpy()
        chosen = counted[np.unique(np.linspace(0, len(counted) - 1, min(most, len(counted))).round().astype(int))]
        found.append((chosen.tolist(), row[chosen].tolist()))
    return found
