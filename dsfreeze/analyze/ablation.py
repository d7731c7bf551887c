"""What the loss does without a layer: skipped, so that its input is its output, or reset to fresh weights.

Layers below the one in question give what they gave in the whole pass and compute nothing, so a layer costs what lies above it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from dsfreeze.analyze.bench import Bench
from dsfreeze.analyze.layers import blocks_of, recording, replaced, with_state
from dsfreeze.errors import UserError
from dsfreeze.evaluation import losses_of


def ablation_losses(bench: Bench) -> np.ndarray:
    """(examples, L) mean loss of an example without each layer less that with all of them (collective)."""
    engine, skips = bench.engine, bench.options.ablation == "skip"
    blocks = blocks_of(engine.module, bench.anatomy)
    if not skips and any(p.numel() == 0 for p in engine.module.parameters()):
        raise UserError(
            "analyze.ablation 'reset' draws a layer's matrices anew, and at ZeRO stage 3 no rank holds them. Write skip, or "
            "zero: zero2."
        )

    def run(chosen: np.ndarray) -> list[list[float]]:
        batch = bench.collate(chosen)
        with recording(engine.module, bench.anatomy) as found:
            whole = np.asarray(losses_of(engine, bench.data, batch))
        inputs, outputs = dict(found.inputs), dict(found.outputs)
        columns = []
        for k, block in enumerate(blocks):
            given = [outputs[j] if j < k else None for j in range(len(blocks))]
            if skips:
                given[k] = with_state(outputs[k], inputs[k])
            with replaced(engine.module, bench.anatomy, given), _fresh(engine.module, [] if skips else [block]):
                columns.append(np.asarray(losses_of(engine, bench.data, batch)) - whole)
        losses: list[list[float]] = np.stack(columns, axis=1).tolist()
        return losses

    return np.asarray(bench.over_examples(bench.options.batch_size, run))


@contextmanager
def _fresh(module: nn.Module, blocks: list[nn.Module]) -> Iterator[None]:
    """The blocks with their matrices drawn anew, N(0, initializer_range), the same every time; gains and biases stay (ours)."""
    matrices = [p for block in blocks for p in block.parameters() if p.dim() > 1]
    held = [matrix.detach().clone() for matrix in matrices]
    generator = torch.Generator().manual_seed(0)
    try:
        for matrix in matrices:
            fresh = torch.randn(matrix.shape, generator=generator)
            matrix.data.copy_(fresh * getattr(module.config, "initializer_range", 0.02))
        yield
    finally:
        for matrix, before in zip(matrices, held, strict=True):
            matrix.data.copy_(before)
