"""Which setting of a sweep mattered, by Optuna's importances, of searches and of plain grids."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shardwright.launchers.reporting.differences import written
from shardwright.launchers.reporting.scales import is_number, scale_of
from shardwright.train.units import counted

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Direction = Literal["minimize", "maximize"]
LEAST_POINTS = 4
"""Below this no share of a setting means anything."""
_FEW_POINTS = 20


@dataclass(frozen=True)
class Importance:
    """The share of each setting, the largest first; or why there is none."""

    shares: Mapping[str, float]
    how: str
    """By which method and of how many points, or why there is none."""


def importance(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], direction: Direction
) -> Importance:
    """Return how much of an objective's differences each setting explains."""
    keys = dict.fromkeys(key for each in settings for key in each)
    # What some points do not have explains nothing of the others.
    everywhere = [key for key in keys if all(key in each for each in settings)]
    varied = [k for k in everywhere if len({written(each[k]) for each in settings}) > 1]
    if importlib.util.find_spec("optuna") is None:
        return Importance({}, "Optuna is not installed (pip install 'shardwright[sweep]').")
    if len(values) < LEAST_POINTS:
        return Importance(
            {}, f"{counted(len(values), 'point')} with a value; it takes {LEAST_POINTS}."
        )
    if not varied:
        return Importance({}, "All points have the same settings.")
    if min(values) == max(values):
        return Importance({}, "All points have the same value.")
    return _by_optuna([{key: each[key] for key in varied} for each in settings], values, direction)


def _by_optuna(
    settings: Sequence[Mapping[str, Any]], values: Sequence[float], direction: Direction
) -> Importance:
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator

    ranges = {key: _distribution([each[key] for each in settings]) for key in settings[0]}
    is_fanova = importlib.util.find_spec("sklearn") is not None
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that creating trials is experimental
            study = optuna.create_study(direction=direction)
            for each, value in zip(settings, values, strict=True):
                given = {key: _value(each[key], ranges[key]) for key in ranges}
                study.add_trial(
                    optuna.trial.create_trial(params=given, distributions=ranges, value=value)
                )
            evaluator = (
                FanovaImportanceEvaluator(seed=0) if is_fanova else PedAnovaImportanceEvaluator()
            )
            shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)
    method = "fANOVA" if is_fanova else "PED-ANOVA"
    rough = " Of so few it is no more than a hint." if len(values) < _FEW_POINTS else ""
    return Importance(shares, f"By Optuna's {method}, of {len(values)} points.{rough}")


def _distribution(values: Sequence[Any]) -> BaseDistribution:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    scale = scale_of(values)
    if scale.names:
        return CategoricalDistribution(scale.names)
    if all(isinstance(value, int) for value in values):
        return IntDistribution(int(scale.low), int(scale.high), log=scale.is_log)
    return FloatDistribution(scale.low, scale.high, log=scale.is_log)


def _value(value: Any, distribution: BaseDistribution) -> Any:
    return value if is_number(value) and not hasattr(distribution, "choices") else written(value)
