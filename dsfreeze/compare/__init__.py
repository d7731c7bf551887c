"""The comparison: methods x tasks x models x data sizes x seeds as runs, and what can be said of them.

    cells of results.json -> Summary (scores, paired tests, ranks, verdicts) and fronts -> tables, figures

A cell is one run of the grid. `statistics.py`, `pairs.py`, `ranks.py`, `verdicts.py`, `pareto.py` and `tables.py` need no torch, and
import numpy and scipy only when they are called; `figures.py` needs seaborn.
"""
