"""Examples as the cache knows them: each by its key and its length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from dsfreeze.data.examples import Examples
from dsfreeze.prefix.keys import KEY_BYTES, example_key


class Rows:
    """Keys (made when they are first asked for, 17 bytes an example) and lengths of a set of examples."""

    def __init__(self, examples: Examples) -> None:
        self.examples = examples
        self._keys = np.zeros((len(examples), KEY_BYTES), dtype=np.uint8)
        self._known = np.zeros(len(examples), dtype=bool)

    def key(self, index: int) -> bytes:
        if not self._known[index]:  # two threads may both make it, and make the same
            self._keys[index] = np.frombuffer(example_key(self.examples[index]), dtype=np.uint8)
            self._known[index] = True
        return self._keys[index].tobytes()

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
