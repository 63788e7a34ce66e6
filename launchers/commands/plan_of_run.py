"""`shardwright plan RUN_DIR`: what a run was planned to take, and what it has taken."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from shardwright.launchers import columns, messages, runs
from shardwright.launchers.plan import of_run
from shardwright.train.errors import UserError
from shardwright.train.paths import absolute
from shardwright.train.run_directory.plan import Measured, Planned, Start, as_json
from shardwright.train.units import counted, size


def asked_for(arguments: Sequence[str]) -> str | None:
    """Return the run directory that `plan` is asked about; None where it is asked about none. Pure.

    Settings have a "=" or, where they take one back, begin with "~".
    """
    words = [
        word
        for before, word in zip(("", *arguments), arguments, strict=False)
        if not word.startswith("-") and before not in _TAKE_A_WORD
    ]
    if len(words) == 1 and "=" not in words[0] and not words[0].startswith("~"):
        return words[0]
    return None


_TAKE_A_WORD = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp")
"""Flags of Hydra's."""


def show(word: str, *, as_json: bool) -> int:
    """Print what is known of a run. Raises UserError where there is no such run."""
    run_dir = Path(absolute(word))
    found = runs.runs_in(run_dir)
    if found != [run_dir]:
        raise UserError(f"{run_dir} holds {len(found)} runs; give one of them, such as {found[0]}")
    starts, problem = of_run.starts(run_dir)
    if as_json:
        print(json.dumps(_as_json(run_dir, starts, problem)))
        return 0
    print("\n".join(lines(starts, messages.terminal_width())))
    if problem is not None:
        print(f"no plan of it: {problem}", file=sys.stderr)
    return 0


def _as_json(run_dir: Path, starts: Sequence[Start], problem: str | None) -> dict[str, object]:
    told: dict[str, object] = {
        "run_dir": str(run_dir),
        "starts": [as_json(start) for start in starts],
    }
    return told if problem is None else {**told, "problem": problem}


def lines(starts: Sequence[Start], width: int | None) -> Iterator[str]:
    """Yield a table for each settings that the run has had. Pure."""
    for number, start in enumerate(starts):
        if number:
            yield ""
        yield _settings(start)
        yield ""
        yield from columns.table(_columns(start), width)


def _settings(start: Start) -> str:
    told = start.settings
    strategy = told.get("strategy", {})
    stage = strategy.get("stage", "")
    ranks, batch = told.get("ranks", 0), told.get("micro_batch_size", 0)
    text = f"{strategy.get('kind', '?')}{stage} on {counted(ranks, 'rank')}"
    text += f", {batch} x {told.get('sequence_length', 0):,} tokens a micro-batch"
    if (every := told.get("checkpoint_activations_every_blocks")) is not None:
        text += f", activations of every {counted(every, 'block')} recomputed"
    if start.planned is not None and start.planned.hardware:
        text += f", planned for {start.planned.hardware}"
    return text


def _columns(start: Start) -> list[columns.Column]:
    rows = list(_rows(start.planned, start.measured))
    names = ("of a rank", "planned", "measured", "plan is off by")
    cells = zip(*rows, strict=True) if rows else [()] * len(names)
    return [
        columns.Column(name, tuple(of_column), is_text=number == 0)
        for number, (name, of_column) in enumerate(zip(names, cells, strict=True))
    ]


def _rows(planned: Planned | None, measured: Measured | None) -> Iterator[tuple[str, ...]]:
    for name, shown in _ROWS.items():
        if name == _CATEGORIES:
            parts = planned.by_category.items() if planned is not None else ()
            yield from (
                (f"  {part.replace('_', ' ')}", size(of_part), columns.NOTHING, columns.NOTHING)
                for part, of_part in parts
                if of_part
            )
            continue
        first = getattr(planned, _OF_PLAN.get(name, name), None) or None
        second = getattr(measured, name, None) or None
        if first is None and second is None:
            continue
        missed = f"{first / second - 1:+z.1%}" if first and second else columns.NOTHING
        cells = [columns.NOTHING if each is None else shown(each) for each in (first, second)]
        yield (_TITLES[name], *cells, missed)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _speed(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}"


_CATEGORIES = "by_category"
_ROWS: Mapping[str, Callable[[float], str]] = {
    "peak_bytes": size,
    _CATEGORIES: size,
    "reserved_bytes": size,
    "host_bytes": size,
    "disk_bytes": size,
    "resident_bytes": size,
    "parameters_bytes": size,
    "gradients_bytes": size,
    "optimizer_bytes": size,
    "step_seconds": _seconds,
    "tokens_per_second": _speed,
}
"""Figures in their order, and how each is shown."""
_OF_PLAN = {"peak_bytes": "device_bytes"}
"""Where a plan calls it otherwise."""
_TITLES = {
    "peak_bytes": "peak of its device",
    "reserved_bytes": "reserved there",
    "host_bytes": "states on the host",
    "disk_bytes": "states on disks",
    "resident_bytes": "process on the host",
    "parameters_bytes": "parameters",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer",
    "step_seconds": "a step",
    "tokens_per_second": "tokens/s, all ranks",
}
