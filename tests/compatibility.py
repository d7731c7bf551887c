"""The page that says what works with what: docs/compatibility.json, which only a test run writes, as Markdown.

pytest tests/distributed/test_compatibility.py --write-compatibility    # every cell runs; writes the JSON
python tests/compatibility.py                                           # writes docs/compatibility.md from it
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from dsfreeze.engine.support import UNSUPPORTED
from dsfreeze.strategies import STRATEGIES

DOCS = Path(__file__).parents[1] / "docs"
JSON, PAGE = DOCS / "compatibility.json", DOCS / "compatibility.md"
#: a recipe's `zero:`, and the head of its column
LAYOUTS = {
    "local": "local", "zero0": "ZeRO-0", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero2_offload": "ZeRO-2, offload",
    "zero3": "ZeRO-3", "zero3_offload": "ZeRO-3, offload",
}  # fmt: skip
CHECKPOINTING = ("off", "on")
#: what is asked of a cell, in this order; the answer is "yes" or the reason of a refusal
ASKED = ("trains", "resumes")
YES = dict.fromkeys(ASKED, "yes")

#: strategy -> checkpointing -> layout -> asked -> answer
Table = dict[str, dict[str, dict[str, dict[str, str]]]]

INTRODUCTION = """# What works with what

Written from [compatibility.json](compatibility.json) by `python tests/compatibility.py`. That file is written by a test run alone
(`pytest tests/distributed/test_compatibility.py --write-compatibility`), in which every cell ran; an ordinary run
of that test repeats every strategy at one of the layouts, by turns, and is held to it.

**yes**: on two gloo ranks (one process for `local`), on CPUs, in fp32, a run of {steps} steps of a tiny Llama had the losses of the
uninterrupted run of plain PyTorch in one process to 1e-5; continued from its own checkpoint at step {resumed_at} it had them
again; strategies that move had changed what trains, and every switch and every revision was that of the one process.
Gradient checkpointing *off, on*: both did. Offload: optimizer state and masters in host memory, at ZeRO-3 the weights too.

Versions: {versions}.
"""
REFUSED = """
## Refused by name

By `refreeze`, which changes what trains in a live DeepSpeed engine (dsfreeze's own or any other), before anything is touched:

| feature | why |
|---|---|
"""


def render(found: dict) -> str:
    """The page of a compatibility.json."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    introduction = INTRODUCTION.format(steps=found["steps"], resumed_at=found["resumed_at"], versions=versions)
    refused = "".join(f"| {name} | {reason} |\n" for _, name, reason in UNSUPPORTED)
    return "\n".join([introduction, *_matrix(found["outcomes"])]) + "\n" + REFUSED + refused


def _matrix(table: Table) -> Iterator[str]:
    """A row for each strategy, two where checkpointing makes a difference; reasons below, each once."""
    reasons: list[str] = []
    yield f"| strategy | checkpointing | {' | '.join(LAYOUTS.values())} |"
    yield "|---" * (2 + len(LAYOUTS)) + "|"
    for strategy, rows in table.items():
        off, on = (rows[setting] for setting in CHECKPOINTING)
        for setting, row in {"off, on": off}.items() if off == on else rows.items():
            cells = " | ".join(_cell(row[layout], reasons) for layout in LAYOUTS)
            yield f"| `{strategy}` | {setting} | {cells} |"
    yield from ("", *(f"[{number}] {reason}  " for number, reason in enumerate(reasons, 1))) if reasons else ()


def _cell(answers: dict[str, str], reasons: list[str]) -> str:
    if answers == YES:
        return "yes"
    return ", ".join(
        asked if answer == "yes" else f"{asked}: no {_number(answer, reasons)}" for asked, answer in answers.items()
    )


def _number(reason: str, reasons: list[str]) -> str:
    if reason not in reasons:
        reasons.append(reason)
    return f"[{reasons.index(reason) + 1}]"


def read() -> dict:
    return json.loads(JSON.read_text(encoding="utf-8"))


def record(strategy: str, answers: dict[str, dict[str, dict[str, str]]], made: dict) -> None:
    """Put a strategy's answers into compatibility.json; what was made otherwise (`made`: versions, steps) goes."""
    found = read() if JSON.exists() else {}
    outcomes = found["outcomes"] if {key: found.get(key) for key in made} == made else {}
    outcomes[strategy] = answers
    # a line for each strategy, so that a difference can be read
    lines = (f"  {json.dumps(name)}: {json.dumps(outcomes[name])}" for name in STRATEGIES if name in outcomes)
    head, body = json.dumps(made)[:-1], ",\n".join(lines)
    JSON.write_text(f'{head}, "outcomes": {{\n{body}\n}}}}\n', encoding="utf-8")


def main() -> None:
    PAGE.write_text(render(read()), encoding="utf-8")


if __name__ == "__main__":
    main()
