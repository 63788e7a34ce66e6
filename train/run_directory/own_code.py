"""The code of the user's own that each start of a run has had, and what of it has changed since."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from shardwright.train import own_files, own_parts
from shardwright.train.config import RunConfig
from shardwright.train.config.own import named
from shardwright.train.errors import UserError
from shardwright.train.own_parts import Part
from shardwright.train.run_directory import history

FIELD = "own_code"
"""In a start's provenance: what `of` has returned then."""
IMPORTS = "model.import"
Code = Mapping[str, Mapping[str, Any]]


def of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return file, hash and version of each part that a config names, by field and name.

    And file and hash of what that file imports of the user's own. A part that is not there is left
    out.
    """
    parts = [own_parts.part(key, text) for key, text in named(config)]
    parts += [Part(IMPORTS, module, module) for module in config.model.imports]
    found = {}
    for part in parts:
        with suppress(UserError, OSError):
            path = own_parts.file_of(part)
            found[f"{part.key}: {part.name}"] = {
                **_noted(path),
                **({} if part.is_path else {"version": _version(part.module)}),
                "imports": {n: _noted(p) for n, p in own_files.imported_by(part).items()},
            }
    return found


def _noted(path: Path) -> dict[str, str]:
    return {"file": str(path), "hash": own_parts.hash_of(path)}


def noted(run_dir: Path) -> Code:
    """Return what the last start has noted; nothing where it knew of none."""
    starts = history.provenances(run_dir)
    try:
        tree = json.loads(starts[-1].read_text(encoding="utf-8")) if starts else {}
    except (OSError, ValueError):
        return {}
    found: Any = tree.get(FIELD) if isinstance(tree, dict) else None
    return found if isinstance(found, dict) else {}


def changes(before: Code, now: Code) -> Iterator[str]:
    """Yield what of the parts of two starts is another one, whose names are the same. Pure."""
    for name, part in now.items():
        old = before.get(name)
        if not isinstance(old, Mapping):
            continue
        if old.get("version") != part.get("version"):
            yield f"{name} is of version {part.get('version')}, and was of {old.get('version')}"
            continue
        if old.get("hash") != part["hash"]:
            yield f"{name} has changed since the run's last start ({part['file']})"
        for module, file in part["imports"].items():
            # One that is new has come with a change of a file that imports it.
            if (had := old.get("imports", {}).get(module)) and had["hash"] != file["hash"]:
                yield (
                    f"{module}, which {name} imports, has changed since the run's last start "
                    f"({file['file']})"
                )


def _version(module: str) -> str | None:
    """Return the version of the package that a module is installed by, if any."""
    for name in metadata.packages_distributions().get(module.partition(".")[0], ()):
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None
