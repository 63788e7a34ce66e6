"""A run as a row of a table: what it is, how far it is and how well it does."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shardwright.launchers import runs
from shardwright.launchers.columns import seen_from
from shardwright.launchers.composition.options import model_name, strategy_name
from shardwright.launchers.runs import UNREADABLE, Around, State
from shardwright.launchers.sweep import directory
from shardwright.train import config as run_config
from shardwright.train.checkpoint.format import layout
from shardwright.train.errors import UserError
from shardwright.train.run_directory.metrics import held_out
from shardwright.train.run_directory.names import (
    CHECKPOINTS,
    METRICS,
    OWNER,
    PROVENANCE,
    RUN_CONFIG,
)

COLUMNS = (
    *("run", "state", "model", "strategy", "step", "total_steps", "best_eval_loss"),
    *("best_step", "eval_loss", "loss", "tokens_per_second", "age"),
)
"""What each row has, by the names that filters use; metrics and keys of the config come after."""
THREADS = 16
"""A file server answers many at once; there a run is some twenty answers."""
_OF_A_RUN = (RUN_CONFIG, OWNER, METRICS)
_METRICS_OF_OTHER_KIND = frozenset({"time"})


@dataclass(frozen=True)
class Row:
    """One run, or a directory of one that cannot be read."""

    run_dir: Path
    state: State
    columns: Mapping[str, Any] = field(default_factory=dict)
    """Those of COLUMNS; None where it is not known (yet)."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Each as it was logged last."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """By dotted key."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What a sweep varies of it."""

    def value(self, key: str) -> Any:
        """Return a column, else a metric, else a key of the config or the kind of its section."""
        for known in (self.columns, self.metrics, self.config):
            if key in known:
                return known[key]
        return self.config.get(f"{key}.{_KIND_OF.get(key, 'kind')}")

    def has(self, key: str) -> bool:
        return (
            any(key in known for known in (self.columns, self.metrics, self.config))
            or f"{key}.{_KIND_OF.get(key, 'kind')}" in self.config
        )


_KIND_OF = {"precision": "compute_dtype"}
"""What stands for a section that has no kinds."""


# --- which there are ------------------------------------------------------------------------------


def found(paths: Sequence[Path], here: Path) -> list[Path]:
    """Return the run directories at or below paths, or those below a working directory.

    Raises UserError where a path has none.
    """
    if not paths:
        return [*_below(here, "runs/*"), *_below(here, "sweeps/*/*")]
    all_of_them: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give a run, a sweep or a directory of them")
        of_this = [path] if _is_run(path) else [p for x in _BELOW for p in _below(path, x)]
        if not of_this:
            raise UserError(
                f"no runs in {path}: neither there nor one or two folders further down is a "
                f"{RUN_CONFIG}"
            )
        all_of_them += of_this
    return list(dict.fromkeys(all_of_them))


_BELOW = ("*", "*/*", "sweeps/*/*")


def _below(directory_: Path, pattern: str) -> list[Path]:
    try:
        paths = sorted(directory_.glob(pattern), key=runs.place)
    except OSError:
        return []
    # What lies in a run is part of it.
    return [path for path in paths if _is_run(path) and not _is_run(path.parent)]


def _is_run(path: Path) -> bool:
    for name in _OF_A_RUN:
        try:
            if (path / name).exists():
                return True
        except PermissionError:
            return True  # so that it is a row that says so
        except OSError:
            continue
    return False


# --- what they are --------------------------------------------------------------------------------


def rows(run_dirs: Sequence[Path], here: Path) -> list[Row]:
    """Look at many runs; one that cannot be read is a row that says why."""
    around = Around.now()
    settings = _settings(run_dirs)
    with ThreadPoolExecutor(THREADS) as threads:
        return list(
            threads.map(lambda path: _row(path, here, around, settings.get(path, {})), run_dirs)
        )


def _row(run_dir: Path, here: Path, around: Around, settings: Mapping[str, Any]) -> Row:
    name = seen_from(here, run_dir)
    try:
        return _of(run_dir, name, around, settings)
    except Exception as error:  # whatever is wrong with one, the others are shown
        why = str(error).partition("\n")[0] or type(error).__name__
        state = State(f"cannot be read: {why}", True, UNREADABLE)
        columns = dict.fromkeys(COLUMNS) | {"run": name, "state": state.word}
        return Row(run_dir, state, columns, settings=settings)


def _of(run_dir: Path, name: str, around: Around, settings: Mapping[str, Any]) -> Row:
    config = run_config.load(run_dir)
    tree = config.model_dump(mode="json")
    seen = runs.look(run_dir, config, around)
    losses = held_out(run_dir / METRICS)
    is_over, total = seen.state.is_over, seen.total_steps
    saved = [step for step, _ in layout.named(run_dir / CHECKPOINTS)] if is_over else []
    metrics = {k: v for k, v in seen.last.items() if k not in _METRICS_OF_OTHER_KIND}
    if losses is not None:
        metrics["eval_loss"] = losses.last
    columns = {
        "run": name,
        "state": seen.state.word,
        "model": model_name(tree["model"]),
        "strategy": strategy_name(tree["strategy"]),
        "step": runs.reached(seen.last.get("step"), saved, total if seen.is_done else None),
        "total_steps": total,
        "best_eval_loss": losses.best if losses else None,
        "best_step": losses.best_step if losses else None,
        "eval_loss": losses.last if losses else None,
        "loss": seen.last.get("loss"),
        "tokens_per_second": seen.last.get("tokens_per_second"),
        "age": time.time() - began_at(run_dir),
    }
    return Row(run_dir, seen.state, columns, metrics, dict(flattened(tree)), settings)


def began_at(run_dir: Path) -> float:
    """Return when a run was first started, or else frozen, in seconds since 1970."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        started = json.loads((run_dir / PROVENANCE).read_bytes())["started"]
        moment = datetime.strptime(started, "%Y-%m-%dT%H:%M:%SZ")
        return moment.replace(tzinfo=UTC).timestamp()
    return (run_dir / RUN_CONFIG).stat().st_mtime


def flattened(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of a config and its value; a list is one value. Pure."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _settings(run_dirs: Sequence[Path]) -> dict[Path, Mapping[str, Any]]:
    """Return what sweeps vary of those runs that are points of one."""
    known: dict[Path, Mapping[str, Any]] = {}
    for sweep_dir in dict.fromkeys(path.parent for path in run_dirs):
        if not directory.is_sweep(sweep_dir):
            continue
        with suppress(UserError, OSError):  # its runs are shown all the same
            sweep = directory.read(sweep_dir)
            known |= {sweep.run_dir(point.number): point.settings for point in sweep.points}
    return known
