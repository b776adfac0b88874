"""What a search tries next, and what it learned: the only module that imports Optuna.

A suggestion is a function of the space, the trials before it and a seed of its own, and of nothing else: a study is
made anew for each one, in memory. So a search that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from manyshot.errors import MissingExtraError
from manyshot.tune_space import Dimension, Settings, grid, same, same_settings

# TPE draws at random until it has seen this many trials, or a third of those that there will be
STARTUP_TRIALS = 10
# fewer trials than this say nothing about importances, and so few are the best ones that they are told from
FEWEST_TRIALS, FEWEST_BEST = 10, 5


@dataclass(frozen=True)
class Tried:
    """Settings and the objective's value; None where they could not be merged."""

    settings: Settings
    value: float | None


def require_optuna() -> None:
    """Raises MissingExtraError with the line that installs it."""
    if find_spec("optuna") is None:
        raise MissingExtraError("a search needs the package optuna; run: pip install 'manyshot[tune]'")


def suggest(
    dimensions: Sequence[Dimension],
    tried: Sequence[Tried],
    *,
    sampler: Literal["tpe", "random", "grid"],
    maximize: bool,
    num_trials: int | None,
    seed: int,
) -> Settings | None:
    """The settings to try next; None when a grid has been tried. A failed trial counts as worse than any other."""
    if sampler == "grid":
        left = (one for one in grid(dimensions) if not any(same_settings(one, other.settings) for other in tried))
        return next(left, None)
    import optuna

    startup = STARTUP_TRIALS if num_trials is None else min(STARTUP_TRIALS, -(-num_trials // 3))
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed % 2**32, n_startup_trials=startup),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed % 2**32),
    }
    with _quiet():
        trial = _study(dimensions, tried, maximize, samplers[sampler]()).ask(_distributions(dimensions))
    return {dimension.name: _from_optuna(dimension, trial.params[dimension.name]) for dimension in dimensions}


def importances(dimensions: Sequence[Dimension], tried: Sequence[Tried], *, maximize: bool) -> dict[str, float]:
    """What each setting matters for being among the best trials; they sum to 1. Empty where too few trials tell.

    PED-ANOVA (arXiv 2304.10255): how far the distribution of a setting among the best trials, a tenth of all and at
    least FEWEST_BEST, differs from that among all.
    """
    finished = [one for one in tried if one.value is not None]
    if len(finished) < FEWEST_TRIALS or len({one.value for one in finished}) == 1:
        return {}
    import optuna

    best = max(0.1, FEWEST_BEST / len(finished))
    with _quiet():
        study = _study(dimensions, finished, maximize, None)
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=best)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {dimension.name: float(found[dimension.name]) for dimension in dimensions}


def _study(dimensions: Sequence[Dimension], tried: Sequence[Tried], maximize: bool, sampler: Any) -> Any:
    """A study in memory that holds what was tried."""
    import optuna

    study = optuna.create_study(direction="maximize" if maximize else "minimize", sampler=sampler)
    distributions = _distributions(dimensions)
    states = optuna.trial.TrialState
    for one in tried:
        parameters = {dimension.name: _to_optuna(dimension, one.settings[dimension.name]) for dimension in dimensions}
        # Optuna forgets a trial that failed, and ranks one that was given up below all others
        state = states.PRUNED if one.value is None else states.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(state=state, value=one.value, params=parameters, distributions=distributions)
        )
    return study


def _distributions(dimensions: Sequence[Dimension]) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, Any] = {}
    for one in dimensions:
        if one.choices:
            # by their places, since Optuna takes no lists as choices
            found[one.name] = CategoricalDistribution(tuple(range(len(one.choices))))
        elif one.whole:
            found[one.name] = IntDistribution(round(one.low), round(one.high), log=one.log, step=round(one.step or 1))
        else:
            found[one.name] = FloatDistribution(one.low, one.high, log=one.log, step=one.step)
    return found


def _to_optuna(dimension: Dimension, value: Any) -> Any:
    if dimension.choices:
        return next(i for i, choice in enumerate(dimension.choices) if same(choice, value))
    return dimension.number(value)


def _from_optuna(dimension: Dimension, value: Any) -> Any:
    return dimension.choices[value] if dimension.choices else dimension.number(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna tells of every study that it makes, and warns of few trials; put back as it was."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
