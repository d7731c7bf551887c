"""`builtin:nli`: a generated set of premise and hypothesis pairs, the same at every call.

Five phenomena, equally often: negation, quantifiers, hypernyms, numbers, passive voice. Each is a table of forms: a
premise's, a hypothesis's, and what follows. The tables are balanced: every form of a premise, and every form of a
hypothesis, meets the three labels equally often, about the same people and things. So no word gives the label away, of
either sentence; only how the two relate does. (A form that ends in ' is about something else.)

Evaluation sentences, premises and hypotheses both, never occur in training.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from dsfreeze.data.nli_words import (
    ACTIVITIES,
    ADJECTIVES,
    DEEDS,
    FEW,
    HANDLINGS,
    KINDS,
    MANY,
    MIDDLE,
    NUMBERS,
    PEOPLE,
)  # fmt: skip

LABELS = ("entailment", "neutral", "contradiction")
Row = dict[str, str | int]
Pair = tuple[str, str, int]
#: Lines of: premise form, then the hypothesis forms that it entails, leaves open, contradicts.
Table = Mapping[str, tuple[Sequence[str], Sequence[str], Sequence[str]]]

#: Something said or denied (+ -) of one or of another (').
POLAR: tuple[Table, ...] = (
    {
        "+": (["+"], ["+'"], ["-"]),
        "-": (["-"], ["-'"], ["+"]),
    },
    {
        "+": (["+"], ["-'"], ["-"]),
        "-": (["-"], ["+'"], ["+"]),
    },
)

#: Quantifiers, there being some of the kind in both places.
QUANTIFIERS: Table = {
    "all": (["all", "some"], ["some'", "none'"], ["none", "none"]),
    "some": (["some"], ["all"], ["none"]),
    "none": (["none", "none", "none"], ["some'", "none'", "none'"], ["all", "some", "some"]),
}

#: A member (m) of a kind (K), said or denied.
MEMBERS: tuple[Table, ...] = (
    {
        "+m": (["+m", "+K"], ["+K'", "-m'"], ["-m", "-m"]),
        "+K": (["+K"], ["+m"], ["-K"]),
        "-m": (["-m"], ["-K"], ["+m"]),
        "-K": (["-K", "-m"], ["+K'", "-m'"], ["+K", "+K"]),
    },
    {
        "+m": (["+m", "+K"], ["+K'", "-m'"], ["-m", "-K"]),
        "+K": (["+K"], ["+m"], ["-K"]),
        "-m": (["-m"], ["-K"], ["+m"]),
        "-K": (["-K", "-K"], ["+K'", "-K'"], ["+K", "+K"]),
    },
    {
        "+m": (["+m", "+m"], ["+K'", "-m'"], ["-m", "-m"]),
        "+K": (["+K"], ["+m"], ["-K"]),
        "-m": (["-m"], ["-K"], ["+m"]),
        "-K": (["-K", "-m"], ["+m'", "-m'"], ["+K", "+m"]),
    },
)


def generate(num_train: int = 4000, num_eval: int = 1000, seed: int = 0) -> dict[str, list[Row]]:
    """Rows under "train" and "eval": premise, hypothesis, label (an index into LABELS), phenomenon.

    Labels and phenomena are as balanced as the sizes allow.
    """
    rng = random.Random(seed)
    splits: dict[str, list[Row]] = {"eval": [], "train": []}
    for number, (phenomenon, block) in enumerate(PHENOMENA.items()):
        fresh = _fresh_blocks(block, rng)
        for split, size in (("eval", num_eval), ("train", num_train)):
            share = size // len(PHENOMENA) + (number < size % len(PHENOMENA))
            quota = [share // 3 + ((label - number) % 3 < share % 3) for label in range(3)]
            for premise, hypothesis, label in _fill(fresh, quota):
                splits[split].append(
                    {"premise": premise, "hypothesis": hypothesis, "label": label, "phenomenon": phenomenon}
                )
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def _fresh_blocks(block: Callable[[random.Random], list[Pair]], rng: random.Random) -> Iterator[list[Pair]]:
    """Blocks of pairs that share no sentence with an earlier block."""
    seen: set[str] = set()
    while True:
        pairs = block(rng)
        sentences = {sentence for pair in pairs for sentence in pair[:2]}
        if not sentences & seen:
            seen |= sentences
            yield pairs


def _fill(blocks: Iterator[list[Pair]], quota: Sequence[int]) -> list[Pair]:
    """Pairs, none twice and none of a sentence with itself, until every label has its quota."""
    chosen: dict[tuple[str, str], Pair] = {}
    have: Counter[int] = Counter()
    while any(have[label] < quota[label] for label in range(3)):
        for pair in next(blocks):
            if have[pair[2]] < quota[pair[2]] and pair[:2] not in chosen and pair[0] != pair[1]:
                chosen[pair[:2]] = pair
                have[pair[2]] += 1
    return list(chosen.values())


def _read(table: Table, premise: Callable[[str], str], hypothesis: Callable[[str], str]) -> list[Pair]:
    """The pairs of a table, the sentences written by the two functions."""
    return [
        (premise(form), hypothesis(other), label)
        for form, columns in table.items()
        for label, others in enumerate(columns)
        for other in others
    ]


def _both_ways(table: Table) -> Table:
    """The table and its mirror, in which what was about one thing is about the other (')."""

    def mirror(form: str) -> str:
        return form.removesuffix("'") if form.endswith("'") else form + "'"

    mirrored: Table = {
        mirror(form): ([*map(mirror, yes)], [*map(mirror, maybe)], [*map(mirror, no)])
        for form, (yes, maybe, no) in table.items()
    }
    return {**table, **mirrored}


def _two(rng: random.Random, words: Sequence[str]) -> list[str]:
    return rng.sample(words, 2)


def _person(person: str, rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {person}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _split(form: str) -> tuple[str, bool]:
    """A form without its mark, and whether it is about something else."""
    return form.removesuffix("'"), form.endswith("'")


def _negation(rng: random.Random) -> list[Pair]:
    """The young doctor is / is not reading a letter; another person, or doing something else."""
    people, activities = _two(rng, PEOPLE), _two(rng, ACTIVITIES)
    same = rng.choice((people, activities))
    same[1] = same[0]

    def of(form: str) -> tuple[str, str]:
        sign, other = _split(form)
        return people[other], f"{'is' if sign == '+' else 'is not'} {activities[other]}"

    def premise(form: str) -> str:
        person, does = of(form)
        return _sentence(f"{_person(person, rng)} {does}")

    def hypothesis(form: str) -> str:
        person, does = of(form)
        return _sentence(f"the {person} {does}")

    return _read(_both_ways(rng.choice(POLAR)), premise, hypothesis)


def _quantifiers(rng: random.Random) -> list[Pair]:
    """Every farmer / several farmers / not one farmer is waving a flag; or doing something else."""
    person, activities = rng.choice(PEOPLE), _two(rng, ACTIVITIES)
    premises = {"all": ("every {}", "is"), "some": ("several {}s", "are"), "none": ("not one {}", "is")}
    hypotheses = {"all": "all the {}s", "some": "some {}s", "none": "no {}s"}

    def premise(form: str) -> str:
        quantifier, other = _split(form)
        who, verb = premises[quantifier]
        return _sentence(f"{who.format(person)} {verb} {activities[other]}")

    def hypothesis(form: str) -> str:
        quantifier, other = _split(form)
        return _sentence(f"{hypotheses[quantifier].format(person)} are {activities[other]}")

    return _read(_both_ways(QUANTIFIERS), premise, hypothesis)


def _hypernyms(rng: random.Random) -> list[Pair]:
    """The judge noticed / did not notice a rose / a flower; another person."""
    kind = rng.choice(tuple(KINDS))
    nouns = {"K": kind, "m": rng.choice(KINDS[kind])}
    people, (verb, past) = _two(rng, PEOPLE), rng.choice(HANDLINGS)

    def says(form: str, person: str) -> str:
        does = past if form[0] == "+" else f"did not {verb}"
        return f"{person} {does} {_a(nouns[form[1]])}"

    def premise(form: str) -> str:
        return _sentence(says(form, _person(people[_split(form)[1]], rng)))

    def hypothesis(form: str) -> str:
        return _sentence(says(form, f"the {people[_split(form)[1]]}"))

    return _read(_both_ways(rng.choice(MEMBERS)), premise, hypothesis)


def _numbers(rng: random.Random) -> list[Pair]:
    """Exactly 3 / 9 sailors are laughing; exactly nine / more than six / fewer than six; or doing something else."""
    person, activities = rng.choice(PEOPLE), _two(rng, ACTIVITIES)
    few, middle, many = (rng.choice(numbers) for numbers in (FEW, MIDDLE, MANY))
    counts = {"-": few, "+": many}
    exact = {sign: f"exactly {number}" for sign, number in counts.items()}
    bounds = rng.choice((exact, {"-": f"fewer than {middle}", "+": f"more than {middle}"}))

    def says(amount: str, form: str) -> str:
        return _sentence(f"{amount} {person}s are {activities[_split(form)[1]]}")

    return _read(
        _both_ways(rng.choice(POLAR)),
        lambda form: says(f"exactly {NUMBERS.index(counts[form[0]]) + 2}", form),
        lambda form: says(bounds[form[0]], form),
    )


def _passive(rng: random.Random) -> list[Pair]:
    """The pilot thanked the nurse; the nurse was (not) thanked by the pilot; roles exchanged, or another deed or doer."""
    doer, other, third = rng.sample(PEOPLE, 3)
    deeds = rng.sample(DEEDS, 2)
    cases = [
        (doer, deeds[0], other),
        rng.choice(((other, deeds[0], doer), (doer, deeds[1], other), (third, deeds[0], other))),
    ]
    passive_first = rng.random() < 0.5

    def says(form: str, who: str, verb: tuple[str, str], whom: str, *, passive: bool) -> str:
        if passive:
            return f"{whom} was {'' if form[0] == '+' else 'not '}{verb[1]} by {who}"
        return f"{who} {verb[1]} {whom}" if form[0] == "+" else f"{who} did not {verb[0]} {whom}"

    def premise(form: str) -> str:
        who, verb, whom = cases[_split(form)[1]]
        return _sentence(says(form, f"the {who}", verb, f"the {whom}", passive=passive_first))

    def hypothesis(form: str) -> str:
        who, verb, whom = cases[_split(form)[1]]
        return _sentence(says(form, f"the {who}", verb, f"the {whom}", passive=not passive_first))

    return _read(_both_ways(rng.choice(POLAR)), premise, hypothesis)


PHENOMENA = {
    "negation": _negation,
    "quantifiers": _quantifiers,
    "hypernyms": _hypernyms,
    "numbers": _numbers,
    "passive": _passive,
}
