"""What an evaluation reports: each metric turns the predictions of the whole set into named numbers.

The arithmetic is scikit-learn's, scipy's, seqeval's, sacrebleu's and rouge-score's; they are imported when used.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsfreeze import text_metrics
from dsfreeze.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from dsfreeze.data.examples import TaskData

Numbers = dict[str, float]


@dataclass(frozen=True)
class Outcome:
    """What the model made of the evaluation data; which of the fields are filled depends on the task.

    loss           mean of the model's own loss per item, in nats (squared error for a regression)
    labels         class names, for classes and tags
    truth, guess   one class index, number, or list of tag indices per example; the rewards of a pair's chosen and rejected
                   answer; of a text the guess alone, whether greedy decoding would give it
    sources        what each text is an answer to
    """

    loss: float
    truth: Sequence = ()
    guess: Sequence = ()
    labels: Sequence[str] = ()
    texts: Sequence[str] = ()
    references: Sequence[str] = ()
    sources: Sequence[str] = ()


@dataclass(frozen=True)
class Metric:
    """A function of the outcome, the kinds of task it is for, and whether it needs generated text.

    `headline`: which of its numbers stands for it, where it is not the metric's own name; `full`: the value of a perfect answer.
    """

    compute: Callable[[Outcome], Numbers]
    kinds: tuple[str, ...]
    generates: bool = False
    headline: str | None = None
    full: float = 1.0


def _flat(outcome: Outcome) -> tuple[list[int], list[int]]:
    """Truth and guess as one list each: tags of all rows, or the classes themselves."""
    if outcome.truth and isinstance(outcome.truth[0], list):
        return [tag for row in outcome.truth for tag in row], [tag for row in outcome.guess for tag in row]
    return list(outcome.truth), list(outcome.guess)


def accuracy(outcome: Outcome) -> Numbers:
    """Share of examples (or of tagged words) that are right."""
    from sklearn.metrics import accuracy_score

    return {"accuracy": float(accuracy_score(*_flat(outcome)))}


def f1(outcome: Outcome) -> Numbers:
    """F1 of class 1 when there are two classes, else the mean over classes (macro)."""
    from sklearn.metrics import f1_score

    if len(outcome.labels) != 2:
        return {"f1": f1_macro(outcome)["f1_macro"]}
    return {"f1": float(f1_score(*_flat(outcome), average="binary", pos_label=1, zero_division=0.0))}


def f1_macro(outcome: Outcome) -> Numbers:
    """Unweighted mean of the classes' F1, over the classes that occur in truth or guess."""
    from sklearn.metrics import f1_score

    return {"f1_macro": float(f1_score(*_flat(outcome), average="macro", zero_division=0.0))}


