"""Metrics of generated text. Oracles: published examples, and counts by hand."""

from __future__ import annotations

import pytest

from dsfreeze import metrics
from dsfreeze.metrics import Outcome
from dsfreeze.text_metrics import edit_similarity, same_first_character, same_text, sari

SPECIES = "About 95 species are currently accepted."
REFERENCES = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]


def test_sari_is_the_published_example():
    """The value in the cards of `evaluate` and of EASSE."""
    assert sari(SPECIES, "About 95 you now get in.", REFERENCES) == pytest.approx(26.953601953601954)


def test_sari_at_its_ends():
    """The reference itself scores 100. Nothing kept, nothing added, all dropped: by hand, for one word against another, keep is 0/1 of
    0/0 recall ..., so only an empty answer is told to be 0."""
    assert sari(SPECIES, REFERENCES[0], REFERENCES[:1]) == pytest.approx(100)
    assert sari(SPECIES, " ", REFERENCES) == 0


def test_sari_by_hand():
    """Source `a b`, text `a c`, reference `a d`. Unigrams: keep F 1 (a of a); deleted b, rightly: 1; added c, wrongly: 0. Bigrams:
    kept none of none: 1; deleted `a b`: 1; added `a c`, wrongly: 0. No longer n-grams: 1, 1, 1."""
    assert sari("a b", "a c", ["a d"]) == pytest.approx(100 * (4 / 4 + 4 / 4 + 2 / 4) / 3)


@pytest.mark.parametrize(("text", "reference", "value"), [
    ("abcd", "abcd", 100), ("", "abcd", 0), ("abcd", "", 0), ("abcd", "bcde", 75), ("a", "b", 0),
    ("this is a test", "this is a test!", 97),  # fuzzywuzzy's own example
    ("x = 0", "x = <NUM_LIT>", 100), ("f(a)", "f(<STR_LIT>a)", 100), ("5", "<NUM_LIT:5>", 100),
])  # fmt: skip
def test_edit_similarity(text, reference, value):
    assert edit_similarity(text, reference) == value


@pytest.mark.parametrize(("text", "reference", "first", "strict"), [
    ("A", "A", True, True), ("A. because", "A", True, False), ("B", "A", False, False), ("", "A", False, False),
    (" A", "A", False, False), ("A ", "A", True, False), ("", "", False, False),
])  # fmt: skip
def test_first_character_and_strict_match(text, reference, first, strict):
    assert same_first_character(text, reference) is first
    assert same_text(text, reference) is strict


OUTCOME = Outcome(loss=1.0, texts=["A", "", "the cat"], references=["A", "B", "the dog"], sources=["q", "r", "s"])


@pytest.mark.parametrize(("name", "value"), [
    ("strict_match", 1 / 3), ("first_char", 2 / 3), ("edit_similarity", (100 + 0 + 57) / 3), ("rouge_l", (1 + 0 + 1 / 2) / 3),
    ("sari", (sari("q", "A", ["A"]) + 0 + sari("s", "the cat", ["the dog"])) / 3),
])  # fmt: skip
def test_means_over_answers(name, value):
    """An empty answer counts in the denominator."""
    assert metrics.compute([name], OUTCOME)[name] == pytest.approx(value)


@pytest.mark.parametrize(("name", "numbers", "score"), [
    ("accuracy", {"accuracy": 0.5}, 50), ("bleu", {"bleu": 30.0}, 30), ("sari", {"sari": 40.0}, 40), ("rouge", {"rouge1": 0.9, "rougeL": 0.2}, 20),
    ("perplexity", {"perplexity": 4.0}, 25), ("perplexity", {"perplexity": float("inf")}, 0), ("edit_similarity", {"edit_similarity": 71.0}, 71),
])  # fmt: skip
def test_scores_run_from_0_to_100(name, numbers, score):
    assert metrics.score(name, numbers) == pytest.approx(score)


def test_every_metric_has_a_score():
    """Of a perfect answer: 100, but for correlations' constants and what needs logits."""
    perfect = Outcome(loss=0.0, texts=["a b c d e"], references=["a b c d e"], sources=["x"])
    for name, metric in metrics.METRICS.items():
        if metric.generates or name == "perplexity":
            assert metrics.score(name, metrics.compute([name], perfect)) == pytest.approx(100), name
