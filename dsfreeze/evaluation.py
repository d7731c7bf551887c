"""Evaluation: the same numbers at every world size.

The data is cut into batches of `per_device_eval_batch_size` whatever the number of ranks, and the batches are dealt
in turn; a rank without one in the last round runs a filler, for ZeRO-3's collectives need every rank. What counts is
gathered example by example, put into the data's order, and summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.nn import functional as F

from dsfreeze import metrics
from dsfreeze.data.examples import IGNORED, Batch, TaskData, pad_id, pad_inputs
from dsfreeze.engine.modes import takes
from dsfreeze.errors import UserError
from dsfreeze.objectives.preference import Preference
from dsfreeze.progress import Watch

if TYPE_CHECKING:
    from dsfreeze.engine import Engine
    from dsfreeze.recipe import Recipe

T = TypeVar("T")
#: (indices of the examples, their batch) -> what a forward pass of it runs within.
Around = Callable[[np.ndarray, Batch], AbstractContextManager[None]]
#: Of one example: loss summed over its items, items, truth, guess.
Judged = tuple[float, int, Any, Any]


def evaluate(engine: Engine, task_data: TaskData, recipe: Recipe, around: Around | None = None) -> dict[str, float]:
    """`loss` and the task's metrics over `task_data.eval` (collective); every rank gets the same numbers.

    `around`: what each forward pass for the loss runs within (a prefix cache's part)."""
    examples = task_data.eval
    if examples is None:
        raise UserError("There is nothing to evaluate on: data.eval is empty.")
    size = recipe.train.per_device_eval_batch_size

    def run(chosen: np.ndarray) -> list[Judged]:
        batch = task_data.collate([examples[index] for index in chosen])
        with around(chosen, batch) if around else nullcontext():
            return _judge(engine, task_data, batch)

    judged = over_all(engine, examples.num_tokens, size, run)
    items = sum(row[1] for row in judged)
    texts: Sequence[str] = ()
    references: Sequence[str] = ()
    sources: Sequence[str] = ()
    if metrics.generates(task_data.metrics):
        assert task_data.prompts is not None, "prepare() makes prompts for every task whose metrics generate"
        texts = _generate_all(engine, task_data, size, recipe.data.max_new_tokens)
        references, sources = task_data.prompts.references, task_data.prompts.sources
    outcome = metrics.Outcome(
        loss=math.fsum(row[0] for row in judged) / max(items, 1),
        truth=[row[2] for row in judged],
        guess=[row[3] for row in judged],
        labels=task_data.labels or (),
        texts=texts,
        references=references,
        sources=sources,
    )
    return metrics.compute(task_data.metrics, outcome)


def over_all(
    engine: Engine, lengths: np.ndarray, size: int, run: Callable[[np.ndarray], list[T]], watch: Watch[Any] = iter
) -> list[T]:
    """`run` on batches of `size` indices, dealt to the ranks; its results of all ranks, one per index, in index order.

    Batches hold examples of like length, the longest first: little padding, and too little memory shows at once.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    mine: list[tuple[int, Any]] = []
    for chosen, counts in watch(list(deal(batches, engine.rank, engine.world_size))):
        results = run(chosen)
        if counts:
            mine += zip(chosen.tolist(), results, strict=True)
    everyones = [pair for rank in engine.gather(mine) for pair in rank]
    return [result for _, result in sorted(everyones, key=lambda pair: pair[0])]


def deal(batches: Sequence[np.ndarray], rank: int, world_size: int) -> Iterator[tuple[np.ndarray, bool]]:
    """(batch, whether it counts) for every round of this rank; all ranks have the same number of rounds."""
    for start in range(0, len(batches), world_size):
        counts = start + rank < len(batches)
        yield (batches[start + rank], True) if counts else (batches[-1][:1], False)


# -- from logits ---------------------------------------------------------------------------------------------------


def losses_of(engine: Engine, task_data: TaskData, batch: Batch) -> list[float]:
    """The mean loss of each example of a batch, by one forward pass (collective at stage 3)."""
    return [loss / max(items, 1) for loss, items, _, _ in _judge(engine, task_data, batch)]


def _judge(engine: Engine, task_data: TaskData, batch: Batch) -> list[Judged]:
    """One forward pass; the logits are judged example by example, on the device, in fp32."""
    if isinstance(engine.objective, Preference):
        return _judge_pairs(engine, engine.objective, batch)
    if task_data.task in ("causal_lm", "sft", "seq2seq"):
        return _judge_texts(engine, task_data, batch)
    judge = _judge_number if task_data.num_labels == 1 else _JUDGES[task_data.task]
    logits = engine.no_grad_forward({key: value for key, value in batch.items() if key != "labels"}).logits.detach()
    return [judge(row.float(), label.to(row.device)) for row, label in zip(logits, batch["labels"], strict=True)]


def _judge_texts(engine: Engine, task_data: TaskData, batch: Batch) -> list[Judged]:
    """Each text's loss, and whether its tokens that count are what greedy decoding would give."""
    labels = batch["labels"]
    if task_data.task == "seq2seq":  # the decoder's input is made from the labels
        logits, before = engine.no_grad_forward(batch).logits.detach(), F.pad(labels[:, :-1], (1, 0), value=IGNORED)
    else:
        # position p predicts token p + 1; of a prompt nobody reads the vocabulary's logits
        kept = (labels[:, 1:] != IGNORED).any(dim=0).nonzero().squeeze(1)
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if takes(engine.module, "logits_to_keep"):
            logits = engine.no_grad_forward(inputs, logits_to_keep=kept).logits.detach()
        else:
            logits = engine.no_grad_forward(inputs).logits.detach()[:, kept]
        labels, before = labels[:, 1:][:, kept], labels[:, :-1][:, kept]
    greedy = "greedy_match" in task_data.metrics
    asked = labels.masked_fill(_ended(before, task_data.tokenizer.eos_token_id), IGNORED) if greedy else labels
    return [
        _judge_text(label.to(row.device), answer.to(row.device), row, greedy=greedy)
        for row, label, answer in zip(logits, labels, asked, strict=True)
    ]


def _ended(before: torch.Tensor, end: int | None) -> torch.Tensor:
    """Where, by the labels before, an answer has ended: what a template writes after the end-of-text token is no part of it. bool
    [batch, positions]."""
    ended, columns = torch.zeros_like(before[:, 0], dtype=torch.bool), []
    for label in before.unbind(1):
        ended = (ended | (label == end)) & (label != IGNORED)
        columns.append(ended)
    return torch.stack(columns, dim=1)


def _judge_text(labels: torch.Tensor, answer: torch.Tensor, logits: torch.Tensor, *, greedy: bool) -> Judged:
    """`labels` and `answer` [positions] hold IGNORED where a token does not count, `logits` [positions, vocabulary]."""
    counted, asked = labels != IGNORED, answer != IGNORED
    loss, items = _token_loss(logits[counted].float(), labels[counted])
    same = bool((logits[asked].argmax(-1) == answer[asked]).all()) if greedy else None
    return loss, items, None, same


def _judge_pairs(engine: Engine, objective: Preference, batch: Batch) -> list[Judged]:
    """Each pair's loss, and the rewards of its chosen and its rejected answer."""
    losses, ratios = objective.losses_and_ratios(engine.no_grad_forward(batch), batch)
    rewards = (objective.beta * ratios).tolist()
    return [(loss, 1, *pair) for loss, pair in zip(losses.tolist(), rewards, strict=True)]


def _judge_class(logits: torch.Tensor, label: torch.Tensor) -> Judged:
    loss = F.cross_entropy(logits, label).item()
    return loss, 1, int(label), int(logits.argmax())


def _judge_number(logits: torch.Tensor, label: torch.Tensor) -> Judged:
    guess = logits.squeeze(-1).item()
    return (guess - float(label)) ** 2, 1, float(label), guess


def _judge_tags(logits: torch.Tensor, labels: torch.Tensor) -> Judged:
    tagged = labels != IGNORED
    loss, items = _token_loss(logits[tagged], labels[tagged])
    return loss, items, labels[tagged].tolist(), logits[tagged].argmax(-1).tolist()


def _token_loss(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, int]:
    """Sum in float64 of the tokens' fp32 losses, and their number; logits [items, vocabulary], labels [items]."""
    return F.cross_entropy(logits, labels, reduction="none").double().sum().item(), len(labels)


_JUDGES: dict[str, Callable[[torch.Tensor, torch.Tensor], Judged]] = {
    "classification": _judge_class,
    "tokens": _judge_tags,
}


# -- from generated text -------------------------------------------------------------------------------------------


def _generate_all(engine: Engine, task_data: TaskData, size: int, max_new_tokens: int) -> list[str]:
    """The model's answer to every prompt, greedy."""
    prompts = task_data.prompts
    assert prompts is not None
    tokenizer, fill = task_data.tokenizer, pad_id(task_data.tokenizer)

    def run(chosen: np.ndarray) -> list[str]:
        # a decoder continues at its last position: padding goes to the left
        batch: Batch = pad_inputs(
            [prompts.input_ids[index] for index in chosen.tolist()], fill, left=not prompts.encoder
        )
        ids = engine.generate(batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=fill)
        answers = ids if prompts.encoder else ids[:, batch["input_ids"].shape[1] :]
        return tokenizer.batch_decode(answers.cpu(), skip_special_tokens=True)

    lengths = np.asarray([len(ids) for ids in prompts.input_ids])
    return over_all(engine, lengths, size, run)
