"""history.jsonl: a line for each time that a run has gone on, and what it then was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "history.jsonl"
BY_TORCHRUN = "torchrun"
"""An entry's ``by`` where torchrun has started the ranks of the same job again."""


def append(run_dir: Path, entry: Mapping[str, Any]) -> None:
    with (run_dir / FILE).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def read(run_dir: Path) -> list[dict[str, Any]]:
    """Return a run's restarts and resumes, oldest first; lines that a crash cut are left out."""
    path = run_dir / FILE
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries
