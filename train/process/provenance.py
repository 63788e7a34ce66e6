"""Versions, commit, command and hardware of each start of a run; never a secret."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from shardwright.train.durable import write_text
from shardwright.train.process.cores import usable_cores
from shardwright.train.run_directory import history, own_code

_PACKAGES = (
    "shardwright",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "datasets",
    "tokenizers",
    "hydra-core",
    "numpy",
)


def write_provenance(
    run_dir: Path,
    *,
    world_size: int,
    parameters: int,
    own: own_code.Code,
    packages: Iterable[str] = (),
) -> None:
    """Describe what runs, beside what earlier starts have left; call it on rank 0.

    ``own`` is what `own_code.of` returns, ``packages`` what this run needs that others do not.
    """
    facts: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "argv": sys.orig_argv,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in dict.fromkeys((*_PACKAGES, *packages))},
        "world_size": world_size,
        "parameters": parameters,
        **({own_code.FIELD: own} if own else {}),
        "hardware": {
            "host": platform.node(),
            "system": platform.platform(),
            "cores": len(usable_cores()),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "cuda": torch.version.cuda,
        },
    }
    path = history.next_provenance(run_dir)
    path.parent.mkdir(exist_ok=True)
    write_text(path, json.dumps(facts, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the checkout that this file lies in, marked where it is changed."""
    here = Path(__file__)
    try:
        # An installed copy may lie inside some other project's checkout.
        if _git(here, "ls-files", "--error-unmatch", here.name).returncode:
            return None
        return _git(
            here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def _git(file: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", *arguments], cwd=file.parent, capture_output=True, text=True, timeout=10
    )
