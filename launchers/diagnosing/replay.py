"""Make steps of a run again, in a directory of their own: the run's is read, never written to."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shardwright.launchers.diagnosing import lineage
from shardwright.launchers.machine.facts import Machine
from shardwright.launchers.ranks import child
from shardwright.launchers.ranks.command import rank_command
from shardwright.launchers.ranks.environment import rank_environment
from shardwright.launchers.registry import launcher_of
from shardwright.train.checkpoint.format import layout
from shardwright.train.config import RunConfig, from_tree, to_yaml
from shardwright.train.config.checkpoint import without_pushes
from shardwright.train.console import progress
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.loop.numerics.records import Finding, earliest
from shardwright.train.run_directory import history, names, replays
from shardwright.train.run_directory.replays import Replay, Replayed

COPIED = (names.DATA_JSON, names.TOKENIZER_FOLDER, names.MODEL_FOLDER, names.ORIGIN_JSON)
"""What a run's ranks read besides its config and its checkpoints."""
UNITS = ("steps", "tokens", "epochs")
"""By which an evaluation or a save may come."""
COMPARED = ("loss", "grad_norm", "learning_rate")
"""What each logged step must give again, bit for bit."""


@dataclass(frozen=True)
class Prepared:
    """Steps that are ready to be made again."""

    directory: Path
    config: RunConfig
    first: int
    """The step of the checkpoint that they begin behind; 0 is the run's beginning."""
    until: int


def prepare(
    run_dir: Path,
    step: int,
    scratch: Path | None = None,
    *,
    fingerprints: bool = False,
    first: int | None = None,
) -> Prepared:
    """Lay out a directory in which the ranks of a run make its steps up to one again.

    They begin behind ``first``, or the newest checkpoint before the step. Raises UserError where
    the same steps cannot be made here.
    """
    parts = lineage.segments(history.read(run_dir))
    saved = dict(layout.whole_checkpoints(run_dir / names.CHECKPOINTS))
    newest = lineage.beginning(parts, list(saved), step)
    first = newest if first is None else first
    before = _config(run_dir, lineage.in_force(parts, step).config)
    if first:
        ranks = layout.read_manifest(saved[first]).world_size
        if ranks != before.launcher.world_size:
            raise UserError(
                f"checkpoint-{first} was written by {ranks} rank(s), and step {step:,} was made by "
                f"{before.launcher.world_size}: its random numbers cannot be drawn again; replay a "
                "step that the same ranks have saved before"
            )
    directory = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}-replay-{step}-", dir=scratch))
    config = replayed(before, directory)
    write_text(directory / names.RUN_CONFIG, to_yaml(config))
    for name in COPIED:
        source = run_dir / name
        if source.is_dir():
            shutil.copytree(source, directory / name)
        elif source.exists():
            shutil.copy2(source, directory / name)
    (directory / names.LOGS).mkdir()
    (directory / names.CHECKPOINTS).mkdir()
    if first:
        link = directory / names.CHECKPOINTS / saved[first].name
        link.symlink_to(saved[first].resolve(), target_is_directory=True)
    replays.request(directory, Replay(step, fingerprints))
    return Prepared(directory, config, first, step)


def _config(run_dir: Path, name: str) -> RunConfig:
    tree = yaml.safe_load((run_dir / name).read_text(encoding="utf-8"))
    return from_tree(tree)


def replayed(config: RunConfig, directory: Path) -> RunConfig:
    """Return the config of a replay: the run's, watched, without all that only looks at it. Pure.

    Raises UserError where its ranks cannot all be here.
    """
    tree: dict[str, Any] = config.model_dump(mode="json", by_alias=True)
    tree["run_dir"] = str(directory)
    tree["tracking"] = {"kind": "none"}
    tree["checkpoint"] |= {"keep_every_steps": None, "keep_best": 0, "export": "last"}
    tree["checkpoint"] |= without_pushes()
    looks_only: dict[str, Any] = {"trace_batches": [], "statistics_every_steps": None}
    debug = {**tree["trainer"]["debug"], **looks_only}
    tree["trainer"] |= {
        # As it says, auto compiles nothing that is looked into.
        "compile": "auto" if config.trainer.compile is True else config.trainer.compile,
        **{f"{kind}_every_{unit}": None for kind in ("eval", "save") for unit in UNITS},
        "early_stopping_patience": None,
        "early_stopping_threshold": 0.0,
        "debug": {**debug, "numerics": "watch"},
        "profile": {},
    }
    remedy = "resume a copy of the run there with trainer.debug.numerics=watch"
    tree["launcher"] = launcher_here(config, "a replay", remedy) or tree["launcher"]
    return from_tree(tree)


