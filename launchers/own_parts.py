"""What is wrong with the parts of the user's own that a run names, found before a rank starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

from shardwright.train import own_parts
from shardwright.train.config import RunConfig
from shardwright.train.config.own import CALLBACKS, LOSS, OPTIMIZER, named
from shardwright.train.errors import UserError
from shardwright.train.program import package_environment

TRIED = (CALLBACKS, OPTIMIZER, LOSS)
"""What a rank imports; the others have processes of their own, which say what is wrong."""


def problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each part that is not there, cannot be imported or does not fit.

    They are imported in a child: they bring torch, and are to leave nothing in this process.
    """
    tried = [(key, text) for key, text in named(config) if key in TRIED]
    found = []
    for key, text in tried:
        try:
            own_parts.check(key, text)
        except UserError as error:
            found.append(str(error))
    yield from found
    if tried and not found:
        yield from _of_child(config)


def _of_child(config: RunConfig) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-m", "shardwright.train.own_trial"],
        input=json.dumps(config.model_dump(mode="json")),
        env={**os.environ, **package_environment(os.environ), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
        names = ", ".join(f"{key}={text}" for key, text in named(config) if key in TRIED)
        return [f"{names}: the process that was to try them has ended: {last}"]
    answers: list[str] = json.loads(ended.stdout)
    return answers
