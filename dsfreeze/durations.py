"""How long steps take, in memory that does not grow with their number. No torch."""

from __future__ import annotations

import statistics
from collections import deque

#: Steps whose seconds are held.
LATEST = 4096


class Durations:
    """Seconds of steps: the sum of all, and the median of the latest 4,096."""

    def __init__(self) -> None:
        self.number, self.total = 0, 0.0
        self._latest: deque[float] = deque(maxlen=LATEST)

    def add(self, seconds: float) -> None:
        self.number, self.total = self.number + 1, self.total + seconds
        self._latest.append(seconds)

    def median(self, *, warming: int = 0) -> float | None:
        """Without a run's first `warming` steps, which allocate and compile, where there are others; None without any."""
        held = list(self._latest)
        first = self.number - len(held)
        return statistics.median(held[max(0, warming - first) :] or held) if held else None
