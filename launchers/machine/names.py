"""What the name of a model, a tokenizer or a run means on this machine."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.train import config as run_config
from shardwright.train.checkpoint.format.layout import (
    MANIFEST,
    Manifest,
    NotWhole,
    check_sizes,
    remedy,
    step_of,
)
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.checkpoint.retention import best, saved_in
from shardwright.train.config.tokenizer import TIKTOKEN
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute, is_path
from shardwright.train.run_directory import final
from shardwright.train.run_directory.names import (
    CHECKPOINTS,
    ENGINE_FOLDER,
    RUN_CONFIG,
    TOKENIZER_FOLDER,
)


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


def tokenizer(name: str) -> str:
    """Return the directory, or the rank file, that the name of a tokenizer means here.

    A run directory, or a checkpoint in one, means its tokenizer/; a name of the hub is returned as
    it is. Raises UserError where there is no such directory, or it holds none.
    """
    if name.endswith(TIKTOKEN):
        return absolute(name)
    if not _is_here(name):
        return name
    path, key = Path(absolute(name)), f"tokenizer.name={name}"
    run_dir = run_of(path)
    if run_dir is None or (path / "tokenizer_config.json").is_file():
        return str(path)
    if (run_dir / TOKENIZER_FOLDER).is_dir():
        return str(run_dir / TOKENIZER_FOLDER)
    if (made := final.of(run_dir)) is not None:
        return str(made)
    raise UserError(
        f"{key} belongs to a run that has no {TOKENIZER_FOLDER}/ yet, which is made before its "
        "first step; give another tokenizer, or wait for it"
    )


def model(name: str, step: int | str | None = None) -> str:
    """Return the directory that the name of a pretrained model means here.

    A run directory means its final/, or the checkpoint of ``step``: latest, which is also what it
    means without a final/, best, or a number. A name of the hub is returned as it is. Raises
    UserError where there is no such directory, or it holds none of them.
    """
    key = f"model.name={name}"
    path = Path(absolute(name)) if _is_here(name) else None
    run_dir = path and run_of(path)
    if step is not None and (path is None or run_dir != path):
        raise UserError(
            f"model.step={step} chooses among the checkpoints of a run, and {key} is not a run "
            "directory; leave model.step out, or give the run directory"
        )
    if path is None:
        return name
    if run_dir != path or (path / "config.json").is_file():
        return str(path)
    if step is None and (made := final.of(path)) is not None:
        return str(made)
    return str(_checkpoint_of(path, "latest" if step is None else step, key))


def run_of(path: Path) -> Path | None:
    """Return the run that a directory is, or whose checkpoint it is; None where it is neither."""
    for run_dir in (path, path.parent.parent):
        if (run_dir / RUN_CONFIG).is_file():
            return run_dir if run_dir == path or (path / MANIFEST).is_file() else None
    return None


def _is_here(name: str) -> bool:
    return os.path.isdir(os.path.expanduser(name)) or is_path(name)


def _checkpoint_of(run_dir: Path, step: int | str, key: str) -> Path:
    """Return a whole checkpoint of a run. Raises UserError naming what there is."""
    listing = Listing(run_dir / CHECKPOINTS)
    whole = [at for at in listing.named if isinstance(listing.found(at), Manifest)]
    if not whole:
        wrong = [f"checkpoint-{at} is not whole: {listing.found(at)}" for at in listing.named]
        raise UserError(
            f"{key} is a run that has no final/ and no whole checkpoint"
            f"{f' ({wrong[-1]})' if wrong else ''}: there are no weights to start from; "
            f"`shardwright resume {shlex.quote(str(run_dir))}` continues it up to one "
            "(trainer.save_every_steps), or give another run"
        )
    if step == "latest":
        found = whole[-1]
    elif step == "best":
        rule = run_config.load(run_dir).checkpoint
        order = best(saved_in(listing), rule)
        if not order:
            raise UserError(
                f"model.step=best: no checkpoint of {run_dir} was evaluated by {rule.best_metric}, "
                "so none is the best; set model.step=latest, or a step"
            )
        found = order[0]
    else:
        found = int(step)
        if found not in whole:
            why = "is not whole" if found in listing.named else "is not there"
            raise UserError(
                f"model.step={step}: checkpoint-{step} of {run_dir} {why}; it has "
                f"{', '.join(map(str, whole))}"
            )
    return listing.named[found]


def unusable_checkpoint(name: str) -> str | None:
    """Say why a run cannot start from the weights in a checkpoint, or return None.

    To be asked before it starts, and not where it is resumed: then it has checkpoints of its own.
    """
    path = Path(name)
    lies_in_a_run = step_of(path) is not None and (path.parent.parent / RUN_CONFIG).is_file()
    if not (path / MANIFEST).is_file() and not (lies_in_a_run and path.is_dir()):
        return None
    try:
        manifest = check_sizes(path)
    except NotWhole as error:
        return (
            f"model.name={path} is not whole: {error}; {remedy([str(error)])}, or give another "
            "checkpoint of that run"
        )
    if manifest.parts > 1:
        return (
            f"model.name={path} is part {manifest.part + 1} of {manifest.parts}, as each node kept "
            f"what its ranks wrote; copy what is in their folders {ENGINE_FOLDER} into one, make a "
            f"model directory of it with `shardwright recover DIR OUT`, and give that"
        )
    return None


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
