"""transformers' own example scripts, as shipped with the version that is installed.

They are no part of its package: they are taken from a folder, or downloaded once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path

from shardwright.train.errors import UserError

FOLDER = "examples/pytorch/language-modeling"
SCRIPTS = ("run_mlm.py", "run_clm.py")
NEEDED = ("evaluate",)
"""Packages that the scripts import and transformers does not bring."""
DOWNLOAD_SECONDS = 30


def find(folder: Path | None) -> Path:
    """Return the folder of the scripts: the one given, or the cache's, filled where it is empty.

    Raises UserError where they are not to be had, with what to do.
    """
    installed = version("transformers")
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"the example scripts of transformers import {', '.join(lacking)}, which is not "
            f"installed; pip install {' '.join(lacking)}"
        )
    if folder is not None:
        if absent := [name for name in SCRIPTS if not (folder / name).is_file()]:
            raise UserError(
                f"--examples {folder} has no {' and no '.join(absent)}; give the folder {FOLDER} "
                f"of transformers' sources at v{installed}"
            )
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = cache / "shardwright" / "benchmarks" / f"transformers-{installed}"
    for name in SCRIPTS:
        if not (place / name).is_file():
            _download(name, installed, place)
    return place


def _download(name: str, installed: str, place: Path) -> None:
    address = f"https://raw.githubusercontent.com/huggingface/transformers/v{installed}/{FOLDER}"
    try:
        with urllib.request.urlopen(f"{address}/{name}", timeout=DOWNLOAD_SECONDS) as answer:
            content = answer.read()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        raise UserError(
            f"the example script {name} of transformers {installed} is not here and cannot be "
            f"downloaded ({error}); give the folder {FOLDER} of its sources at v{installed} with "
            "--examples DIR"
        ) from error
    place.mkdir(parents=True, exist_ok=True)
    temporary = place / f".{name}.{os.getpid()}"
    temporary.write_bytes(content)
    temporary.replace(place / name)


def hashes(folder: Path) -> dict[str, str]:
    """Return which scripts were measured, by their SHA-256."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in SCRIPTS}
