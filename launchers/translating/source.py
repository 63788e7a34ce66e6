"""Which program a file is of, read; and the translation of it, or of a command line."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from shardwright.launchers.translating import (
    accelerate_yaml,
    deepspeed_json,
    starting,
    trainer_line,
)
from shardwright.launchers.translating.translation import Translation
from shardwright.train.config.elsewhere import accelerate_launch
from shardwright.train.config.rules.deepspeed_keys import FREE, OWNED
from shardwright.train.errors import UserError

Kind = Literal["deepspeed", "accelerate"]


def read(path: str) -> dict[str, Any]:
    """Return what a JSON or YAML file holds. Raises UserError."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be read ({reason}); check the name") from None
    try:
        # JSON first: to YAML a number such as 1e-5 is text.
        tree = json.loads(text)
    except ValueError:
        try:
            tree = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is neither JSON nor YAML ({reason}); correct it") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} does not map keys to values; give a config of DeepSpeed or accelerate"
        )
    return tree


def kind_of(tree: Mapping[str, Any], path: str) -> Kind:
    """Tell DeepSpeed's JSON from accelerate's file by their keys. Raises UserError. Pure."""
    of_deepspeed = {name.partition(".")[0] for name in (*OWNED, *FREE)} | {"zero_optimization"}
    keys = set(tree)
    if keys & {"distributed_type", "compute_environment", "num_processes", "fsdp_config"}:
        return "accelerate"
    if keys & of_deepspeed:
        return "deepspeed"
    if any(accelerate_launch.row(key) for key in keys):
        return "accelerate"
    raise UserError(
        f"{path} is a config neither of DeepSpeed nor of accelerate by its keys "
        f"({', '.join(sorted(map(str, keys))[:5])}); give one of those"
    )


def of_file(path: str, ranks: int | None = None, kind: Kind | None = None) -> Translation:
    """Return the translation of a file. Raises UserError where it is of another kind."""
    tree = read(path)
    found = kind_of(tree, path)
    if kind not in (None, found):
        raise UserError(
            f"strategy.path={path} is a config of {found}, not of {kind}; "
            f"choose strategy={found}_file"
        )
    if found == "deepspeed":
        return deepspeed_json.translate(tree, ranks)
    beside = Path(path).expanduser().parent

    def read_beside(name: str) -> dict[str, Any]:
        return read(str(beside / name) if (beside / name).is_file() else name)

    return accelerate_yaml.translate(tree, read_beside)


def of_line(words: Sequence[str]) -> Translation:
    """Return the translation of a command line. Raises UserError where it starts no script."""
    words = shlex.split(words[0]) if len(words) == 1 else words
    before, script, after = starting.divided(words)
    started = starting.translate(before, read)
    return trainer_line.translate(script, trainer_line.arguments(after), started, read)
