"""Metrics: each against figures worked out by hand or the definition written out again."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from dsfreeze import metrics
from dsfreeze.errors import UserError
from dsfreeze.metrics import Outcome


def near(expected: dict[str, float]) -> Any:
    return pytest.approx(expected, abs=1e-12)


def test_classes() -> None:
    """Oracle: by hand. Two classes: 2 hits, 1 false alarm, 1 miss, 2 right rejections."""
    two = Outcome(0.0, truth=[1, 1, 1, 0, 0, 0], guess=[1, 1, 0, 1, 0, 0], labels=("no", "yes"))
    assert metrics.accuracy(two) == near({"accuracy": 4 / 6})
    assert metrics.f1(two) == near({"f1": 2 / 3})
    assert metrics.matthews(two) == near({"matthews": (2 * 2 - 1 * 1) / 9})
    three = Outcome(0.0, truth=[0, 1, 2, 2], guess=[0, 2, 2, 2], labels=("a", "b", "c"))
    assert metrics.f1(three) == near({"f1": (1 + 0 + 4 / 5) / 3})
    assert metrics.f1_macro(three) == near({"f1_macro": (1 + 0 + 4 / 5) / 3})
    assert metrics.f1_macro(two)["f1_macro"] == pytest.approx(2 / 3)


def test_one_class_alone_has_no_correlation() -> None:
    assert metrics.matthews(Outcome(0.0, truth=[0, 1], guess=[1, 1], labels=("a", "b"))) == {"matthews": 0.0}
    assert metrics.pearson(Outcome(0.0, truth=[1.0, 2.0], guess=[3.0, 3.0])) == {"pearson": 0.0}


def test_correlations() -> None:
    """Oracle: the definitions. Ranks of guess are 1 2 4 3, so rho = 1 - 6 x 2 / (4 x 15)."""
    outcome = Outcome(0.0, truth=[1.0, 2.0, 3.0, 4.0], guess=[1.0, 2.0, 9.0, 5.0])
    assert metrics.spearman(outcome) == near({"spearman": 1 - 12 / 60})
    x, y = [-1.5, -0.5, 0.5, 1.5], [-3.25, -2.25, 4.75, 0.75]
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    expected = dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
    assert metrics.pearson(outcome) == near({"pearson": expected})


def test_perplexity() -> None:
    assert metrics.perplexity(Outcome(math.log(7))) == near({"perplexity": 7.0})
    assert metrics.perplexity(Outcome(1e4)) == {"perplexity": math.inf}


@pytest.mark.parametrize(
    ("tags", "truth", "guess"),
    [
        # truth: PER(0-1), LOC(3); guess: PER(0-1), LOC(2-3) wrong
        (("O", "B-PER", "I-PER", "B-LOC", "I-LOC"), [1, 2, 0, 3], [1, 2, 3, 4]),
        (("O", "B-PER", "E-PER", "S-LOC", "B-LOC", "E-LOC"), [1, 2, 0, 3], [1, 2, 4, 5]),
    ],
    ids=["BIO", "BIOES"],
)
def test_entities_count_whole(tags: tuple[str, ...], truth: list[int], guess: list[int]) -> None:
    """Oracle: by hand; over two rows: three true entities, three guessed, two right."""
    per = truth[:2]
    outcome = Outcome(0.0, truth=[truth, per], guess=[guess, per], labels=tags)
    assert metrics.entity_f1(outcome) == near({"entity_precision": 2 / 3, "entity_recall": 2 / 3, "entity_f1": 2 / 3})
    assert metrics.accuracy(outcome) == near({"accuracy": 4 / 6})


def test_no_entity_guessed_is_zero_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    outcome = Outcome(0.0, truth=[[1]], guess=[[0]], labels=("O", "B-PER"))
    assert metrics.entity_f1(outcome)["entity_f1"] == 0.0
    assert not recwarn.list


def test_text_metrics() -> None:
    """Oracle: by hand. ROUGE-1 of 'the cat sat' in 'the cat': precision 1, recall 2/3. BLEU of equal texts is 100."""
    short = Outcome(0.0, texts=["the cat"], references=["the cat sat"])
    assert metrics.rouge(short) == near({"rouge1": 0.8, "rouge2": 2 / 3, "rougeL": 0.8})
    texts = ["The quick brown fox jumps.", "Over the lazy dog it goes."]
    assert metrics.bleu(Outcome(0.0, texts=texts, references=texts))["bleu"] == pytest.approx(100.0)
    assert metrics.bleu(Outcome(0.0, texts=texts[::-1], references=texts))["bleu"] < 10


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        (" yes\n", "yes", True),
        ("Yes", "yes", False),
        ("so 6 x 7 = 42\n#### 42", "six by seven\n#### 42", True),
        ("#### 1,234", "#### 1234", True),
        ("#### $18.00", "#### 18", True),
        ("#### -3", "#### 3", False),
        ("the answer is 42", "#### 42", False),
        ("#### 42 #### 7", "#### 42", True),
    ],
)
def test_exact_match_and_final_answers(text: str, reference: str, right: bool) -> None:
    """Oracle: the rule of openai/grade-school-math: the number behind ####, commas removed."""
    assert metrics.exact_match(Outcome(0.0, texts=[text], references=[reference])) == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("task", "num_labels", "labels", "expected"),
    [
        ("classification", 3, ("a", "b", "c"), ("accuracy", "f1")),
        ("classification", 1, None, ("pearson", "spearman")),
        ("tokens", 2, ("O", "B-X"), ("entity_f1", "accuracy")),
        ("tokens", 2, ("NOUN", "VERB"), ("accuracy", "f1")),
        ("causal_lm", None, None, ("perplexity",)),
        ("sft", None, None, ("perplexity",)),
        ("seq2seq", None, None, ("perplexity",)),
    ],
)
def test_every_task_has_its_own(task: str, num_labels: int, labels: Any, expected: tuple[str, ...]) -> None:
    data: Any = SimpleNamespace(task=task, num_labels=num_labels, labels=labels)
    assert metrics.choose(data, None) == expected
    for name in expected:
        assert metrics.choose(data, [name]) == (name,)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("rogue", "'rogue' does not exist.*Did you mean 'rouge'"),
        ("accuracy", "'accuracy' is not for this task.*Valid: "),
    ],
)
def test_unknown_and_unfit_names(named: str, message: str) -> None:
    data: Any = SimpleNamespace(task="sft", num_labels=None, labels=None)
    with pytest.raises(UserError, match=message):
        metrics.choose(data, [named])
