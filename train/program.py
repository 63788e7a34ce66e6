"""The program as its user has to call it: what is printed to be run works from any directory."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import shardwright

NAME = "shardwright"
PACKAGES = Path(shardwright.__file__).resolve().parents[1]
"""The folder from which `shardwright` is imported."""


def command(*words: str) -> str:
    """Return a line for a shell that runs `shardwright WORD...`, whatever lies beside the user."""
    script = Path(sysconfig.get_path("scripts")) / NAME
    return " ".join([program(script, shutil.which(NAME)), *map(shlex.quote, words)])


def program(script: Path, found: str | None) -> str:
    """Return how the installed ``script`` is called, where a shell finds ``found`` by its name.

    From a checkout that is not installed the package itself is run: by a path, as the user's own
    directory may hold modules of the same names.
    """
    if not script.exists():
        settings: Mapping[str, str] = {"PYTHONPATH": str(PACKAGES), "PYTHONSAFEPATH": "1"}
        given = " ".join(f"{name}={shlex.quote(value)}" for name, value in settings.items())
        return f"env {given} {shlex.quote(sys.executable)} -m shardwright"
    if found is not None and script.samefile(found):
        return NAME
    return shlex.quote(str(script))


IMPORTS = ("PYTHONPATH", "PYTHONSAFEPATH")
"""By which `shardwright` is found whatever the user has set: an empty PYTHONSAFEPATH is none."""


def package_environment(user: Mapping[str, str], *, packages: Path = PACKAGES) -> dict[str, str]:
    """Return the variables with which a child finds this very `shardwright`.

    `python -m` looks into the working directory first, where a user may well have another.
    """
    path = [str(packages), *filter(None, user.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(dict.fromkeys(path))}


def version() -> str:
    """Return the installed release of the package, or that there is none."""
    import importlib.metadata

    try:
        return importlib.metadata.version("shardwright")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed, running from a checkout)"
