"""The generated inference set: balance, disjoint splits, and nothing that single words give away."""

from __future__ import annotations

from collections import Counter

import pytest
from scipy.sparse import hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from dsfreeze.data import nli


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
            assert 3 <= len(sentence.split()) <= 14, sentence
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


def _relation(premise: str, hypothesis: str) -> int | None:
    """The label by a second, independent reading of sentences about exact numbers; None where it does not apply."""
    p, h = (sentence.rstrip(".").split() for sentence in (premise, hypothesis))
    p = p[1:] if p[0] in ("Today", "Luckily", "Clearly") else p
    if p[0].lower() != "exactly":
        return None
    rest = h[2:] if h[0] == "Exactly" else h[3:]
    if rest != p[2:]:
        return 1
    count, bound = nli.NUMBERS.index(p[1]), nli.NUMBERS.index(h[1] if h[0] == "Exactly" else h[2])
    holds = {"Exactly": count == bound, "More": count > bound, "Fewer": count < bound}[h[0]]
    return 0 if holds else 2


def test_numbers_are_labelled_by_arithmetic(splits: dict[str, list[nli.Row]]) -> None:
    rows = [row for row in splits["train"] if row["phenomenon"] == "numbers"]
    assert [_relation(str(row["premise"]), str(row["hypothesis"])) for row in rows] == [row["label"] for row in rows]


@pytest.mark.parametrize("tables", [nli.POLAR, nli.SQUARE, nli.MEMBERS])
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


def _square_truth(form: str, doing: int, people: int) -> bool:
    return {
        "all": doing == people, "some": doing > 0, "none": doing == 0, "not all": doing < people,
    }[form]  # fmt: skip


def test_the_square_is_labelled_by_counting_people() -> None:
    """Oracle: two people in each of two places, any number of them doing it: what holds in every, no or some case."""
    for table in nli.SQUARE:
        for premise, columns in table.items():
            for label, others in enumerate(columns):
                for other in others:
                    here = [n for n in range(3) if _square_truth(premise, n, 2)]
                    elsewhere = range(3) if other.endswith("'") else None
                    worlds = [m for n in here for m in (elsewhere if elsewhere is not None else [n])]
                    truths = {_square_truth(other.removesuffix("'"), m, 2) for m in worlds}
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