def matthews(outcome: Outcome) -> Numbers:
    """Matthews correlation (CoLA's); 0 when one class alone is guessed."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": float(matthews_corrcoef(*_flat(outcome)))}


def pearson(outcome: Outcome) -> Numbers:
    """Linear correlation of guess and truth; 0 when either is constant, where it has no value."""
    from scipy.stats import pearsonr

    return {"pearson": _correlation(pearsonr, outcome)}


def spearman(outcome: Outcome) -> Numbers:
    """Rank correlation of guess and truth; 0 when either is constant, where it has no value."""
    from scipy.stats import spearmanr

    return {"spearman": _correlation(spearmanr, outcome)}


def _correlation(function: Callable, outcome: Outcome) -> float:
    if len(set(outcome.truth)) < 2 or len(set(outcome.guess)) < 2:
        return 0.0
    return float(function(outcome.guess, outcome.truth).statistic)


def perplexity(outcome: Outcome) -> Numbers:
    """exp of the loss per token; infinite beyond what a float holds."""
    return {"perplexity": math.exp(outcome.loss) if outcome.loss < 700 else math.inf}


def entity_f1(outcome: Outcome) -> Numbers:
    """Micro precision, recall and F1 of whole entities (conlleval's reading of BIO, IOB and BIOES tags)."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    truth, guess = ([[outcome.labels[tag] for tag in row] for row in rows] for rows in (outcome.truth, outcome.guess))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no entity guessed: seqeval warns of the 0 that we report
        return {
            "entity_precision": float(precision_score(truth, guess)),
            "entity_recall": float(recall_score(truth, guess)),
            "entity_f1": float(f1_score(truth, guess)),
        }


def rouge(outcome: Outcome) -> Numbers:
    """Mean F of ROUGE-1, -2, -L (sentence level), with stemming, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(kinds, use_stemmer=True)
    scores = [scorer.score(ref, text) for ref, text in zip(outcome.references, outcome.texts, strict=True)]
    return {kind: math.fsum(score[kind].fmeasure for score in scores) / max(len(scores), 1) for kind in kinds}


def bleu(outcome: Outcome) -> Numbers:
    """Corpus BLEU as sacrebleu defines it (tokenisation 13a), 0 to 100."""
    from sacrebleu import corpus_bleu

    return {"bleu": float(corpus_bleu(list(outcome.texts), [list(outcome.references)]).score)}


def exact_match(outcome: Outcome) -> Numbers:
    """Share of answers equal to the reference, white space at the ends aside.

    Where the reference ends in `#### n` (GSM8K), the numbers after that mark are compared; an answer without the mark
    is wrong.
    """
    pairs = zip(outcome.texts, outcome.references, strict=True)
    return {"exact_match": sum(_matches(text, ref) for text, ref in pairs) / max(len(outcome.references), 1)}


def greedy_match(outcome: Outcome) -> Numbers:
    """Share of answers that greedy decoding would give token for token, end included, from the loss's own forward pass: nothing is
    generated (`is_greedy` of EleutherAI's lm-eval). An answer cut at data.max_length counts by what is left of it."""
    return {"greedy_match": sum(outcome.guess) / max(len(outcome.guess), 1)}


def strict_match(outcome: Outcome) -> Numbers:
    """Share of answers equal to the reference to the last blank (TRACE's accuracy)."""
    return {"strict_match": _mean_of(text_metrics.same_text, outcome)}


def first_char(outcome: Outcome) -> Numbers:
    """Share of answers that begin with the reference's first character (TRACE's ScienceQA)."""
    return {"first_char": _mean_of(text_metrics.same_first_character, outcome)}


def edit_similarity(outcome: Outcome) -> Numbers:
    """Mean of fuzzywuzzy's ratio by difflib, 0 to 100 (TRACE's Py150)."""
    return {"edit_similarity": _mean_of(text_metrics.edit_similarity, outcome)}


def rouge_l(outcome: Outcome) -> Numbers:
    """Mean F of ROUGE-L by rouge-score without stemming, 0 to 1. TRACE takes the package `rouge`, which splits at blanks and dots."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return {"rouge_l": _mean_of(lambda text, ref: scorer.score(ref, text)["rougeL"].fmeasure, outcome)}


def sari(outcome: Outcome) -> Numbers:
    """Mean SARI of texts against their sources and references, 0 to 100 (TRACE's 20Minuten)."""
    triples = zip(outcome.sources, outcome.texts, outcome.references, strict=True)
    return {"sari": text_metrics.mean(text_metrics.sari(source, text, [ref]) for source, text, ref in triples)}


def _mean_of(score: Callable[[str, str], float], outcome: Outcome) -> float:
    return text_metrics.mean(score(text, ref) for text, ref in zip(outcome.texts, outcome.references, strict=True))


FINAL_ANSWER = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")  # as in openai/grade-school-math, dollar sign allowed


def final_answer(text: str) -> float | None:
    """The number after `####`, commas removed; None without one."""
    found = FINAL_ANSWER.search(text)
    return float(found.group(1).replace(",", "")) if found else None


def _matches(text: str, reference: str) -> bool:
    wanted = final_answer(reference)
    return text.strip() == reference.strip() if wanted is None else final_answer(text) == wanted


def reward_accuracy(outcome: Outcome) -> Numbers:
    """Share of the pairs whose chosen answer has the higher reward; equal ones, as before the first step, do not count."""
    right = sum(chosen > rejected for chosen, rejected in zip(outcome.truth, outcome.guess, strict=True))
    return {"reward_accuracy": right / max(len(outcome.truth), 1)}


def reward_margin(outcome: Outcome) -> Numbers:
    """Mean of the chosen answer's reward minus the rejected one's."""
    margins = (chosen - rejected for chosen, rejected in zip(outcome.truth, outcome.guess, strict=True))
    return {"reward_margin": math.fsum(margins) / max(len(outcome.truth), 1)}


def rewards(outcome: Outcome) -> Numbers:
    """Mean reward of the chosen answers, and of the rejected ones."""
    pairs = {"reward_chosen": outcome.truth, "reward_rejected": outcome.guess}
    return {name: math.fsum(values) / max(len(values), 1) for name, values in pairs.items()}


CLASSES, NUMBER, TAGS, TEXT, ANSWERS, PAIRS = "classes", "number", "tags", "text", "answers", "pairs"

METRICS = {
    "accuracy": Metric(accuracy, (CLASSES, TAGS)),
    "f1": Metric(f1, (CLASSES, TAGS)),
    "f1_macro": Metric(f1_macro, (CLASSES, TAGS)),
    "matthews": Metric(matthews, (CLASSES,)),
    "pearson": Metric(pearson, (NUMBER,)),
    "spearman": Metric(spearman, (NUMBER,)),
    "entity_f1": Metric(entity_f1, (TAGS,)),
    "perplexity": Metric(perplexity, (TEXT, ANSWERS)),
    "reward_accuracy": Metric(reward_accuracy, (PAIRS,)),
    "reward_margin": Metric(reward_margin, (PAIRS,)),
    "rewards": Metric(rewards, (PAIRS,)),
    "greedy_match": Metric(greedy_match, (ANSWERS,)),
    "rouge": Metric(rouge, (ANSWERS,), generates=True, headline="rougeL"),
    "bleu": Metric(bleu, (ANSWERS,), generates=True, full=100.0),
    "exact_match": Metric(exact_match, (ANSWERS,), generates=True),
    "strict_match": Metric(strict_match, (ANSWERS,), generates=True),
    "first_char": Metric(first_char, (ANSWERS,), generates=True),
    "rouge_l": Metric(rouge_l, (ANSWERS,), generates=True),
    "edit_similarity": Metric(edit_similarity, (ANSWERS,), generates=True, full=100.0),
    "sari": Metric(sari, (ANSWERS,), generates=True, full=100.0),
}

DEFAULTS = {
    CLASSES: ("accuracy", "f1"),
    NUMBER: ("pearson", "spearman"),
    TAGS: ("entity_f1", "accuracy"),
    TEXT: ("perplexity",),
    PAIRS: ("reward_accuracy", "reward_margin", "rewards"),
    ANSWERS: (
        "perplexity",
    ),  # generation takes long: name bleu, rouge or exact_match to have it; greedy_match takes none
}


def kind_of(task: str, num_labels: int | None) -> str:
    """What a task's predictions are: classes, number, tags, text (no prompt and answer), pairs of answers, or answers."""
    if task == "classification":
        return NUMBER if num_labels == 1 else CLASSES
    return {"tokens": TAGS, "causal_lm": TEXT, "preference": PAIRS}.get(task, ANSWERS)


def choose(task_data: TaskData, named: Sequence[str] | None) -> tuple[str, ...]:
    """The recipe's metrics, checked against the task, or the task's own. Tags that are no BIO tags make no entities."""
    kind = kind_of(task_data.task, task_data.num_labels)
    valid = [name for name, metric in METRICS.items() if kind in metric.kinds]
    if named is not None:
        for name in named:
            if name not in valid:
                known = "is not for this task" if name in METRICS else "does not exist"
                raise UserError(f"data.metrics: '{name}' {known}.{did_you_mean(name, valid)}")
        return tuple(named)
    if kind == TAGS and not any(label.startswith("B-") for label in task_data.labels or ()):
        return ("accuracy", "f1")
    return DEFAULTS[kind]


def generates(names: Sequence[str] | None) -> bool:
    """Whether one of these metrics is of generated text."""
    return any(METRICS[name].generates for name in names or () if name in METRICS)


def compute(names: Sequence[str], outcome: Outcome) -> Numbers:
    """`loss` and the named metrics, in that order."""
    numbers = {"loss": outcome.loss}
    for name in names:
        numbers |= METRICS[name].compute(outcome)
    return numbers


def score(name: str, numbers: Mapping[str, float]) -> float:
    """A metric's value from 0 to 100, higher is better, so that tasks can be averaged.

    Perplexity becomes 100 / perplexity: the geometric mean of the tokens' probabilities, in percent.
    """
    if name == "perplexity":
        return 100 / numbers["perplexity"]
    metric = METRICS[name]
    return 100 * numbers[metric.headline or name] / metric.full
