"""ILA: gates on a probe's weight change, fitted with the weights fixed."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from dsfreeze.analyze.bench import Bench, Delta


def fit_gates(bench: Bench, half: np.ndarray, delta: Delta) -> list[float]:
    """One logit s a layer, gamma = sigmoid(s), fitted by Adam on the loss of theta_0 + gamma * delta over the examples of
    `half`; the weights are put back (collective). All start at 0, where each layer goes half of its way (ours)."""
    engine, options = bench.engine, bench.options
    layer_of = {t.name: k for k, layer in enumerate(bench.anatomy.blocks) for t in layer.tensors}
    start = {name: engine.read_weight(name) for name in delta}
    logits = torch.zeros(len(bench.anatomy.blocks), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=options.gate_learning_rate)
    try:
        for batch in bench.rounds(half, options.gate_steps):
            gates = torch.sigmoid(logits.detach())
            engine.write_weights({name: start[name] + float(gates[layer_of[name]]) * delta[name] for name in delta})
            logits.grad = torch.tensor(_slopes(bench, batch, delta, layer_of)) * gates * (1 - gates)
            optimizer.step()
    finally:
        engine.write_weights(start)
    return logits.detach().tolist()


def _slopes(bench: Bench, batch: np.ndarray, delta: Delta, layer_of: dict[str, int]) -> list[float]:
    """d loss / d gamma of each layer, g . delta, over the ranks' parts of a batch."""
    slopes = [0.0] * len(bench.anatomy.blocks)

    def take(weight: float, name: str, gradient: torch.Tensor) -> None:
        product = gradient.float().cpu() * delta[name].float()
        slopes[layer_of[name]] += weight * float(product.sum(dtype=torch.float64))

    for part, weight in bench.micro_batches(batch):
        bench.engine.scan_gradients(part, tuple(delta), partial(take, weight))
    return bench.engine.sum(slopes)
