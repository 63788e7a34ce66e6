"""`shardwright checkpoints`: what a run has saved, whether it is whole, and why it is kept."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shardwright.train import config as run_config
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.retention import Saved, marks
from shardwright.train.config import CheckpointConfig
from shardwright.train.console import progress
from shardwright.train.errors import FAILED, UserError
from shardwright.train.process.arguments import path as path_of
from shardwright.train.run_directory import set_aside
from shardwright.train.run_directory.names import CHECKPOINTS, RUN_CONFIG
from shardwright.train.units import counted, duration, size


@dataclass(frozen=True)
class Row:
    """One checkpoint of a listing."""

    step: int
    path: Path
    manifest: layout.Manifest | None
    """None where it cannot be read."""
    problems: list[str]
    bytes: int
    written_at: float
    """Seconds since 1970."""


def main(arguments: Sequence[str]) -> int:
    """List the checkpoints; return 1 where --verify finds one that cannot be used, else 0."""
    options = parser().parse_args(arguments)
    directory, paths, rule = _asked_for(options.directory)
    rows = [row for step, path in paths if (row := _read(step, path)) is not None]
    if options.verify:
        rows = _verified(rows)
    print(listing(directory, rows, rule, verified=options.verify, now=time.time()))
    for path in sorted(directory.glob(".checkpoint-*")) if rule is not None else []:
        print(
            f"\n{path.name} is a save in progress, or an interrupted one that the next save deletes"
        )
    for aside, count in set_aside.found(directory.parent) if rule is not None else []:
        print(
            f"\n{aside}: {counted(count, 'checkpoint')} that a resume has gone back behind; no "
            "resume uses them, and you may delete them"
        )
    return FAILED if options.verify and any(row.problems for row in rows) else 0


def listing(
    directory: Path,
    rows: Sequence[Row],
    rule: CheckpointConfig | None,
    *,
    verified: bool,
    now: float,
) -> str:
    """Return the table, and below it every problem of what is not whole. Pure."""
    total = size(sum(row.bytes for row in rows))
    count = counted(len(rows), "checkpoint")
    lines = [f"{directory}: {count}, {total}" if rows else f"{directory}: no checkpoints yet"]
    if rows:
        lines += _aligned(_cells(rows, rule, verified=verified, now=now))
    for row in rows:
        if row.problems:
            what = "cannot be used" if layout.NOT_FINITE in row.problems else "is not whole"
            lines += ["", f"checkpoint-{row.step} {what}:"]
            lines += [f"  {problem}" for problem in row.problems]
            if names := layout.to_remove(row.problems):
                lines += [f"  it is whole once {names} is removed"]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the command line of `shardwright checkpoints`."""
    found = argparse.ArgumentParser(
        prog="shardwright checkpoints",
        description="List a run's checkpoints: step, strategy, ranks, size, age, why each is kept, "
        "and whether it is whole.",
        epilog="Exit codes: 0, 1 where --verify finds one that cannot be used, 2 on bad input.",
    )
    found.add_argument("directory", type=path_of, metavar="RUN_DIR", help="or one checkpoint of it")
    found.add_argument(
        "--verify",
        action="store_true",
        help="read every file and check its hash, besides its size",
    )
    return found


def _asked_for(asked: Path) -> tuple[Path, list[tuple[int, Path]], CheckpointConfig | None]:
    """Return where to look, (step, path) of each checkpoint, and the run's rule where known."""
    directory = Path(os.path.abspath(asked))
    if not directory.is_dir():
        raise UserError(
            f"{asked} is not a directory; give the run directory that `shardwright train` printed, "
            "or one of its checkpoints"
        )
    step = layout.step_of(directory)
    if step is not None:
        return directory.parent, [(step, directory)], None
    if directory.name == CHECKPOINTS and not (directory / RUN_CONFIG).exists():
        directory = directory.parent
    rule = run_config.load(directory).checkpoint
    return directory / CHECKPOINTS, layout.named(directory / CHECKPOINTS), rule


