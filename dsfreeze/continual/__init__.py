"""Continual tuning: a sequence of tasks, one round of training each, and what is left of each task after every round.

    tasks.yaml -> Spec -> recipes, checked -> rounds (train, evaluate all) -> results.json -> table, figure

`spec.py`, `reading.py`, `methods.py`, `matrix.py`, `results.py` and `trace.py` need no torch.
"""
