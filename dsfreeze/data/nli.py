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
    HANDLINGS,
    KINDS,
    NUMBERS,
    OPENINGS,
    PEOPLE,
    PLACES,
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

#: The square of opposition, there being some of the kind in both places.
SQUARE: tuple[Table, ...] = (
    {
        "all": (["all", "some"], ["some'", "not all'"], ["not all", "not all"]),
        "some": (["some"], ["all"], ["none"]),
        "none": (["none", "not all"], ["some'", "not all'"], ["some", "some"]),
        "not all": (["not all"], ["none"], ["all"]),
    },
    {
        "all": (["all", "all"], ["all'", "not all'"], ["not all", "none"]),
        "some": (["some"], ["all"], ["none"]),
        "none": (["none", "none"], ["some'", "none'"], ["some", "all"]),
        "not all": (["not all"], ["none"], ["all"]),
    },
)

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

    mirrored = {
        mirror(form): tuple([mirror(f) for f in column] for column in columns) for form, columns in table.items()
    }
    return {**table, **mirrored}


def _two(rng: random.Random, words: Sequence[str]) -> list[str]:
    return rng.sample(words, 2)


def _person(person: str, rng: random.Random) -> str:
    return f"the {rng.choice(ADJECTIVES)} {person}" if rng.random() < 0.4 else f"the {person}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _opened(text: str, rng: random.Random) -> str:
    return _sentence(rng.choice(OPENINGS) + text)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _negation(rng: random.Random) -> list[Pair]:
    """The (young) doctor (in the park) is / is not reading a letter."""
    people, activities = _two(rng, PEOPLE), _two(rng, ACTIVITIES)
    rng.choice((people, activities))[1] = "same"
    place = rng.choice((*PLACES, *[""] * len(PLACES)))

    def of(form: str) -> tuple[str, str]:
        person, activity = (pair[form.endswith("'") and pair[1] != "same"] for pair in (people, activities))
        return person, f"{'is' if form[0] == '+' else 'is not'} {activity}"

    def premise(form: str) -> str:
        person, does = of(form)
        return _opened(" ".join(filter(None, (_person(person, rng), place, does))), rng)

    def hypothesis(form: str) -> str:
        person, does = of(form)
        return _sentence(f"the {person} {does}")

    return _read(_both_ways(rng.choice(POLAR)), premise, hypothesis)


def _quantifiers(rng: random.Random) -> list[Pair]:
    """Every farmer / several / not one / not every ... at the market is ..., here and elsewhere."""
    person, activity, places = rng.choice(PEOPLE), rng.choice(ACTIVITIES), _two(rng, PLACES)
    premises = {"all": "every {} is", "some": "several {}s are", "none": "not one {} is", "not all": "not every {} is"}
    hypotheses = {
        "all": "all the {}s {} are",
        "some": "some {}s {} are",
        "none": "no {}s {} are",
        "not all": "some {}s {} are not",
    }

    def premise(form: str) -> str:
        place = places[form.endswith("'")]
        who, verb = premises[form.removesuffix("'")].format(person).rsplit(" ", 1)
        return _opened(f"{who} {place} {verb} {activity}", rng)

    def hypothesis(form: str) -> str:
        place = places[form.endswith("'")]
        return _sentence(f"{hypotheses[form.removesuffix(chr(39))].format(person, place)} {activity}")

    return _read(_both_ways(rng.choice(SQUARE)), premise, hypothesis)


def _hypernyms(rng: random.Random) -> list[Pair]:
    """The judge noticed (did not notice) a rose / a flower."""
    kind = rng.choice(tuple(KINDS))
    nouns = {"K": kind, "m": rng.choice(KINDS[kind])}
    people, (verb, past) = _two(rng, PEOPLE), rng.choice(HANDLINGS)
    place = rng.choice(PLACES)

    def says(form: str, person: str) -> str:
        noun = nouns[form[1]]
        return f"{person} {past} {_a(noun)}" if form[0] == "+" else f"{person} did not {verb} {_a(noun)}"

    def premise(form: str) -> str:
        return _opened(f"{says(form, _person(people[form.endswith(chr(39))], rng))} {place}", rng)

    def hypothesis(form: str) -> str:
        return _sentence(f"{says(form, 'the ' + people[form.endswith(chr(39))])} {place}")

    return _read(_both_ways(rng.choice(MEMBERS)), premise, hypothesis)


def _numbers(rng: random.Random) -> list[Pair]:
    """Exactly five sailors ...; exactly five / more than three / fewer than nine sailors ..."""
    person, activity, places = rng.choice(PEOPLE), rng.choice(ACTIVITIES), _two(rng, PLACES)
    low, middle, high = sorted(rng.sample(range(len(NUMBERS)), 3))
    count = {"-": NUMBERS[low], "+": NUMBERS[high]}
    compared = {"-": f"fewer than {NUMBERS[middle]}", "+": f"more than {NUMBERS[middle]}"}
    bounds = compared if rng.random() < 0.5 else {sign: f"exactly {number}" for sign, number in count.items()}

    def says(number: str, form: str) -> str:
        return f"{number} {person}s {places[form.endswith(chr(39))]} are {activity}"

    def premise(form: str) -> str:
        return _opened(says(f"exactly {count[form[0]]}", form), rng)

    def hypothesis(form: str) -> str:
        return _sentence(says(bounds[form[0]], form))

    return _read(_both_ways(rng.choice(POLAR)), premise, hypothesis)


def _passive(rng: random.Random) -> list[Pair]:
    """The pilot thanked the nurse; the nurse was (not) thanked by the pilot; and with the roles exchanged."""
    people, (verb, past) = _two(rng, PEOPLE), rng.choice(DEEDS)
    passive_first = rng.random() < 0.5

    def says(form: str, doer: str, other: str, *, passive: bool) -> str:
        if passive:
            return f"{other} was {'' if form[0] == '+' else 'not '}{past} by {doer}"
        return f"{doer} {past} {other}" if form[0] == "+" else f"{doer} did not {verb} {other}"

    def roles(form: str) -> list[str]:
        return people[::-1] if form.endswith("'") else people

    def premise(form: str) -> str:
        doer, other = (_person(person, rng) for person in roles(form))
        return _opened(says(form, doer, other, passive=passive_first), rng)

    def hypothesis(form: str) -> str:
        doer, other = (f"the {person}" for person in roles(form))
        return _sentence(says(form, doer, other, passive=not passive_first))

    return _read(_both_ways(rng.choice(POLAR)), premise, hypothesis)


PHENOMENA = {
    "negation": _negation,
    "quantifiers": _quantifiers,
    "hypernyms": _hypernyms,
    "numbers": _numbers,
    "passive": _passive,
}
