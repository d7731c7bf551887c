"""Examples as the cache knows them: their sequences, each by its key and its length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from dsfreeze.data.examples import Examples
from dsfreeze.prefix.keys import KEY_BYTES, example_key


class Rows:
    """Keys (made when they are first asked for, 17 bytes a sequence) and lengths of a set of examples' sequences."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.sequences = examples, examples.sequences
        self._keys = np.zeros((len(self.sequences), KEY_BYTES), dtype=np.uint8)
        self._known = np.zeros(len(self.sequences), dtype=bool)

    def key(self, index: int) -> bytes:
        """Of a sequence, as `length` is."""
        if not self._known[index]:  # two threads may both make it, and make the same
            self._keys[index] = np.frombuffer(example_key(self.sequences[index]), dtype=np.uint8)
            self._known[index] = True
        key: bytes = self._keys[index].tobytes()
        return key

    def every_key(self) -> Iterator[bytes]:
        return map(self.key, range(len(self.sequences)))

    def length(self, index: int) -> int:
        """Tokens, without padding."""
        return int(self.sequences.num_tokens[index])

    def of(self, chosen: Iterable[int]) -> list[tuple[bytes, int]]:
        """(key, length) of each sequence of the chosen examples, as a batch has them."""
        return [(self.key(index), self.length(index)) for index in self.examples.sequences_of(chosen)]

    @property
    def tokens(self) -> int:
        return int(np.sum(self.examples.num_tokens))
