"""The child process that looks at models: the launcher has no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.plan.facts import ModelFacts, Traced
from shardwright.train.program import package_environment


def facts_of(config: RunConfig) -> ModelFacts:
    """Return what a run's model is made of; raise UserError where it cannot be built."""
    return looked_at(config, [])[0]


def looked_at(config: RunConfig, autocasts: Sequence[bool]) -> tuple[ModelFacts, list[Traced]]:
    """Return what a run's model is made of, and traces of its micro-batch.

    There is one for each of ``autocasts``. Raises UserError where the model cannot be built.
    """
    answer = _answer({"config": config.model_dump(mode="json"), "autocasts": list(autocasts)})
    traces = [Traced(**found) for found in answer.get("traced", [])]
    return ModelFacts.of_json(answer["facts"]), traces


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    # Of the machine that plans it is no matter which devices it has.
    environment = {**os.environ, **package_environment(os.environ), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "shardwright.train.plan"],
        input=json.dumps(asked),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"the model cannot be looked at without training it: {last}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer
