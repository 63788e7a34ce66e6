"""The metrics by which points are compared: which of them a run logs. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from shardwright.launchers.sweep.definition import Objective
from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError

OF_TRAINING = (
    *("loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "peak_memory_bytes"),
    "auxiliary_loss",
)
OF_EVALUATIONS = (
    *("eval_loss", "eval_perplexity", "eval_bits_per_byte", "eval_masked_accuracy"),
    "eval_own_loss",
)
OF_A_SOURCE = "eval_loss/"
"""Begins the name of the held-out loss of one source, where there are several."""
NOT_COMPARED = (
    *("step", "samples", "tokens", "time", "profiled_steps"),
    *("allocated_memory_bytes", "reserved_memory_bytes"),
    "sent_bytes_per_second",
    *("compute_seconds", "wait_seconds", "data_seconds"),
    *("compute_most_rank", "wait_most_rank", "data_most_rank"),
)
"""What else a line of metrics.jsonl has; of names with a slash, what stands before it."""


def problem(metric: str, config: RunConfig) -> str | None:
    """Return why no run of a config logs a metric, where that is known before it runs. Pure."""
    start = f"sweep.objectives: {metric} "
    if metric.startswith("eval_") and not config.data.is_evaluated:
        return (
            f"{start}is told by evaluations, and nothing is held out; set data.eval_fraction or "
            "data.eval_paths, or compare by loss"
        )
    if metric == "eval_masked_accuracy" and config.objective.kind != "mlm":
        return f"{start}is for masked models, and objective={config.objective.kind}; use eval_loss"
    if metric == "eval_own_loss" and config.objective.loss is None:
        return f"{start}is that of objective.loss, which is null; use eval_loss"
    if metric.startswith(OF_A_SOURCE):
        return None  # which sources there are, the data tell
    known = (*OF_EVALUATIONS, *OF_TRAINING)
    if metric in known:
        return None
    near = difflib.get_close_matches(metric, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}? there" if near else "there"
    return (
        f"{start}is nothing that a run logs; {hint} are {', '.join(known)}, and {OF_A_SOURCE}NAME "
        "for each of several sources"
    )


def check(objectives: Iterable[Objective], configs: Iterable[RunConfig]) -> None:
    """Raise UserError where points could not be compared, each reason once."""
    found = dict.fromkeys(
        text
        for config in configs
        for each in objectives
        if (text := problem(each.metric, config)) is not None
    )
    if found:
        raise UserError("\n".join(found))


def missing(logged: Mapping[str, Any], objectives: Iterable[Objective]) -> str | None:
    """Say which objective a run that is done has not told, and what it has; None where all. Pure.

    ``logged`` is each value that it has logged last; one that was not finite is None there.
    """
    for each in objectives:
        if each.metric not in logged:
            there_are = ", ".join(
                name for name in sorted(logged) if name.partition("/")[0] not in NOT_COMPARED
            )
            return (
                f"it has not logged {each.metric}, by which sweep.objectives compares; what it has "
                f"logged is {there_are or 'nothing'}"
            )
    return None
