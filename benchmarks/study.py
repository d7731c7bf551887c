"""The committed study: the grids in study/, and what they say (the data must lie beside the repository, as the recipes expect them).

    python benchmarks/study.py paper converged          # runs what is left of these grids; words with = go to them: jobs=2

Writes study/NAME/results.json (what `dsfreeze compare` left, or `dsfreeze continual` for sft_dpo, and the machine's name) and
docs/study-NAME-{scores,fronts,ranks}.svg, or docs/study-sft_dpo.svg; `dsfreeze report benchmarks/study -o study.html` makes a page of all.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from common import machine
from rich.console import Console

from dsfreeze.cli.known import anatomy_of
from dsfreeze.compare.figures import critical_difference_figure, pareto_figure, score_figure
from dsfreeze.compare.pareto import pareto_fronts
from dsfreeze.compare.reading import read_grid
from dsfreeze.compare.results import write_results
from dsfreeze.compare.running import run_grid
from dsfreeze.compare.statistics import baseline, summarise
from dsfreeze.continual.figure import draw_figure
from dsfreeze.continual.reading import read_course
from dsfreeze.continual.rounds import run_course

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
#: What is no grid but tasks in sequence.
SEQUENCES = {"sft_dpo"}


def main() -> None:
    names, words = ([word for word in sys.argv[1:] if ("=" in word) is has] for has in (False, True))
    os.chdir(HERE.parent)
    for name in names:
        path, console = Path("benchmarks/study", f"{name}.yaml"), Console(stderr=True)
        if name in SEQUENCES:
            state = run_course(read_course(path, words), console)
            draw_figure(state, DOCS / f"study-{name}.svg")
        else:
            state = run_grid(read_grid(path, words), anatomy_of, console)
            draw(name, state["cells"])
        folder = HERE / "study" / name
        folder.mkdir(exist_ok=True)
        write_results(folder, {**state, "machine": machine()})


def draw(name: str, cells: dict[str, Any]) -> None:
    summary = summarise(cells, against=baseline(cells))
    figures = {"scores": score_figure(summary), "fronts": pareto_figure(pareto_fronts(cells), summary.methods)}
    ranked = [family for family in summary.families if family.against is None]
    figures["ranks"] = critical_difference_figure(ranked[-1])
    for kind, figure in figures.items():
        figure.savefig(DOCS / f"study-{name}-{kind}.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    main()
