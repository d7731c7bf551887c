"""The comparison: methods x tasks x models x data sizes x seeds, each cell a run with a record of its own, and what can be said of them.

    grid.yaml -> Grid -> recipes, checked -> queue of processes -> records -> results.json
    cells of results.json -> Summary (scores, paired tests, ranks, verdicts) and fronts -> tables, figures

Nothing here needs torch; statistics import numpy and scipy when they are called, `tuning.py` optuna, `figures.py` seaborn.
"""
