"""history.jsonl: a line for each resume of a run, and what it then was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.train.durable import write_text
from shardwright.train.run_directory.names import HISTORY, PROVENANCE, RESUMES

FILE = HISTORY
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


def cut(run_dir: Path, begins: Callable[[Mapping[str, Any]], bool]) -> None:
    """Remove the last line of which ``begins`` is true, and all behind it."""
    path = run_dir / FILE
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    for number in reversed(range(len(lines))):
        try:
            found = begins(json.loads(lines[number]))
        except ValueError:
            continue
        if found:
            write_text(path, "".join(lines[:number]))
            return


def asked_step(entries: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the step from which the last resume was told to begin, None where it was not. Pure."""
    resumes = [entry for entry in entries if "config" in entry]
    return resumes[-1].get("asked_step") if resumes else None


# --- provenance of each start -------------------------------------------------------------------


def provenances(run_dir: Path) -> list[Path]:
    """Return what each start of a run has noted of its versions and hardware, the first one first.

    provenance.json is that of the first, resumes/<n>.provenance.json that of resume n, and
    resumes/<n>-<k>.provenance.json that of its k-th further start, by torchrun, by a requeued job
    or by hand; n is 0 before the first resume.
    """
    later = {}
    for path in (run_dir / RESUMES).glob(f"*.{PROVENANCE}"):
        if found := re.fullmatch(rf"(\d+)(?:-(\d+))?\.{re.escape(PROVENANCE)}", path.name):
            later[int(found[1]), int(found[2] or 0)] = path
    first = run_dir / PROVENANCE
    return [*([first] if first.exists() else []), *(later[key] for key in sorted(later))]


def next_provenance(run_dir: Path) -> Path:
    """Return where the start that is under way notes its own."""
    if not (run_dir / PROVENANCE).exists():
        return run_dir / PROVENANCE
    numbers = [int(p.stem) for p in (run_dir / RESUMES).glob("*.yaml") if p.stem.isdecimal()]
    number = max(numbers, default=0)
    start = 0 if number else 1
    while (path := _provenance(run_dir, number, start)).exists():
        start += 1
    return path


def _provenance(run_dir: Path, number: int, start: int) -> Path:
    again = f"-{start}" if start else ""
    return run_dir / RESUMES / f"{number}{again}.{PROVENANCE}"
