"""The calibration data: a sample of the training examples that depends on what they are, not on where they stand."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from dsfreeze.data import Examples, TaskData
from dsfreeze.data.examples import Example
from dsfreeze.errors import UserError


def calibration_sample(data: TaskData, number: int, seed: int) -> Examples:
    """`number` training examples, drawn and ordered by a hash of seed and content: any order of the data gives the same ones.

    UserError when there are fewer."""
    examples = data.train
    if examples is None:
        raise UserError("There is nothing to analyze on: data.train is empty. Name training data in data.train.")
    if len(examples) < number:
        raise UserError(
            f"analyze.num_examples is {number}, but data.train has only {len(examples)} examples. Write "
            f"analyze.num_examples={len(examples)}, or name more data."
        )
    keys = [_key(examples[index], seed) for index in range(len(examples))]
    chosen = sorted(range(len(examples)), key=lambda index: keys[index])[:number]
    rows = [examples[index] for index in chosen]
    return Examples(rows, examples.num_items[chosen], examples.num_tokens[chosen])


def _key(example: Example, seed: int) -> bytes:
    plain = json.dumps([seed, sorted((key, list(np.ravel(value))) for key, value in example.items())], default=float)
    return hashlib.sha256(plain.encode()).digest()
