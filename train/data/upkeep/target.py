"""What a command is to look at: a run's data, or an entry of the cache by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.train import config as run_config
from shardwright.train.config import RunConfig
from shardwright.train.data.arranged import ROWS
from shardwright.train.data.tokens import cache, uses
from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import DATA_JSON, RUN_CONFIG, TOKENIZER_FOLDER

TOKENS, TOKENIZERS, DOWNLOADS = "tokens", "tokenizers", "downloads"
KINDS = (TOKENS, TOKENIZERS, DOWNLOADS, ROWS)
"""The folders of a cache whose entries are built once."""


class Run(NamedTuple):
    """A run whose data is prepared."""

    directory: Path
    config: RunConfig


class Target(NamedTuple):
    """An entry of the cache, and a run that uses it where one is known."""

    entry: Path
    run: Run | None


def target_of(path: Path) -> Target:
    """Return what a path means. Raises UserError where it is neither a run nor an entry."""
    path = path.absolute()
    if (path / RUN_CONFIG).is_file():
        config = run_config.load(path)
        name = tokens_of(path)
        if name is None:
            raise UserError(not_prepared(path))
        return Target(cache.cache_root(config.data) / TOKENS / name, Run(path, config))
    if not (path / cache.INDEX).is_file():
        raise UserError(
            f"{path} is neither a run directory, which has a {RUN_CONFIG}, nor an entry of the "
            f"cache, which has an {cache.INDEX}; give the directory that `shardwright train` "
            f"printed, or one of those in {cache.default_root() / TOKENS}"
        )
    return Target(path, _run_of(path))


def _run_of(entry: Path) -> Run | None:
    """Return a run that has opened an entry, and still names it."""
    for user in uses.users(entry.parent, entry.name):
        if tokens_of(user.run_dir) == entry.name:
            try:
                return Run(user.run_dir, run_config.load(user.run_dir))
            except UserError:  # of another version: the entry can be looked at without
                continue
    return None


def tokens_of(run_dir: Path) -> str | None:
    """Return the name of the entry that a run trains on; None where it has noted none."""
    return next(iter(entries_of(run_dir)), None)


def entries_of(run_dir: Path) -> list[str]:
    """Return the names of all entries of tokens that a run uses, first that of its training."""
    try:
        noted = json.loads((run_dir / DATA_JSON).read_text(encoding="utf-8"))
        held_out = noted.get("eval_paths", {}).values()
        return [str(noted["tokens"]), *(str(each["tokens"]) for each in held_out)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def vocabulary_of(target: Target) -> int | None:
    """Return one more than the highest id of a run's tokenizer; None where none is known."""
    if target.run is None:
        return None
    try:
        path = target.run.directory / TOKENIZER_FOLDER / "tokenizer.json"
        tree = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = tree["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max((*ids, *(token["id"] for token in tree["added_tokens"]))) + 1
    except (OSError, ValueError, KeyError, TypeError):
        return None


def not_prepared(run_dir: Path) -> str:
    """Say that a run has no tokens yet. Pure."""
    return (
        f"{run_dir} has no {DATA_JSON} yet: its data is not prepared; start the run, or wait until "
        "it has prepared it"
    )


def index_of(entry: Path) -> dict[str, Any]:
    """Return the index of an entry. Raises UserError where it cannot be read."""
    try:
        index = json.loads((entry / cache.INDEX).read_text(encoding="utf-8"))
        if isinstance(index["files"], dict) and isinstance(index["details"], dict):
            return dict(index)
        raise ValueError("it has no files and details")
    except FileNotFoundError:
        raise UserError(
            f"{entry} is not in the cache (any more); `shardwright resume` prepares a run's tokens "
            "again from its corpus"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{entry / cache.INDEX} cannot be read ({error}); remove {entry}, and it is built again"
        ) from None
