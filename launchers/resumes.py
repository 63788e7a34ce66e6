"""What a resume leaves in its run's directory, and how all of it is taken back."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from shardwright.train import config as run_config
from shardwright.train.checkpoint import discovery
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.listing import Listing
from shardwright.train.config import RunConfig, why_too_short
from shardwright.train.data.prepare import noted_samples_wanted, noted_too_small
from shardwright.train.durable import write_text
from shardwright.train.errors import UserError
from shardwright.train.run_directory import history, set_aside, stop_note
from shardwright.train.run_directory.names import (
    CHECKPOINTS,
    ENGINE_JSON,
    FAILURES,
    LOGS,
    PROVENANCE,
    RESUMES,
    TORCHRUN_LOGS,
)

TAKEN_BACK = "nothing was trained: the run is what it was before this resume"
"""Written once the ranks have built what was asked for, just before the first step."""


def check(run_dir: Path, config: RunConfig, step: int | None = None) -> Path | None:
    """Return the checkpoint that the ranks will resume from, None where they start anew.

    That is the newest, or the one of ``step``. Raises UserError where they would refuse it, as far
    as its manifest and the run's notes tell.
    """
    directory = run_dir / CHECKPOINTS
    whole = layout.whole_checkpoints(directory)
    if problem := noted_too_small(config, run_dir):
        raise UserError(problem)
    if step is not None:
        if problem := not_to_choose(run_dir, step, layout.named(directory), whole):
            raise UserError(problem)
        whole = [each for each in whole if each[0] == step]
    if not whole:
        _, passed_over = discovery.together([discovery.parts_in(Listing(directory))])
        # Of those set aside, `remove_leftovers` brings back what has no other of its name.
        if passed_over and not any(directory.glob(layout.set_aside(Path("checkpoint-*")).name)):
            raise UserError(discovery.none_whole(run_dir, passed_over[::-1]))
        return None
    newest = whole[-1][1]
    manifest = layout.read_manifest(newest)
    wanted = noted_samples_wanted(config, run_dir)
    if problem := why_too_short(config.trainer, wanted, manifest.progress(), newest.name):
        raise UserError(problem)
    tokens, length = config.trainer.max_tokens, config.tokens_per_sample
    batch_size = manifest.progress().batch_size or 0
    if tokens is not None and tokens <= manifest.tokens - batch_size * length:
        raise UserError(
            f"the run is to have {tokens:,} tokens and has {manifest.tokens:,} already "
            f"({newest.name}); raise trainer.max_tokens"
        )
    return newest


def not_to_choose(
    run_dir: Path,
    step: int,
    named: Sequence[tuple[int, Path]],
    whole: Sequence[tuple[int, Path]],
) -> str | None:
    """Say why a run cannot be resumed from the checkpoint of a step, or return None.

    ``named`` is (step, path) of all that it has, ``whole`` of those that are whole.
    """
    others = ", ".join(str(at) for at, _ in whole if at != step)
    choose = f"choose one of {others}" if others else "there is no other"
    paths = dict(named)
    if step in paths:
        problem = layout.what_is_wrong(paths[step])
        remedy = layout.remedy([problem]) if problem else None
        return problem and f"{paths[step]} is not whole: {problem}; {remedy}, or {choose}"
    lies = [path for path, _ in set_aside.found(run_dir) if (path / f"checkpoint-{step}").is_dir()]
    if lies:
        return (
            f"{run_dir} has no checkpoint of step {step} any more: an earlier resume has set it "
            f"aside in {lies[-1]}; move it back to {run_dir / CHECKPOINTS} to resume from it, or "
            f"{choose}"
        )
    if not whole:
        return f"{run_dir} has no checkpoint yet; leave --step={step} out to begin anew"
    return f"{run_dir} has no checkpoint of step {step}; {choose}"


def write(
    run_dir: Path,
    config: RunConfig,
    overrides: Sequence[str],
    checkpoint: Path | None,
    asked_step: int | None = None,
) -> int:
    """Write resumes/<n>.yaml and a line of history.jsonl; return n.

    Notes of how the start before has failed or stopped are put aside in logs/, and in set-aside/
    what is newer than the checkpoint that a user has chosen by its ``asked_step``.
    """
    folder = run_dir / RESUMES
    folder.mkdir(exist_ok=True)
    number = 1 + (newest_number(run_dir) or 0)
    path = folder / f"{number}.yaml"
    write_text(path, run_config.to_yaml(config))
    entry = {
        "time": time.time(),
        "config": f"{RESUMES}/{path.name}",
        "overrides": list(overrides),
        "checkpoint": checkpoint.name if checkpoint else None,
        "world_size": config.launcher.world_size,
    }
    if asked_step is not None:
        entry["asked_step"] = asked_step
    history.append(run_dir, entry)
    _move(_notes(run_dir), _aside(run_dir, number))
    if asked_step is not None:
        try:
            set_aside.put(run_dir, number, asked_step)
        except OSError:
            take_back(run_dir, number)
            raise
    return number


def newest_number(run_dir: Path) -> int | None:
    """Return the number of a run's last resume, or None where there was none."""
    numbers = (p.stem for p in (run_dir / RESUMES).glob("*.yaml"))
    return max((int(number) for number in numbers if number.isdecimal()), default=None)


def take_back_unstarted(run_dir: Path) -> bool:
    """Undo the last resume where none of its starts has come to a first step; return whether.

    To be called when its ranks have ended on bad input: the next resume must not begin with that.
    """
    number = newest_number(run_dir)
    if number is None:
        return False
    if _is_since(run_dir / ENGINE_JSON, run_dir / RESUMES / f"{number}.yaml"):
        return False
    take_back(run_dir, number)
    return True


def take_back(run_dir: Path, number: int) -> None:
    """Undo `write`: the run is what it was before; notes of how this start failed are put aside."""
    folder = run_dir / RESUMES
    name = f"{RESUMES}/{number}.yaml"
    set_aside.bring_back(run_dir, number)
    history.cut(run_dir, lambda entry: entry.get("config") == name)
    refused = run_dir / LOGS / f"refused-resume-{number}"
    attempt = 1
    while refused.exists():
        attempt += 1
        refused = refused.with_name(f"refused-resume-{number}-{attempt}")
    _move(_notes(run_dir), refused)
    aside = _aside(run_dir, number)
    if aside.is_dir():
        for path in aside.iterdir():
            os.rename(
                path, (run_dir if path.name == stop_note.NOTE else run_dir / LOGS) / path.name
            )
        aside.rmdir()
    first = run_dir / PROVENANCE
    if _is_since(first, folder / f"{number}.yaml"):
        first.unlink()
    # The config last: with it, a resume that is cut short here is still the newest.
    for path in folder.glob(f"{number}[.-]*.json"):
        path.unlink()
    (folder / f"{number}.yaml").unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _is_since(path: Path, other: Path) -> bool:
    """Return whether a file is there and no older than another; both times are the server's."""
    try:
        return path.stat().st_mtime_ns >= other.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _notes(run_dir: Path) -> list[Path]:
    """Return what a start has left to say how it ended."""
    logs, stopped = run_dir / LOGS, run_dir / stop_note.NOTE
    failed = [*logs.glob(FAILURES), *logs.glob(TORCHRUN_LOGS)]
    return [*failed, *([stopped] if stopped.exists() else [])]


def _aside(run_dir: Path, number: int) -> Path:
    return run_dir / LOGS / f"before-resume-{number}"


def _move(paths: Sequence[Path], folder: Path) -> None:
    for path in paths:
        folder.mkdir(parents=True, exist_ok=True)
        os.rename(path, folder / path.name)
