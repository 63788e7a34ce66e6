"""The same search as a sweep of W&B's: its sweep.yaml, and what it proposes as words. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from shardwright.launchers.sweep.definition import SweepConfig
from shardwright.launchers.sweep.space import Choices, Dimension, Scalar, Space
from shardwright.train.errors import UserError

METHODS = {"none": "grid", "grid": "grid", "random": "random", "tpe": "bayes"}
"""What W&B has of each kind of search: its own Bayesian search stands for TPE."""
SEED = "seed"


def problems(config: SweepConfig, space: Space) -> list[str]:
    """Return what W&B cannot do of a sweep, a message each."""
    start, search = "sweep.backend=wandb", config.search
    found = []
    if search.kind not in METHODS:
        found.append(
            f"{start} has no {search.kind}: W&B searches by grid, random and its own Bayesian "
            "search (sweep.search.kind=grid, random or tpe)"
        )
    if METHODS.get(search.kind) == "grid":
        found += [
            f"{start}: a grid has no range without steps, such as that of {name}; use "
            "sweep.search.kind=random or tpe"
            for name, each in space.items()
            if each.values() is None
        ]
    if len(config.objectives) > 1:
        names = ", ".join(each.metric for each in config.objectives)
        found.append(f"{start}: W&B compares by one metric, and sweep.objectives are {names}")
    if search.pruner == "median":
        found.append(f"{start} prunes by sweep.search.pruner=asha alone, which W&B calls hyperband")
    if config.exclude:
        found.append(f"{start}: W&B cannot leave combinations out; remove sweep.exclude")
    if config.max_parallel not in ("auto", 1):
        found.append(
            f"sweep.max_parallel={config.max_parallel}, but an agent of W&B runs one point at a "
            "time; start more agents with the command that is printed"
        )
    return found


def definition(
    config: SweepConfig, space: Space, arguments: Sequence[str], program: Sequence[str]
) -> dict[str, Any]:
    """Return what sweep.yaml holds: ``program`` and ``arguments`` come before what W&B proposes.

    Raises UserError on what W&B cannot do.
    """
    if found := problems(config, space):
        raise UserError("\n".join(found))
    objective, search = config.objectives[0], config.search
    seeds = range(config.seeds) if isinstance(config.seeds, int) else config.seeds or ()
    parameters = {name: parameter(each) for name, each in space.items()}
    if seeds:
        parameters[SEED] = {"values": list(seeds)}
    caps = [each for each in (search.trials, config.limit) if each is not None]
    tree: dict[str, Any] = {
        "name": config.name,
        "method": METHODS[search.kind],
        "metric": {"name": objective.metric, "goal": objective.direction},
        "parameters": parameters,
        "program": program[-1],
        "command": ["${env}", *program, "train", *tracked(arguments), "${args_no_hyphens}"],
    }
    if caps:
        tree["run_cap"] = min(caps)
    if search.pruner == "asha":
        tree["early_terminate"] = {
            "type": "hyperband",
            "min_iter": search.pruner_min_steps or 1,
            "eta": search.pruner_reduction_factor or 4,
        }
    return tree


def tracked(arguments: Sequence[str]) -> list[str]:
    """Return the words of all points with which W&B sees them: it compares what they log there."""
    chosen = [word for word in arguments if word.startswith("tracking=")]
    if chosen and chosen[-1] != "tracking=wandb":
        raise UserError(
            f"{chosen[-1]}, but with sweep.backend=wandb points are compared by what they log to "
            "W&B; leave it out, or use tracking=wandb"
        )
    return [*arguments, *([] if chosen else ["tracking=wandb"])]


def parameter(dimension: Dimension) -> dict[str, Any]:
    """Return what W&B calls a range or a choice."""
    if isinstance(dimension, Choices):
        return {"values": [_sent(*pair) for pair in zip(*_both(dimension), strict=True)]}
    ends: dict[str, Any] = {"min": dimension.low, "max": dimension.high}
    if dimension.is_log:
        if dimension.is_integer:
            return {"distribution": "q_log_uniform_values", **ends, "q": 1}
        return {"distribution": "log_uniform_values", **ends}
    if dimension.step is None:
        return {"distribution": "uniform", **ends}
    if dimension.is_integer and dimension.step == 1:
        return {"distribution": "int_uniform", **ends}
    # Its quantized distributions count from 0 and not from where the range begins.
    return {"values": dimension.values()}


def _both(choices: Choices) -> tuple[tuple[Scalar, ...], tuple[str, ...]]:
    return choices.choices, choices.words


def _sent(value: Scalar, word: str) -> Any:
    """Return a choice as W&B gives it back on a command line: numbers as they are, else words."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else word


def settings(space: Space, given: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what W&B proposes as the settings and the words of a point.

    ``given`` are its parameters by name; what the space does not have is a seed.
    """
    chosen: dict[str, Any] = {}
    words = []
    for name, value in given.items():
        each = space.get(name)
        if isinstance(each, Choices):
            sent = [_sent(*pair) for pair in zip(*_both(each), strict=True)]
            at = sent.index(value)
            chosen[name], word = each.choices[at], each.words[at]
        elif each is None:
            chosen[name], word = value, str(value)
        else:
            chosen[name] = int(value) if each.is_integer else float(value)
            word = each.word(value)
        words.append(f"{name}={word}")
    return chosen, tuple(words)


def how_to_start(path: str, project: str | None, entity: str | None) -> list[str]:
    """Return the commands that run a definition where there is a key."""
    place = [f"--project={project}"] if project else []
    place += [f"--entity={entity}"] if entity else []
    return [
        shlex.join(["wandb", "sweep", *place, path]),
        "wandb agent ID    # as often as points are to run at a time, on any machine",
    ]
