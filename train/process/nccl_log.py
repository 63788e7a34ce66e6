"""Have NCCL write down what it finds and chooses, a file for each process. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FILES = "nccl-*.log"
_FILE = "nccl-%h-%p.log"
"""NCCL puts the host and the process in."""


def variables(directory: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Return what has NCCL do so; what the user sets stays, but for the file. Pure."""
    asked = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,GRAPH,ENV,NET"}
    kept = {name: environment.get(name, value) for name, value in asked.items()}
    return {**kept, "NCCL_DEBUG_FILE": str(directory / _FILE)}
