"""`tracking=trackio`: a database of this machine's, which `trackio show` draws."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from shardwright.train.config.tracking import TrackioTracking
from shardwright.train.run_directory.names import METRICS, TRACKIO_FOLDER
from shardwright.train.tracking.lines import Line, Missing, Point, Tail, points
from shardwright.train.tracking.tracker import Target, Tracker

DEFAULTS = {
    # Whoever writes a run's database is alone, and WAL does not work on file systems of networks.
    "TRACKIO_SQLITE_JOURNAL_MODE": "delete",
}


class Trackio(Tracker[TrackioTracking]):
    """Writes by trackio's storage itself: its `log` takes no time, and drops what it cannot write.

    trackio 0.43, run.py: threads of its own warn of a failure and go on.
    """

    name = "Trackio"

    def open(self) -> Target:
        folder = self.run_dir / TRACKIO_FOLDER
        directory = self.section.directory or os.environ.get("TRACKIO_DIR") or str(folder)
        os.environ["TRACKIO_DIR"] = directory  # read once, by the import
        for variable, value in DEFAULTS.items():
            os.environ.setdefault(variable, value)
        project, run_id = self.section.project, self.run_id(TRACKIO_FOLDER)
        self.say(f"TRACKIO_DIR={shlex.quote(directory)} trackio show --project {project}")
        lines = Tail(self.run_dir / METRICS).lines()
        config = self.config.model_dump(mode="json", by_alias=True)
        return _Rows(project, self.config.name, run_id, config, there(project, run_id, lines))


def there(project: str, run_id: str, lines: Iterable[Line]) -> list[Point]:
    """Return which points a run has; none where metrics.jsonl has others, as it is removed then."""
    from trackio.sqlite_storage import SQLiteStorage

    found = {
        (name, row["step"]): (value, row["timestamp"])
        for row in SQLiteStorage.get_logs(project, run_id=run_id)
        for name, value in row.items()
        if name not in ("step", "timestamp")
    }
    wanted = {key: (value, _iso(time)) for key, (value, time) in points(lines).items()}
    if all(wanted.get(key) == point for key, point in found.items()):
        return list(found)
    if not SQLiteStorage.delete_run(project, "", run_id=run_id):
        raise OSError(f"trackio cannot rewrite run {run_id} of {project}")
    return []


class _Rows:
    """The rows of one run in trackio's database."""

    def __init__(
        self, project: str, name: str, run_id: str, config: dict[str, Any], found: list[Point]
    ) -> None:
        self._project, self._name, self._run_id = project, name, run_id
        self._config: dict[str, Any] | None = config
        self._missing = Missing(found)
        self._waiting: list[tuple[dict[str, float], int, float]] = []

    def write(self, line: Line) -> None:
        if new := self._missing.of(line):
            self._waiting.append((new, line["step"], line["time"]))

    def caught_up(self) -> None:
        if not self._waiting:
            return
        from trackio.sqlite_storage import SQLiteStorage

        values, steps, times = map(list, zip(*self._waiting, strict=True))
        SQLiteStorage.bulk_log(
            self._project,
            self._name,
            values,
            steps,
            [_iso(time) for time in times],
            config=self._config,
            # Of a row that comes to a Space twice, `trackio sync` keeps one by this.
            log_ids=[f"{self._run_id}-{step}-{'-'.join(row)}" for row, step, _ in self._waiting],
            run_id=self._run_id,
        )
        self._waiting, self._config = [], None

    def finish(self, outcome: str) -> None:
        pass  # a run has no state there

    def discard(self) -> None:
        pass  # the next one looks at what has come


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
