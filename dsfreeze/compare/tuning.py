"""Learning rates looked for by Optuna: as many trials for every method, in the same range, judged by rows set aside of the training data.

`grid` and `random` know their rates beforehand, and all trials may run at once; `tpe` runs one after the other. The proposals depend on
the seed and on earlier trials' scores alone, so that a stopped search proposes the same again and finds its finished trials' records.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from dsfreeze.compare.queue import Result, Work
from dsfreeze.compare.results import held_out_score
from dsfreeze.compare.spec import TuneOptions
from dsfreeze.errors import UserError
from dsfreeze.state_file import State

EXTRA = "learning rates are looked for with Optuna: pip install 'dsfreeze[tune]', or write tune: {trials: 0}"
RATE = "learning_rate"
#: (number of the trial, learning rate) -> its run.
Trial = Callable[[int, float], Work]


def require_optuna() -> None:
    """UserError where it is not installed."""
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise UserError(f"{EXTRA}.") from None


def search(options: TuneOptions, trial: Trial) -> Generator[list[Work], list[Result], State | None]:
    """A source's part: yields trials, returns `trials` and the best `learning_rate` (None where all failed); None when it was
    interrupted."""
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState

    study, told = _study(options), list[State]()
    space = {RATE: FloatDistribution(options.low, options.high, log=True)}
    while len(told) < options.trials:
        asked = [study.ask(space) for _ in range(1 if options.sampler == "tpe" else options.trials)]
        results = yield [trial(each.number, each.params[RATE]) for each in asked]
        if any(result.status == "interrupted" for result in results):
            return None
        for each, result in zip(asked, results, strict=True):
            value = held_out_score(result.record) if result.record is not None else None
            study.tell(each, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)
            told.append({RATE: each.params[RATE], "score": value, "status": result.status, "reason": result.reason})
    known = [each for each in told if each["score"] is not None]
    best = max(known, key=lambda each: (each["score"], -each[RATE]), default=None)  # among equals the lowest rate
    return {"trials": told, RATE: best and best[RATE]}


def _study(options: TuneOptions) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.sampler == "tpe":
        sampler: Any = optuna.samplers.TPESampler(n_startup_trials=max(2, options.trials // 3), seed=options.seed)
    else:  # of a grid, what is enqueued goes first, and that is all
        sampler = optuna.samplers.RandomSampler(options.seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for rate in rates(options) if options.sampler == "grid" else ():
        study.enqueue_trial({RATE: rate})
    return study


def rates(options: TuneOptions) -> list[float]:
    """The grid: evenly spaced in the logarithm, from the lowest to the highest; a single one is their geometric mean."""
    low, high, number = options.low, options.high, options.trials
    if number == 1:
        return [(low * high) ** 0.5]
    inner = [low * (high / low) ** (step / (number - 1)) for step in range(1, number - 1)]
    return [low, *inner, high]
