"""The comparison: methods x tasks x models x seeds x data sizes, each cell a run with a record of its own.

    grid.yaml -> Grid -> recipes, checked -> queue of processes -> records -> results.json -> tables, figures, report

`methods.py`, `spec.py`, `reading.py`, `results.py`, `pricing.py`, `queue.py`, `running.py` and `slurm.py` need no torch.
"""
