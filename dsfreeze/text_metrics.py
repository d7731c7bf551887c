"""Scores of one generated text against its reference, as continual benchmarks use them. Plain Python, but for SARI's tokeniser.

An empty answer counts as wrong everywhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher


def same_text(text: str, reference: str) -> bool:
    """Equal to the last character, blanks included (TRACE's accuracy)."""
    return bool(text) and text == reference


def same_first_character(text: str, reference: str) -> bool:
    """The option chosen, where reasoning may follow it (TRACE's ScienceQA; there an empty answer crashes)."""
    return text[:1] == reference[:1] != ""


_LITERAL = re.compile(r"<(?:NUM|STR|CHAR)_LIT:(.*?)>", re.DOTALL)


def edit_similarity(text: str, reference: str) -> int:
    """0 to 100: the rounded percentage 2 M / (length of both), M being the characters in difflib's matching blocks.

    That is fuzzywuzzy's `ratio` where python-Levenshtein is not installed; with it (and in rapidfuzz) M is the longest common
    subsequence, which is never smaller. Py150's placeholders are filled first, as CodeXGLUE does.
    """
    one, other = _filled(text), _filled(reference)
    if not one or not other:
        return 0
    return round(100 * SequenceMatcher(None, one, other).ratio())


def _filled(code: str) -> str:
    for placeholder, value in (("<NUM_LIT>", "0"), ("<STR_LIT>", ""), ("<CHAR_LIT>", "")):
        code = code.replace(placeholder, value)
    return _LITERAL.sub(r"\1", code)


def sari(source: str, text: str, references: Sequence[str]) -> float:
    """0 to 100: how well a simplification keeps, deletes and adds n-grams (Xu et al. 2016, section 4.1), n = 1 to 4.

    The mean of F(keep), precision(delete) and F(add), each the mean over n; lower case, tokens of sacrebleu's 13a. Two places
    follow Hugging Face's `evaluate`, which TRACE calls: 0/0 is 1, and keep's recall is over counts, not over kinds of n-grams.
    """
    if not text.strip():
        return 0.0
    words, written, wanted = _tokens(source), _tokens(text), [_tokens(each) for each in references]
    scores = [_operations(words, written, wanted, n) for n in range(1, 5)]
    return 100 * sum(map(sum, scores)) / (3 * len(scores))


def _tokens(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer: Callable[[str], str] = Tokenizer13a()  # type: ignore[no-untyped-call]
    tokens = tokenizer(text.lower())
    return tokens.split()


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def _operations(
    source: Sequence[str], text: Sequence[str], references: Sequence[Sequence[str]], n: int
) -> tuple[float, float, float]:
    """F of what is kept, precision of what is deleted, F of what is added; counts are taken once for each reference."""
    wanted = sum((_grams(each, n) for each in references), Counter[tuple[str, ...]]())
    before, after = (_times(_grams(each, n), len(references)) for each in (source, text))
    kept, keepable = before & after, before & wanted
    well_kept = kept & wanted
    keep = _f(_share(well_kept, kept), _over(well_kept.total(), keepable.total()))
    dropped = before - after
    delete = _share(dropped - wanted, dropped)
    added, addable = set(after) - set(before), set(wanted) - set(before)
    good = len(added & set(wanted))
    return keep, delete, _f(_over(good, len(added)), _over(good, len(addable)))


def _times(counts: Counter[tuple[str, ...]], factor: int) -> Counter[tuple[str, ...]]:
    return Counter({gram: count * factor for gram, count in counts.items()})


def _share(good: Counter[tuple[str, ...]], of: Counter[tuple[str, ...]]) -> float:
    """Mean over kinds of n-grams of the share of their counts that is good."""
    return _over(sum(count / of[gram] for gram, count in good.items()), len(of))


def _over(part: float, whole: float) -> float:
    return part / whole if whole else 1.0


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def mean(values: Iterable[float]) -> float:
    """0 of nothing."""
    known = list(values)
    return sum(known) / len(known) if known else 0.0
