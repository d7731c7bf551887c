"""What `mutmut run` found of the mutants of plans, strategies and estimates, and every one that lived, by what it changes.

pip install mutmut==3.8.1; mutmut run    # some hours; pyproject.toml says of what, and with which tests
python benchmarks/mutants.py             # reads mutants/, writes mutants.json
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from common import write

HERE = Path(__file__).parent
#: mutmut's exit codes. A test that never ends has found its mutant too.
OUTCOMES = {0: "survived", 33: "no test reaches it", None: "not run"}
MARK = "__mutmut_"


def functions(source: str) -> dict[str, list[str]]:
    """The lines of every function that mutmut made, by its name there."""
    lines = source.splitlines()
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and MARK in node.name]
    return {node.name: lines[node.lineno - 1 : node.end_lineno] for node in found}


def change(before: list[str], after: list[str]) -> dict[str, str]:
    """The lines that differ, without those that name the function."""
    lines = [line for line in difflib.unified_diff(before, after, lineterm="", n=0) if MARK not in line]
    return {
        key: " ".join(line[1:].strip() for line in lines if line[0] == sign and line[:3] not in ("---", "+++"))
        for key, sign in (("was", "-"), ("is", "+"))
    }


def kind(was: str, now: str) -> str:
    """What a change is about: a text, the `strict` of a zip, or anything else."""
    if re.search(r"""["']XX|XX["']|Error\(None\)""", now) or was.lower() == now.lower():
        return "text"
    if "strict=" in was and ("strict=None" in now or "strict=False" in now or ", )" in now):
        return "strict of a zip"
    return "other"


def main() -> None:
    root = HERE.parent / "mutants"
    files, living, totals = {}, {}, Counter()
    for meta in sorted(root.rglob("*.meta")):
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"]
        counts = Counter(OUTCOMES.get(code, "found") for code in codes.values())
        name = str(meta.relative_to(root).with_suffix(""))
        files[name], totals = dict(counts), totals + counts
        made = functions(meta.with_suffix("").read_text(encoding="utf-8"))
        for key in (key for key, code in codes.items() if code == 0):
            mutant = key.rpartition(".")[2]
            original = mutant[: mutant.rindex(MARK)] + MARK + "orig"
            living[key] = change(made[original], made[mutant])
    by_kind: dict[str, dict[str, dict[str, str]]] = {}
    for key, both in living.items():
        by_kind.setdefault(kind(both["was"], both["is"]), {})[key] = both
    result = {
        "mutmut": version("mutmut"), "total": dict(totals), "files": files,
        "survived": {what: len(those) for what, those in by_kind.items()}, "survivors": by_kind.get("other", {}),
    }  # fmt: skip
    write(__file__, result)


if __name__ == "__main__":
    main()
