"""The child process that looks at models: the launcher has no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.plan.facts import ModelFacts, Traced
from shardwright.train.program import package_environment

Looked = tuple[ModelFacts, list[Traced]]
"""What a model is made of, and traces."""


def facts_of(config: RunConfig) -> ModelFacts:
    """Return what a run's model is made of; raise UserError where it cannot be built."""
    return looked_at(config, [])[0]


def looked_at(config: RunConfig, autocasts: Sequence[bool]) -> Looked:
    """Return what a run's model is made of, and traces of its micro-batch.

    There is one for each of ``autocasts``. Raises UserError where the model cannot be built.
    """
    return looked_at_each([(config, autocasts)])[0]


def looked_at_each(asked: Sequence[tuple[RunConfig, Sequence[bool]]]) -> list[Looked]:
    """Return the same of several runs, by two children beside each other where that is faster."""
    lines = [
        {"config": config.model_dump(mode="json"), "autocasts": list(autocasts)}
        for config, autocasts in asked
    ]
    shares = [lines[::2], lines[1::2]]
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda share: _answers(share) if share else [], shares)
    answers = [answer for pair in zip_longest(first, second) for answer in pair if answer]
    return [
        (
            ModelFacts.of_json(answer["facts"]),
            [Traced(**found) for found in answer.get("traced", [])],
        )
        for answer in answers
    ]


def _answers(asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    # Of the machine that plans it is no matter which devices it has.
    environment = {**os.environ, **package_environment(os.environ), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "shardwright.train.plan"],
        input="".join(json.dumps(each) + "\n" for each in asked),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the model cannot be looked at without training it: {last}")
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for answer in answers:
        if "error" in answer:
            raise UserError(answer["error"])
    return answers
