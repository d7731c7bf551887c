"""The generated inference set: balance, disjoint splits, and nothing that single words give away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
from scipy.sparse import hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from dsfreeze.data import nli
from dsfreeze.data.nli_words import ADJECTIVES, NUMBERS


@pytest.fixture(scope="module")
def splits() -> dict[str, list[nli.Row]]:
    return nli.generate()


def test_same_rows_at_every_call(splits: dict[str, list[nli.Row]]) -> None:
    """Oracle: equality with itself, and difference with another seed."""
    assert nli.generate() == splits
    assert nli.generate(seed=1)["eval"] != splits["eval"]


@pytest.mark.parametrize(("split", "size"), [("train", 4000), ("eval", 1000)])
def test_sizes_and_balance(splits: dict[str, list[nli.Row]], split: str, size: int) -> None:
    """Oracle: counts that differ by one at most where the size does not divide."""
    rows = splits[split]
    assert len(rows) == size
    labels = Counter(row["label"] for row in rows)
    assert set(labels) == {0, 1, 2}
    assert max(labels.values()) - min(labels.values()) <= 1
    assert set(Counter(row["phenomenon"] for row in rows).values()) == {size // 5}


def test_no_pair_twice_and_no_sentence_in_both_splits(splits: dict[str, list[nli.Row]]) -> None:
    pairs = [(row["premise"], row["hypothesis"]) for rows in splits.values() for row in rows]
    assert len(set(pairs)) == len(pairs)
    assert all(premise != hypothesis for premise, hypothesis in pairs)
    train, held_out = (
        {str(row[side]) for row in splits[split] for side in ("premise", "hypothesis")} for split in ("train", "eval")
    )
    assert not train & held_out


def test_sentences_are_short_and_written_as_sentences(splits: dict[str, list[nli.Row]]) -> None:
    for row in splits["train"]:
        for side in ("premise", "hypothesis"):
            sentence = str(row[side])
            assert 3 <= len(sentence.split()) <= 12, sentence
            assert sentence[0].isupper(), sentence
            assert sentence.endswith("."), sentence
            assert "  " not in sentence, sentence
            assert "'" not in sentence, sentence


@pytest.mark.parametrize("sides", [("premise", "hypothesis"), ("hypothesis",), ("premise",)])
def test_words_do_not_give_the_label_away(splits: dict[str, list[nli.Row]], sides: tuple[str, ...]) -> None:
    """Oracle: logistic regression on one- and two-word counts; chance is 33 %, the requirement 55 %, we hold 40 %."""
    vectorizers = [CountVectorizer(ngram_range=(1, 2)) for _ in sides]

    def columns(split: str, method: str) -> list:
        return [
            getattr(v, method)([row[side] for row in splits[split]]) for v, side in zip(vectorizers, sides, strict=True)
        ]

    inputs, held_out = hstack(columns("train", "fit_transform")), hstack(columns("eval", "transform"))
    model = LogisticRegression(max_iter=300, C=0.3).fit(inputs.tocsr(), [row["label"] for row in splits["train"]])
    assert model.score(held_out.tocsr(), [row["label"] for row in splits["eval"]]) < 0.40


def _words(sentence: str) -> list[str]:
    """Lower-case words without adjectives."""
    return [word for word in sentence.rstrip(".").lower().split() if word not in ADJECTIVES]


def _by_arithmetic(premise: str, hypothesis: str) -> int:
    p, h = _words(premise), _words(hypothesis)
    assert p[0] == "exactly"
    rest = h[2:] if h[0] == "exactly" else h[3:]
    if rest != p[2:]:
        return 1
    count, bound = int(p[1]) - 2, NUMBERS.index(h[1] if h[0] == "exactly" else h[2])
    return 0 if {"exactly": count == bound, "more": count > bound, "fewer": count < bound}[h[0]] else 2


def _who_did_what(sentence: str) -> tuple[bool, tuple[str, ...]]:
    """Whether it is said or denied, and (doer, verb's first letters, other)."""
    words = [word for word in _words(sentence) if word not in ("the", "did", "was")]
    said = "not" not in words
    first, verb, *by, last = [word for word in words if word != "not"]
    return said, (last, verb[:3], first) if by else (first, verb[:3], last)


def _by_roles(premise: str, hypothesis: str) -> int:
    (said, event), (says, other) = _who_did_what(premise), _who_did_what(hypothesis)
    return 1 if event != other else 0 if said == says else 2


@pytest.mark.parametrize(("phenomenon", "reading"), [("numbers", _by_arithmetic), ("passive", _by_roles)])
def test_labels_agree_with_another_reading(
    splits: dict[str, list[nli.Row]], phenomenon: str, reading: Callable[[str, str], int]
) -> None:
    """Oracle: a second program that reads the sentences themselves."""
    rows = [row for row in splits["train"] if row["phenomenon"] == phenomenon]
    assert [reading(str(row["premise"]), str(row["hypothesis"])) for row in rows] == [row["label"] for row in rows]


@pytest.mark.parametrize("tables", [nli.POLAR, (nli.QUANTIFIERS,), nli.MEMBERS])
def test_tables_meet_every_label_equally_often(tables: tuple[nli.Table, ...]) -> None:
    """Oracle: counting. Each premise form and each hypothesis form has its three labels equally often."""
    for table in tables:
        table = nli._both_ways(table)
        for columns in table.values():
            assert len({len(column) for column in columns}) == 1
        by_hypothesis: dict[str, Counter[int]] = {}
        for columns in table.values():
            for label, others in enumerate(columns):
                for other in others:
                    by_hypothesis.setdefault(other, Counter())[label] += 1
        for form, counts in by_hypothesis.items():
            assert len({counts[label] for label in range(3)}) == 1, (form, counts)


def test_quantifiers_are_labelled_by_counting_people() -> None:
    """Oracle: two people in each of two places, any number of them doing it: what holds in every, no or some case."""

    def holds(form: str, doing: int) -> bool:
        return {"all": doing == 2, "some": doing > 0, "none": doing == 0}[form]

    for premise, columns in nli.QUANTIFIERS.items():
        for label, others in enumerate(columns):
            for other in others:
                possible = [doing for doing in range(3) if holds(premise, doing)]
                judged = range(3) if other.endswith("'") else possible
                truths = {holds(other.removesuffix("'"), doing) for doing in judged}
                assert truths == [{True}, {True, False}, {False}][label], (premise, other)


def test_members_and_kinds_are_labelled_by_sets() -> None:
    """Oracle: the events of a member, of another member, of neither: what holds in every, no or some case."""
    worlds = [set(), {"m"}, {"other"}, {"m", "other"}]

    def holds(form: str, world: set[str]) -> bool:
        happened = bool(world) if form[1] == "K" else "m" in world
        return happened == (form[0] == "+")

    for table in nli.MEMBERS:
        for premise, columns in table.items():
            for label, others in enumerate(columns):
                for other in others:
                    possible = [world for world in worlds if holds(premise, world)]
                    judged = worlds if other.endswith("'") else possible
                    truths = {holds(other.removesuffix("'"), world) for world in judged}
                    assert truths == [{True}, {True, False}, {False}][label], (premise, other)
