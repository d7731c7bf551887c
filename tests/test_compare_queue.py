"""The queue, with processes that end when the test says so. Oracles: what ran at the same time, counted here; the order of results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from dsfreeze.compare import queue as module
from dsfreeze.compare.queue import Queue, Result, Work
from dsfreeze.recipe import Recipe

RECIPE = Recipe.model_validate({"model": "m"})


def work(key: str, *order: int) -> Work:
    return Work(key, RECIPE, order=order)


@dataclass
class Timed:
    """Ends at its third look."""

    looks: int = 0
    asked: bool = False

    def poll(self) -> int | None:
        self.looks += 1
        return (143 if self.asked else 0) if self.looks >= 3 else None

    def terminate(self) -> None:
        self.asked = True

    def wait(self) -> int:
        return 0


@dataclass
class Shop:
    """Knows sizes; remembers what ran beside what."""

    sizes: dict[str, int | None] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)
    alive: list[str] = field(default_factory=list)
    began: list[str] = field(default_factory=list)
    together: list[set[str]] = field(default_factory=list)

    def known(self, work: Work) -> Result | None:
        return Result("done") if work.key in self.finished else None

    def bytes_of(self, work: Work) -> int | None:
        return self.sizes.get(work.key, 1)

    def start(self, work: Work) -> Timed:
        self.alive.append(work.key)
        self.began.append(work.key)
        self.together.append(set(self.alive))
        return Timed()

    def ended(self, work: Work, code: int) -> Result:
        self.alive.remove(work.key)
        return Result("done" if code == 0 else "interrupted")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL", 0)


def batches(*works: list[Work], got: list[Any] | None = None) -> Any:
    for each in works:
        results = yield each
        if got is not None:
            got.append([result.status for result in results])


def test_one_at_a_time_in_order() -> None:
    shop = Shop()
    queue = Queue(shop)
    queue.add([batches([work("a", 2)]), batches([work("b", 1), work("c", 3)])])
    queue.run()
    assert shop.began == ["b", "a", "c"]
    assert max(map(len, shop.together)) == 1


def test_the_sum_of_bytes_stays_within_memory() -> None:
    """5 + 4 fit 9, 5 + 4 + 2 do not; what has room goes before what has none; the one nobody can size is alone."""
    shop = Shop({"five": 5, "four": 4, "two": 2, "unknown": None, "nine": 9})
    queue = Queue(shop, jobs=4, memory=9)
    queue.add([batches([work(key, n)]) for n, key in enumerate(("five", "nine", "four", "two", "unknown"))])
    queue.run()
    assert shop.began[:2] == ["five", "four"]
    assert sorted(shop.began) == sorted(shop.sizes)
    for beside in shop.together:
        sizes = [shop.sizes[key] for key in beside]
        assert len(beside) == 1 if None in sizes else sum(size or 0 for size in sizes) <= 9


def test_no_more_at_once_than_jobs() -> None:
    shop = Shop()
    queue = Queue(shop, jobs=2)
    queue.add([batches([work(str(n), n) for n in range(5)])])
    queue.run()
    assert max(map(len, shop.together)) == 2


def test_a_source_goes_on_when_its_batch_has_ended() -> None:
    """Work of one key runs once for all that ask; what is finished does not run."""
    shop, got = Shop(finished={"old"}), [[], []]
    queue = Queue(shop, jobs=2)
    queue.add(
        [batches([work("shared"), work("old")], [work("then")], got=got[0]), batches([work("shared")], got=got[1])]
    )
    assert [each.key for each in queue.waiting] == ["shared"]
    queue.run()
    assert shop.began == ["shared", "then"]
    assert got == [[["done", "done"], ["done"]], [["done"]]]


def test_an_empty_batch_waits_for_nothing() -> None:
    shop, got = Shop(), []
    queue = Queue(shop)
    queue.add([batches([], [work("a")], got=got)])
    queue.run()
    assert got == [[], ["done"]]


def test_stopping_ends_what_runs_and_begins_nothing() -> None:
    shop, got, looks = Shop(), [], iter([False] + [True] * 9)
    queue = Queue(shop)
    queue.add([batches([work("a", 1), work("b", 2)], got=got)])
    queue.run(lambda: next(looks))
    assert (shop.began, got) == (["a"], [])
    assert [each.key for each in queue.waiting] == ["b"]


def test_what_happens_is_told() -> None:
    told: list[tuple[str, str]] = []
    queue = Queue(Shop(finished={"old"}), told=lambda work, result: told.append((work.key, result.status)))
    queue.add([batches([work("old"), work("new")])])
    queue.run()
    assert told == [("old", "done"), ("new", "done")]
