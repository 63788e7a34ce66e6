"""The points of a search: proposed by its study, watched while they run, pruned where they lag."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.launchers import runs
from shardwright.launchers.sweep import directory, space
from shardwright.launchers.sweep.directory import PointState
from shardwright.launchers.sweep.places import Proposal
from shardwright.launchers.sweep.space import Space
from shardwright.launchers.sweep.study import Judgement, Study
from shardwright.train import config as run_config
from shardwright.train.errors import UserError
from shardwright.train.run_directory import pruned
from shardwright.train.run_directory.names import METRICS


class Search:
    """Proposes points, for the owner of a sweep's directory."""

    def __init__(
        self,
        sweep: directory.Sweep,
        found: Space,
        is_excluded: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        self._directory, self._config = sweep.directory, sweep.definition
        self._is_excluded = is_excluded
        self._study = Study(sweep.directory / directory.JOURNAL, sweep.definition, found)
        self._is_exhausted = False
        self._growing: dict[int, Growing] = {}

    def propose(self, count: int) -> Sequence[Proposal]:
        """Return up to this many new points, the same ones again as long as they are in no plan."""
        planned = len(directory.read(self._directory).points)
        found = []
        for number in range(planned, min(planned + count, self._most())):
            drawn = self._study.propose(number, self._is_excluded)
            if drawn is None:
                self._is_exhausted = True
                break
            found.append(Proposal(dict(drawn.settings), drawn.overrides, drawn.trial))
        return found

    def _most(self) -> int:
        asked = (self._config.search.trials, self._config.limit, self._study.combinations)
        return min(each for each in asked if each is not None)

    def is_finished(self) -> bool:
        """Return whether all of its trials are in the plan, or nothing new is left to try."""
        planned = len(directory.read(self._directory).points)
        if self._is_exhausted or planned >= self._most():
            return True
        return self._study.is_exhausted(planned)

    def tell(self, state: PointState) -> None:
        """Write down how a point has ended."""
        if state.state == "pruned":
            self._study.tell(state.number, None, is_pruned=True)
            return
        if state.state == "done":
            self._judge(state.number)  # others are compared with all of its evaluations
            pruned.forget(self._directory / str(state.number))  # that came too late
        values = [state.values.get(each.metric, math.nan) for each in self._config.objectives]
        self._study.tell(state.number, values if state.state == "done" else None)

    def prune(self, number: int) -> str | None:
        """Return why a point is not worth its time, and say so in its run directory."""
        judged = self._judge(number)
        if judged is None:
            return None
        run_dir, metric = self._directory / str(number), self._config.objectives[0].metric
        trial = self._study.trial_of(number)
        if pruned.read(run_dir) is None and trial is not None and run_dir.is_dir():
            value = judged.value if math.isfinite(judged.value) else None
            why = judged.reason
            pruned.Pruned(judged.step, metric, value, why, trial.number, time.time()).write(run_dir)
        return f"{metric} of {judged.reason}"

    def _judge(self, number: int) -> Judgement | None:
        if self._config.search.pruner == "none":
            return None
        run_dir, metric = self._directory / str(number), self._config.objectives[0].metric
        growing = self._growing.setdefault(number, Growing(run_dir / METRICS))
        return self._study.judge(number, growing.values(metric), _last_step(run_dir))


def _last_step(run_dir: Path) -> int | None:
    try:
        return runs.known_steps(run_dir, run_config.load(run_dir), runs.logged(run_dir))
    except UserError:
        return None  # it is being made


@dataclass
class Growing:
    """metrics.jsonl of a run that lives, of which each look reads what is new."""

    path: Path
    _lines: list[dict[str, Any]] = field(default_factory=list)
    _read_bytes: int = 0
    _file: int | None = None

    def values(self, metric: str) -> list[tuple[int, float]]:
        """Return steps and values of a metric so far; one that is not finite is NaN."""
        self._read()
        found = {
            line["step"]: math.nan if line[metric] is None else float(line[metric])
            for line in self._lines
            if metric in line
        }
        return sorted(found.items())

    def _read(self) -> None:
        try:
            with self.path.open("rb") as file:
                # A resume writes the file anew, without the lines that come again.
                if self._file != (inode := self.path.stat().st_ino):
                    self._file, self._read_bytes, self._lines = inode, 0, []
                file.seek(self._read_bytes)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self._read_bytes += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            # Lines of training are many, and nothing is judged by them.
            if isinstance(entry, dict) and "step" in entry and any(k[:5] == "eval_" for k in entry):
                self._lines.append(entry)


def checked_points(found: Space) -> list[Proposal]:
    """Return points to be composed and checked before a search begins; they are not run."""
    return [Proposal(each, space.overrides(found, each)) for each in space.probes(found)]
