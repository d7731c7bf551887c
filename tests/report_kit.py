"""Records and results files with numbers written by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from dsfreeze.plan import FreezePlan, Phase
from dsfreeze.recipe_reader import load_recipe
from dsfreeze.record import Record

ENVIRONMENT = {
    "versions": {"dsfreeze": "0.1.0", "torch": "2.13.0"}, "python": "3.11.7", "platform": "Linux", "device": "cpu", "cores": 2, "threads": 1,
    "world_size": 1,
}  # fmt: skip
PLAN = FreezePlan("bottom", (Phase(0, None, ("a.weight",)),))
#: Elements without an end tag.
VOID = ("meta", "link", "br", "img", "hr", "input")


def run_of(
    folder: Path,
    *words: str,
    accuracy: float = 0.75,
    losses: tuple[float, ...] = (2.0, 1.0, 0.5),
    ended: bool = True,
    **summary: Any,
) -> Path:
    """A record: 25 of 100 parameters train, a step takes 0.5 s, the peak is 2 GiB."""
    recipe = load_recipe(
        None, ["model=m", f"train.output_dir={folder.as_posix()}", f"train.max_steps={len(losses)}", *words]
    )
    record = Record.create(folder, recipe, PLAN, ENVIRONMENT)
    for number, loss in enumerate(losses, start=1):
        record.step({"step": number, "loss": loss, "seconds": 0.5, "memory_peak": 2**31})
    if ended:
        record.summary({
            "metrics": {"before": {"loss": 2.0, "accuracy": 0.5}, "after": {"loss": 0.5, "accuracy": accuracy}}, "trainable": 25,
            "total": 100, "flops_vs_full": 0.4, "seconds_per_step": 0.5, "memory": {"peak": 2**31}, **summary,
        })  # fmt: skip
    return folder


def cell(method: str, seed: int, score: float | None, **more: Any) -> dict[str, Any]:
    return {
        "model": "m", "task": "rte", "method": method, "size": None, "seed": seed, "status": "done", "reason": None, "run": None,
        "score": score, "metrics": {"accuracy": (score or 0) / 100}, "seconds": 10.0, "peak_bytes": 2**30, "trainable": 1_000_000,
        "total": 4_000_000, "flops": 2e12, "learning_rate": 5e-5, "steps": 100, **more,
    }  # fmt: skip


def comparison_of(folder: Path, *cells: dict[str, Any], **changes: Any) -> Path:
    """A comparison's results file."""
    named = {f"m/rte/{each['method']}/size-all/seed-{each['seed']}": each for each in cells}
    path = folder / "results.json"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format_version": 1, "spec": {}, "cells": named, "tuning": {}, **changes}))
    return path


def sequence_of(folder: Path, **changes: Any) -> Path:
    """A sequence's results file: two tasks, one method on two seeds; by hand: OP 80 and 82, BWT -10 and -12."""

    def round_of(number: int, scores: tuple[float, float]) -> dict[str, Any]:
        return {
            "round": number, "task": ("news", "chats")[number - 1], "scores": dict(zip(("news", "chats"), scores, strict=True)),
            "numbers": {}, "update_norm": 1.0, "trainable_share": 1.0, "seconds": 2.0,
        }  # fmt: skip

    def run(seed: int, first: float, last: tuple[float, float]) -> dict[str, Any]:
        return {
            "label": "full", "method": "full", "seed": seed, "draw": None, "alpha": None,
            "rounds": [round_of(1, (first, 5.0)), round_of(2, last)],
        }  # fmt: skip

    state = {
        "format_version": 1, "spec": {"bwt": "T-1"}, "sequence": ["news", "chats"], "probes": [], "data": {}, "summary": {},
        "start": {"scores": {"news": 9.0, "chats": 9.0}, "numbers": {}},
        "runs": {"full/seed-1": run(1, 80.0, (70.0, 90.0)), "full/seed-2": run(2, 84.0, (72.0, 92.0))}, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(state))
    return path


class Outline(HTMLParser):
    """What a page holds: its tags with their attributes, texts by the tag they stand in, tables as rows of texts. Fails where tags do not
    nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(page)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        where = self._open[-1] if self._open else ""
        self.texts.append((where, data))
        if "caption" in self._open:
            self.tables[data] = self._rows
        elif where in ("td", "th"):
            self._rows[-1][-1] += data

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    def table(self, caption: str) -> list[dict[str, str]]:
        """A table's rows, by the names of its columns."""
        head, *rows = self.tables[caption]
        return [dict(zip(head, row, strict=True)) for row in rows]
