"""A config out of a plain tree or a run's directory, and back."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from shardwright.train.config.messages import problems
from shardwright.train.config.run import RunConfig
from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import RESUMES, RUN_CONFIG

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same in C, where PyYAML was built with it: ten times as fast, for tables of many runs."""


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of a tree by their dotted keys; an empty section has none. Pure."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def from_tree(tree: Any, typed: Collection[str] | None = None) -> RunConfig:
    """Validate a plain tree of values; raise UserError with one line for each problem.

    ``typed`` are the keys that a command line itself has, where the tree is composed of one.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(problems(error.errors(), typed))) from None


"""Folder of a run with the config of each resume, <n>.yaml; config.yaml stays as it was."""


def load(run_dir: Path) -> RunConfig:
    """Read the config that a run has now: that of its last resume, or the one frozen first.

    Its ``run_dir`` is where it lies now.
    """
    resumes = [p for p in (run_dir / RESUMES).glob("*.yaml") if p.stem.isdecimal()]
    path = max(resumes, key=lambda p: int(p.stem), default=run_dir / RUN_CONFIG)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
    except OSError as error:
        raise UserError(
            f"{run_dir} is not a run directory: cannot read {path} ({error.strerror}); "
            "give the directory that `shardwright train` printed"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged, it does not parse as YAML: {error}") from None
    if isinstance(tree, dict):
        tree = {**_as_it_was_meant(tree), "run_dir": os.path.abspath(run_dir)}
    return from_tree(tree)


def _as_it_was_meant(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a frozen tree with what held before there was a field for it. Pure.

    A run's own numbers depend on it, so that today's default is none of a run that has begun.
    """
    data = tree.get("data")
    if not isinstance(data, dict):
        return tree
    # Documents of a sample saw each other; a line never saw another, and was padded.
    before = {"document_attention": bool(data.get("line_by_line")), "unpad": False}
    return {**tree, "data": {**before, **data}}


def to_yaml(config: RunConfig) -> str:
    """Return the config as YAML text that ``from_tree`` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
