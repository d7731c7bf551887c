"""Preference tuning [DPO, arXiv 2305.18290]: raise the chosen answer's probability over the rejected one's, measured against the
model before the first step.

A batch has chosen and rejected in turn, `labels` int64 [2 n, positions] on the answers alone, and `reference` float32 [n, 2],
the answers' log-probabilities under the model before the first step. With an answer's log-ratio r = log pi(y) - log ref(y),
summed over its tokens, and d = r(chosen) - r(rejected), a pair costs

    sigmoid   -log sigmoid(beta d)                                           eq. 7
    hinge     max(0, 1 - beta d)                                             SLiC, arXiv 2305.10425, in DPO's log-ratios
    ipo       (r(chosen) / tokens - r(rejected) / tokens - 1 / (2 beta))^2   arXiv 2310.12036, eq. 17, of means over tokens

as TRL's DPOTrainer defines them (1.16). beta r is an answer's reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dsfreeze.data.examples import IGNORED
from dsfreeze.objectives import Objective

#: (log-ratios [n, 2], answers' lengths in tokens [n, 2], beta) -> the pairs' losses [n].
Loss = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


def sigmoid(ratios: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    return -F.logsigmoid(beta * _difference(ratios))


def hinge(ratios: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.relu(1 - beta * _difference(ratios))


def ipo(ratios: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    return (_difference(ratios / lengths) - 1 / (2 * beta)).square()


LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}


class Preference(Objective):
    """One of `LOSSES`, averaged over a batch's pairs."""

    def __init__(self, loss: str, beta: float) -> None:
        self.beta, self._loss = beta, LOSSES[loss]

    def inputs(self, batch: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """All but what the model must not see: with labels it would compute a loss of its own."""
        return {name: value for name, value in batch.items() if name not in ("labels", "reference")}

    def loss(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.losses_and_ratios(outputs, batch)[0].mean()

    def losses_and_ratios(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs' losses [n], and the log-ratios of their answers [n, 2], chosen first."""
        assert "reference" in batch, "the reference is measured before the first step"
        found, lengths = answer_log_probs(outputs.logits, batch["labels"])
        ratios = found.view(-1, 2) - batch["reference"].to(found.device)
        return self._loss(ratios, lengths.view(-1, 2), self.beta), ratios


def answer_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each sequence the sum of its labelled tokens' log-probabilities (float32, nats), and how many these are; both [batch].

    Position t of `logits`, [batch, positions, vocabulary], predicts token t + 1; `labels` [batch, positions], -100 where none
    counts.
    """
    labels = labels.to(logits.device)
    apply: Any = _AnswerLogProbs.apply
    return apply(logits, labels), (labels[:, 1:] != IGNORED).sum(1)


class _AnswerLogProbs(torch.autograd.Function):
    """Beside the logits, and in the backward pass their gradient, nothing of the vocabulary's size is held for more than one
    answer at a time: log-softmax would keep another float32 copy of all of them."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        sums, normalisers = [], []
        for row, label in zip(logits, labels, strict=True):
            counted, tokens = _counted(label)
            scores = row[counted].float()
            normalisers.append(scores.logsumexp(-1))
            sums.append((scores.gather(-1, tokens[:, None]).squeeze(-1) - normalisers[-1]).sum())
        ctx.save_for_backward(logits, labels, *normalisers)
        return torch.stack(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper: torch.Tensor) -> tuple[torch.Tensor, None]:
        """d log p(token) / d score = 1 at the token, minus p everywhere."""
        logits, labels, *normalisers = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for number, (label, normaliser) in enumerate(zip(labels, normalisers, strict=True)):
            counted, tokens = _counted(label)
            probabilities = (logits[number][counted].float() - normaliser[:, None]).exp_()
            probabilities.scatter_add_(-1, tokens[:, None], torch.full_like(normaliser[:, None], -1.0))
            gradient[number][counted] = (-upper[number] * probabilities).to(logits.dtype)
        return gradient, None


def _counted(label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions that predict a labelled token, those tokens) of one sequence."""
    counted = (label[1:] != IGNORED).nonzero().squeeze(-1)
    return counted, label[counted + 1]


def _difference(values: torch.Tensor) -> torch.Tensor:
    return values[:, 0] - values[:, 1]