def _read(step: int, path: Path) -> Row | None:
    """Return what a look at the sizes shows; None where the run has just deleted it."""
    manifest, problems = None, []
    try:
        manifest = layout.read_manifest(path)
        layout.check_sizes(path)
    except layout.NotWhole as error:
        problems = [str(error)]
    written = path / layout.MANIFEST
    try:
        return Row(
            step=step,
            path=path,
            manifest=manifest,
            problems=problems,
            bytes=sum(file.stat().st_size for file in layout.files_of(path)),
            written_at=(written if written.exists() else path).stat().st_mtime,
        )
    except FileNotFoundError:
        return None


def _verified(rows: list[Row]) -> list[Row]:
    """Return the rows with every problem that reading all their files shows."""
    total = sum(row.bytes for row in rows if row.manifest is not None)
    shown = {"total": total, "unit": "B", "comes_again": True, "console": sys.stderr}
    verified = []
    with progress.phase("verifying", **shown) as phase:
        for row in rows:
            problems = layout.verify(row.path, advance=phase.advance)
            if row.manifest is not None and row.manifest.finite is False:
                problems.append(layout.NOT_FINITE)
            verified.append(replace(row, problems=problems))
    return verified


# --- the table ----------------------------------------------------------------------------------


def _cells(
    rows: Sequence[Row], rule: CheckpointConfig | None, *, verified: bool, now: float
) -> list[list[str]]:
    saved = [
        Saved(row.step, row.manifest.metrics)
        for row in rows
        if row.manifest is not None and not row.problems
    ]
    kept = marks(saved, rule) if rule is not None else {}
    metric = rule.best_metric if rule is not None else "eval_loss"
    measured = any(row.manifest is not None and metric in row.manifest.metrics for row in rows)
    head = ["step", "strategy", "ranks", "size", "age", metric, "kept", "state"]
    table = [head]
    for row in rows:
        manifest = row.manifest
        value = manifest.metrics.get(metric) if manifest is not None else None
        table.append(
            [
                str(row.step),
                strategy_name(manifest.strategy) if manifest is not None else "?",
                str(manifest.world_size) if manifest is not None else "?",
                size(row.bytes),
                duration(now - row.written_at),
                f"{value:.4f}" if value is not None else "-",
                ", ".join(kept.get(row.step, [])) or "-",
                _state(row, verified=verified),
            ]
        )
    shown = [
        i
        for i, name in enumerate(head)
        if not (name == metric and not measured) and not (name == "kept" and rule is None)
    ]
    return [[cells[i] for i in shown] for cells in table]


def _state(row: Row, *, verified: bool) -> str:
    if layout.NOT_FINITE in row.problems:
        return "not finite"
    if row.problems:
        return "not whole"
    state = "whole, hashes checked" if verified else "whole"
    if row.manifest is not None and row.manifest.parts > 1:
        state += f" (part {row.manifest.part + 1} of {row.manifest.parts})"
    return state


_NUMBERS = {
    *("step", "ranks", "size", "age"),
    *("eval_loss", "eval_perplexity", "eval_masked_accuracy", "eval_own_loss"),
}


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for cell, width, name in zip(cells, widths, table[0], strict=True)
        ).rstrip()
        for cells in table
    ]


def strategy_name(strategy: dict[str, Any]) -> str:
    """Return the preset that a manifest's strategy section is nearest to."""
    name = str(strategy.get("kind", "?"))
    if name == "zero":
        offload = {strategy.get("offload_optimizer"), strategy.get("offload_parameters")}
        device = "_nvme" if "nvme" in offload else "_offload" if "cpu" in offload else ""
        return f"zero{strategy.get('stage', '?')}{device}"
    if name == "fsdp":
        replicas = strategy.get("replicas", 1)
        name += "_hybrid" if isinstance(replicas, int) and replicas > 1 else ""
        name += "_grad_op" if strategy.get("reshard_after_forward") is False else ""
        name += "_offload" if strategy.get("offload") is True else ""
    return name
