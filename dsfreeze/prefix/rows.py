"""Examples as the cache knows them: each by its key and its length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

import numpy as np

from dsfreeze.data.examples import Examples
from dsfreeze.prefix.keys import example_key


class Rows:
    """Keys (made when they are first asked for) and lengths of a set of examples."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self.key = cache(self._key)

    def _key(self, index: int) -> bytes:
        return example_key(self.examples[index])

    def every_key(self) -> Iterator[bytes]:
        return map(self.key, range(len(self.examples)))

    def length(self, index: int) -> int:
        """Tokens, without padding."""
        return int(self.examples.num_tokens[index])

    def of(self, chosen: Iterable[int]) -> list[tuple[bytes, int]]:
        """(key, length) of each of the chosen ones."""
        return [(self.key(index), self.length(index)) for index in map(int, chosen)]

    @property
    def tokens(self) -> int:
        return int(np.sum(self.examples.num_tokens))