def launcher_here(config: RunConfig, what: str, remedy: str) -> dict[str, Any] | None:
    """Return the launcher that starts the ranks of a job on this node; None where the run's does.

    Pure. Raises UserError, with a remedy, where they cannot all be here.
    """
    launcher = config.launcher
    if launcher.nodes > 1 or (launcher.is_elsewhere and not launcher.is_job):
        raise UserError(
            f"the run has {launcher.world_size} ranks on {launcher.nodes} nodes, and {what} "
            f"starts all of them on this one; {remedy}"
        )
    if not launcher.is_job:
        return None
    return {
        "kind": "torchrun",
        "device": launcher.device,
        "nproc_per_node": launcher.ranks_per_node,
    }


def run(prepared: Prepared, here: Machine) -> Replayed | None:
    """Start the ranks of a replay and wait; return what came of it, None where they failed."""
    config, directory = prepared.config, prepared.directory
    environment = {
        **rank_environment(config, here, os.environ),
        progress.BEGAN: str(time.time()),
    }
    launcher = launcher_of(config)
    for name, text in launcher.files(environment, here).items():
        write_text(directory / name, text)
    child.run(
        rank_command(config, directory, machine=here),
        environment,
        stderr_file=directory / names.LOGS / names.TORCHRUN_LOG if launcher.has_pages else None,
        grace_seconds=config.launcher.grace_seconds,
        run_dir=directory,
    )
    return replays.outcome(directory)


# --- what came of it ------------------------------------------------------------------------------


def finding(directory: Path) -> Finding | None:
    """Return the first bad tensor that any rank of a replay has found."""
    found = []
    for path in (directory / names.DIAGNOSIS).glob(names.FINDINGS):
        found.append(Finding(**json.loads(path.read_text())))
    return earliest(found)


def logged(run_dir: Path, first: int, until: int) -> dict[int, dict[str, Any]]:
    """Return what a run has logged of the training in some steps, by step."""
    path, found = run_dir / names.METRICS, {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if "loss" in entry and first < entry["step"] <= until:
            found[int(entry["step"])] = {key: entry.get(key) for key in COMPARED}
    return found


def same(before: dict[int, dict[str, Any]], after: dict[int, dict[str, Any]]) -> str:
    """Return in a sentence whether the steps gave what they gave before. Pure."""
    common = sorted(before.keys() & after.keys())
    if not common:
        return "None of these steps was logged, so that no figure of theirs can be compared."
    parted = [step for step in common if before[step] != after[step]]
    if not parted:
        return (
            f"Loss, gradient norm and rate of {len(common)} logged step(s), up to {common[-1]:,}, "
            "are those of the run, bit for bit."
        )
    step = parted[0]
    key = next(key for key in COMPARED if before[step][key] != after[step][key])
    return (
        f"The steps were not the same: from step {step:,} on {key} is {after[step][key]}, and was "
        f"{before[step][key]}. On a GPU that takes trainer.deterministic=true and no compiled "
        "blocks; else another machine, other versions, or a fault of the hardware."
    )


def said(prepared: Prepared, run_dir: Path, came: Replayed, found: Finding | None) -> list[str]:
    """Return what a replay has shown, in sentences. Pure but for the two metrics.jsonl."""
    start = f"checkpoint-{prepared.first}" if prepared.first else "the beginning"
    spans: Sequence[dict[int, dict[str, Any]]] = [
        logged(each, prepared.first, prepared.until) for each in (run_dir, prepared.directory)
    ]
    lines = [f"Replayed steps {prepared.first + 1:,} to {came.step:,} from {start}. {same(*spans)}"]
    if found is None:
        lines.append(
            f"No module gave anything that is not finite, or past a bound, up to step "
            f"{came.step:,}." + (f" Yet it ended: {came.diverged}" if came.diverged else "")
        )
    else:
        text = found.said()
        lines.append(text[:1].upper() + text[1:] + ".")
    return lines
