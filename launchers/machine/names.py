"""What the name of a model, a tokenizer or a run means on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.train.checkpoint.format.layout import MANIFEST
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute, is_path
from shardwright.train.run_directory import final
from shardwright.train.run_directory.names import RUN_CONFIG, TOKENIZER_FOLDER


def following(path: Path) -> Path:
    """Return the name to try after one that is taken: NAME-2 after NAME. Pure."""
    name, dash, number = path.name.rpartition("-")
    # The time in a name is two numbers of six and eight digits.
    if dash and re.fullmatch(r"[1-9]\d{0,4}", number):
        return path.with_name(f"{name}-{int(number) + 1}")
    return path.with_name(f"{path.name}-2")


def free(path: Path) -> Path:
    """Return the first of a path and those that follow it at which there is nothing yet."""
    while os.path.lexists(path):
        path = following(path)
    return path


def pretrained(name: str, role: str) -> str:
    """Return the directory that the name of a model or a tokenizer (``role``) means here.

    A run directory means its final/, or its tokenizer/; a name of the hub is returned as it is.
    Raises UserError where there is no such directory, or it holds none of them.
    """
    if not os.path.isdir(os.path.expanduser(name)) and not is_path(name):
        return name
    path, key = Path(absolute(name)), f"{role}.name={name}"
    own = "config.json" if role == "model" else "tokenizer_config.json"
    if (path / MANIFEST).is_file():
        run_dir = path.parent.parent
        if role == "tokenizer" and (run_dir / TOKENIZER_FOLDER).is_dir():
            return str(run_dir / TOKENIZER_FOLDER)
        raise UserError(
            f"{key} is a checkpoint, in the shards of the engine that trained it; make a model "
            f"directory with `shardwright recover {shlex.quote(str(path))} OUT`, and give that"
        )
    if not (path / RUN_CONFIG).is_file() or (path / own).is_file():
        return str(path)
    if role == "tokenizer" and (path / TOKENIZER_FOLDER).is_dir():
        return str(path / TOKENIZER_FOLDER)
    if (made := final.of(path)) is not None:
        return str(made)
    if (earlier := final.earlier(path)) is not None:
        raise UserError(f"{key}: {final.why_earlier(path, earlier)}")
    raise UserError(
        f"{key} is a run that has no final/, which is written when it ends; make a model directory "
        f"of its newest checkpoint with `shardwright recover {shlex.quote(str(path))} OUT`, and "
        "give that"
    )


def config_json(
    name: str, revision: str | None, environment: Mapping[str, str]
) -> dict[str, Any] | None:
    """Return the config.json of a model directory, or of the hub's cache; None where there is none.

    Asks no network: where the model is not here yet, the ranks find out.
    """
    directory = Path(absolute(name))
    path: Path | None = directory / "config.json"
    if not directory.is_dir():
        path = _cached(name, revision or "main", environment)
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _cached(name: str, revision: str, environment: Mapping[str, str]) -> Path | None:
    """Return where huggingface_hub 2.4 keeps a model's config.json, whether it is there or not.

    It is not asked itself: importing it takes as long as all the rest of the launcher.
    """
    home = environment.get("XDG_CACHE_HOME") or "~/.cache"
    home = environment.get("HF_HOME") or os.path.join(home, "huggingface")
    given = (environment.get(variable) for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
    cache = next(filter(None, given), os.path.join(home, "hub"))
    folder = Path(os.path.expanduser(os.path.expandvars(cache)))
    folder /= f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / revision).read_text().strip()
    except (OSError, ValueError):
        commit = revision
    return folder / "snapshots" / commit / "config.json"
