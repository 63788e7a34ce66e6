"""By files of a run directory: who asks ranks to show themselves, and what they have shown."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardwright.train.diagnosis.beats import Beat
from shardwright.train.diagnosis.report import Report
from shardwright.train.durable import write_text
from shardwright.train.run_directory import names


@dataclass(frozen=True)
class Request:
    """What the watchers of all nodes are asked."""

    id: str
    """The name of the folder for the answers."""
    by: str
    """Who asks, a node's name and a process."""
    time: float
    is_hang: bool = False
    """Whether a rank has not moved for too long, and the run is to end if that is so."""
    ends: bool = False
    """Whether all ranks are to end now."""


def prepare(run_dir: Path) -> None:
    """Make the file by which watchers are asked: NFS takes long to tell of one that is new."""
    folder = run_dir / names.HEARTBEATS
    folder.mkdir(exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    os.close(os.open(folder / names.DIAGNOSIS_REQUEST, flags, 0o644))


def publish(run_dir: Path, request: Request) -> Path:
    """Ask the watchers of all nodes; return the folder in which they answer. Raises OSError."""
    answers = run_dir / names.DIAGNOSIS / request.id
    answers.mkdir(parents=True, exist_ok=True)
    data = json.dumps(asdict(request)).encode()
    # In place: who has opened it before reads what is in it now.
    path = run_dir / names.HEARTBEATS / names.DIAGNOSIS_REQUEST
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)
    return answers


def asked(run_dir: Path) -> Request | None:
    """Return the last request; None where there is none, or it is being written."""
    with suppress(OSError, ValueError, TypeError):
        return Request(
            **json.loads((run_dir / names.HEARTBEATS / names.DIAGNOSIS_REQUEST).read_text())
        )
    return None


def new_request(host: str, *, is_hang: bool = False) -> Request:
    """Return a request of this process, of a name that sorts by time."""
    began = time.strftime("%Y%m%d-%H%M%S")
    return Request(
        id=f"{began}-{host}-{os.getpid()}",
        by=f"{host}/{os.getpid()}",
        time=time.time(),
        is_hang=is_hang,
    )


# --- what ranks have shown ----------------------------------------------------------------------


def answer(answers: Path, host: str, reports: Sequence[Report]) -> None:
    """Leave what a node's ranks have shown, stacks as files to be read, too. Raises OSError."""
    answers.mkdir(parents=True, exist_ok=True)
    for report in reports:
        text = report.stacks
        for pid, child in report.of_children.items():
            text += f"\n--- process {pid}, below it\n{child}"
        if text:
            write_text(answers / names.stacks(report.beat.rank), text)
    trees = [asdict(report) for report in reports]
    write_text(answers / names.node_beats(host), json.dumps(trees))


def answered(answers: Path) -> dict[str, list[Report]]:
    """Return what ranks have shown, by node."""
    found = {}
    for path in sorted(answers.glob(names.NODE_BEATS)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            reports = [_report(tree) for tree in json.loads(path.read_text())]
            found[path.stem.removeprefix("node-")] = reports
    return found


def _report(tree: Mapping[str, Any]) -> Report:
    return Report(Beat(**tree["beat"]), tree["stacks"], tree["of_children"], tree["collectives"])


def all_answers(run_dir: Path) -> list[Path]:
    """Return the folders of answers, the oldest first."""
    folder = run_dir / names.DIAGNOSIS
    return sorted(path for path in folder.glob("*") if path.is_dir())


def wait_for(answers: Path, hosts: Sequence[str], seconds: float) -> dict[str, list[Report]]:
    """Return what ranks have shown once all these nodes have answered, or after so long."""
    until = time.monotonic() + seconds
    while set(hosts) - set(found := answered(answers)) and time.monotonic() < until:
        time.sleep(0.2)
    return found
