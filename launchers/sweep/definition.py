"""What a sweep is: the config of a sweep, in conf/sweep/NAME.yaml and as `sweep.key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from shardwright.train.config import messages
from shardwright.train.config.section import (
    NonNegativeInt,
    PositiveInt,
    Section,
    Strings,
    shown,
)
from shardwright.train.errors import UserError

PREFIX = "sweep"
"""What words of a command line for the sweep itself begin with."""


class Objective(Section):
    """A logged metric by which points are compared."""

    metric: Annotated[str, Field(min_length=1)]
    """Its name in metrics.jsonl."""
    direction: Literal["minimize", "maximize"] = "minimize"
    """Which of two values is the better one."""


class Search(Section):
    """What proposes points where they are not all settled from the start."""

    kind: Literal["none", "tpe", "random", "grid", "cmaes", "nsga2"] = "none"
    """none runs each combination; the others are samplers of Optuna."""
    trials: PositiveInt | None = None
    """Points to try; a search needs it, except for the grid."""
    pruner: Literal["none", "asha", "median"] = "none"
    """What stops a point that does badly at a held-out loss on its way."""
    seed: NonNegativeInt = 0
    """Fixes what is proposed."""
    startup_trials: PositiveInt | None = None
    """Of tpe: the first points, which are drawn at random; null is Optuna's own number, 10."""
    pruner_min_steps: PositiveInt | None = None
    """No point is pruned before; null is the first evaluation."""
    pruner_reduction_factor: Annotated[int, Field(ge=2)] | None = None
    """Of asha: one of this many points goes on to steps this many times as many; null is 4."""
    pruner_startup_trials: NonNegativeInt | None = None
    """Of median: points that have to be done before the first is pruned; null is 5."""


class SweepConfig(Section):
    """Which runs a sweep consists of, and how they are run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = "sweep"
    """Names the directory of the sweep: sweeps/NAME-TIME."""
    overrides: Strings = ()
    """What all points have in common, as on a command line."""
    grid: dict[str, Any] = Field(default_factory=dict)
    """For each key or group its values: a list, or text in Hydra's grammar such as range(1,5)."""
    exclude: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """Combinations to leave out: a mapping fits each point that has all of its values."""
    seeds: (
        PositiveInt
        | Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
        | None
    ) = None
    """Repeats of each combination: a number (seeds 0, 1, ...) or the seeds themselves."""
    limit: PositiveInt | None = None
    """The most points that are run, of all combinations the first; null runs all."""
    max_parallel: PositiveInt | Literal["auto"] = "auto"
    """Points at a time; auto is as many as there are devices or hosts for, 1 on a CPU."""
    devices_per_point: PositiveInt | Literal["auto"] = "auto"
    """GPUs, or on a CPU cores, that a point has to itself; auto: a GPU for each rank, an equal part
    of the cores."""
    max_retries: NonNegativeInt = 1
    """How often a point that failed is tried again when the sweep is run again."""
    objectives: Annotated[tuple[Objective, ...], Field(strict=False, min_length=1)] = (
        Objective(metric="eval_loss"),
    )
    """By what points are compared; a search takes the first, or all if it can."""
    search: Search = Field(default_factory=Search)
    """How points are found where not all of them are run."""
    backend: Literal["here", "ray", "wandb"] = "here"
    """Who starts points: this command, Ray, or an agent of W&B."""

    @model_validator(mode="after")
    def _search_has_trials(self) -> Self:
        if self.search.kind in ("tpe", "random", "cmaes", "nsga2") and self.search.trials is None:
            raise ValueError(
                f"search.kind={self.search.kind} proposes points without end; set "
                "sweep.search.trials"
            )
        return self

    @model_validator(mode="after")
    def _search_is_asked_for(self) -> Self:
        if self.search.kind == "none" and self.backend != "wandb":
            for name, value in self.search:
                if value != Search.model_fields[name].default:
                    raise ValueError(
                        f"search.{name}={value} is read by a search, and search.kind=none runs "
                        f"each combination; set {PREFIX}.search.kind (grid tries each one too), or "
                        "leave it out"
                    )
        return self


def from_tree(tree: Mapping[str, Any]) -> SweepConfig:
    """Validate a sweep's own settings; raise UserError with one line for each problem."""
    try:
        return SweepConfig.model_validate(dict(tree))
    except ValidationError as error:
        unknown = [e for e in error.errors() if e["type"] == "extra_forbidden"]
        paths = [tuple(e["loc"]) for e in error.errors()]
        others = [
            e
            for e in error.errors()
            if e["type"] != "extra_forbidden"
            # A list whose items are wrong is counted without them.
            and not any(p != tuple(e["loc"]) == p[: len(e["loc"])] for p in paths)
        ]
        for each in others:
            each["loc"] = (PREFIX, *each["loc"])
        lines = [unknown_key(".".join(map(str, e["loc"])), e["input"]) for e in unknown]
        raise UserError("\n".join([*lines, *messages.problems(others)])) from None


def known_keys() -> list[str]:
    """Return the dotted keys of a sweep's own settings, without what they begin with."""
    return [
        *SweepConfig.model_fields,
        *(f"search.{name}" for name in Search.model_fields),
    ]


def unknown_key(key: str, value: Any) -> str:
    """Say what to write in place of a setting that a sweep does not have. Pure."""
    near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.6)
    hint = f"did you mean {PREFIX}.{near[0]}?" if near else f"there are {', '.join(known_keys())}"
    return f"unknown key {PREFIX}.{key}={shown(value)}: {hint}"
