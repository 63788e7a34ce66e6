"""What is wrong with the parts of the user's own that a run names, found before a rank starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shardwright.launchers.machine.names import config_json
from shardwright.train import own_parts
from shardwright.train.config import NamedModel, RunConfig
from shardwright.train.config.own import CALLBACKS, LOSS, OPTIMIZER, named
from shardwright.train.errors import UserError
from shardwright.train.program import package_environment
from shardwright.train.run_directory.names import RUN_CONFIG

TRIED = (CALLBACKS, OPTIMIZER, LOSS)
"""What a rank imports; the others have processes of their own, which say what is wrong."""


def problems(config: RunConfig) -> Iterator[str]:
    """Yield a message for each part that is not there, cannot be imported or does not fit, and for
    what a model that brings its own config does not take.

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
    names = [f"{key}={text}" for key, text in tried]
    if _is_model_to_try(config):
        names.append(f"model.name={config.model.name}")  # type: ignore[union-attr]
    if names and not found:
        # A part may bring something from a hub; what a model is made of is here already.
        yield from _of_child(config, names, {} if tried else {"HF_HUB_OFFLINE": "1"})


def _is_model_to_try(config: RunConfig) -> bool:
    """Return whether a model's own config, which is here, is to be changed by a run that begins.

    What is not here yet, or has begun, whoever prepares the data has looked at or will.
    """
    model, run_dir = config.model, Path(str(config.run_dir))
    if not isinstance(model, NamedModel) or not model.changes_its_config:
        return False
    is_here = config_json(model.name, model.revision, os.environ) is not None
    return is_here and not (run_dir / RUN_CONFIG).is_file()


def _of_child(config: RunConfig, names: Sequence[str], more: Mapping[str, str]) -> list[str]:
    environment = {**os.environ, **package_environment(os.environ)}
    ended = subprocess.run(
        [sys.executable, "-m", "shardwright.train.own_trial"],
        input=json.dumps(config.model_dump(mode="json")),
        env={**environment, "CUDA_VISIBLE_DEVICES": "", **more},
        capture_output=True,
        text=True,
    )
    if ended.returncode != 0:
        last = (ended.stderr.strip().splitlines() or ["nothing was said"])[-1]
        listed = ", ".join(names)
        return [f"{listed}: the process that was to try them has ended: {last}"]
    answers: list[str] = json.loads(ended.stdout)
    return answers
