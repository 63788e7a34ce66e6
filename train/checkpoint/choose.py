"""The checkpoint that a user means: itself, or the newest, the best or a step of a run."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shardwright.train import config as run_config
from shardwright.train.checkpoint import discovery
from shardwright.train.checkpoint.format import layout
from shardwright.train.checkpoint.format.layout import MANIFEST, Manifest
from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable, locate
from shardwright.train.checkpoint.read import portable
from shardwright.train.errors import UserError
from shardwright.train.run_directory.names import CHECKPOINTS, ENGINE_FOLDER, RUN_CONFIG

Step = int | Literal["latest", "best"] | None

# Of Shardwright and transformers, of accelerate, of DeepSpeed.
_NAMED_FOR_A_STEP = re.compile(r"(?:checkpoint-|checkpoint_|global_step)(\d+)")


@dataclass(frozen=True)
class Chosen:
    """A checkpoint that can be read."""

    path: Path
    state: PortableState
    manifest: Manifest | None
    """None where another program wrote it; where there is one, every hash is right."""
    run_dir: Path | None
    """The Shardwright run that it lies in."""

    @property
    def origin(self) -> str:
        """What it is, in a phrase without a path."""
        writer = self.state.origin or "a checkpoint"
        return f"{self.path.name} of a Shardwright run ({writer})" if self.manifest else writer

    @property
    def step(self) -> int | None:
        return self.state.step if self.manifest is None else self.manifest.step


def choose(
    asked: Path,
    step: Step,
    say: Callable[[str], None],
    advance: Callable[[int], object] = lambda read_bytes: None,
    section: str | None = None,
) -> Chosen:
    """Return the checkpoint that is meant: ``asked`` itself, or ``step`` of those that lie in it.

    That is the newest by default. ``section`` says where in another program's files the weights
    are. ``say`` hears of what was skipped, ``advance`` of the bytes
    that were read to check hashes. Raises UserError naming what is there and what was looked for.
    """
    asked = Path(os.path.abspath(asked))
    if not asked.exists():
        raise UserError(f"{asked} does not exist; give a checkpoint, or a run directory")
    directory = asked / CHECKPOINTS if (asked / CHECKPOINTS).is_dir() else asked
    steps = _steps_in(directory)
    is_run = directory != asked or any(layout.step_of(path) is not None for path in steps.values())
    if step is None and not is_run:
        return _one(asked, advance, section)
    if not steps:
        if not is_run and step is not None:
            raise UserError(
                f"--step={step} chooses among the checkpoints of a run, and {asked} is not a run "
                "directory: it holds no checkpoint-<step>; leave --step out to read it as a "
                "checkpoint itself"
            )
        raise UserError(f"{directory} holds no checkpoint-<step>")
    if isinstance(step, int):
        if step not in steps:
            there_are = ", ".join(map(str, steps))
            raise UserError(f"{directory} has no checkpoint of step {step}; it has {there_are}")
        return _one(steps[step], advance, section)
    if step == "best":
        return _best(directory, say, advance)
    if _is_run_dir(directory.parent) or any((p / MANIFEST).exists() for p in steps.values()):
        path, passed_over = discovery.newest_whole(directory, advance=advance)
        return _opened(path, directory, passed_over, say)
    return _newest_foreign(steps, say, section)


def _steps_in(directory: Path) -> dict[int, Path]:
    """Return what is named for a step, whole or not, the oldest first."""
    if not directory.is_dir():
        return {}
    found = {}
    for path in directory.iterdir():
        if path.is_dir() and (match := _NAMED_FOR_A_STEP.fullmatch(path.name)):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _is_run_dir(path: Path) -> bool:
    return (path / RUN_CONFIG).is_file()


def _one(path: Path, advance: Callable[[int], object], section: str | None) -> Chosen:
    """Return the checkpoint at a path, once every hash is right that its manifest names."""
    if (path / MANIFEST).is_file():
        if problems := layout.verify(path, advance=advance):
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            raise UserError(
                f"{path} is not whole: {problems[0]}{more}; {layout.remedy(problems)}, or use "
                "another checkpoint of the run"
            )
    elif _is_run_dir(path.parent.parent) and layout.step_of(path) is not None:
        raise UserError(
            f"{path} is not a whole checkpoint: it has no {MANIFEST}, which is written last and "
            f"deleted first. To read it anyway, give {path / ENGINE_FOLDER}"
        )
    return _read(path, section)


def _read(path: Path, section: str | None = None) -> Chosen:
    manifest = layout.read_manifest(path) if (path / MANIFEST).is_file() else None
    if manifest is not None and manifest.finite is False:
        raise UserError(
            f"{path} cannot be used: {layout.NOT_FINITE}; use an earlier checkpoint of the run. "
            f"To read it anyway, give {path / ENGINE_FOLDER}"
        )
    if manifest is not None and manifest.parts > 1:
        raise UserError(
            f"{path} is part {manifest.part + 1} of {manifest.parts}: each node kept what its "
            f"ranks wrote; copy what is in their folders {ENGINE_FOLDER} into one, and give that"
        )
    try:
        state = portable.read(path, section)
        if manifest is None:  # no hash tells whether its files are what they were
            locate([*state.weights.values(), *state.buffers.values(), *state.ema.values()])
    except (Unreadable, OSError) as error:
        raise UserError(str(error)) from None
    above = [parent for parent in path.parents[1:3] if _is_run_dir(parent)]
    return Chosen(path, state, manifest, above[0] if above else None)


def _best(directory: Path, say: Callable[[str], None], advance: Callable[[int], object]) -> Chosen:
    if not _is_run_dir(directory.parent):
        raise UserError(
            f"--step=best goes by the checkpoint.best_metric of a run's config.yaml, and "
            f"{directory.parent} has none; give the number of a step"
        )
    rule = run_config.load(directory.parent).checkpoint
    path, passed_over = discovery.best_whole(directory, rule, advance=advance)
    if path is None and not passed_over:
        raise UserError(
            f"no checkpoint in {directory} was evaluated by {rule.best_metric}, so none is the "
            "best; leave --step out to use the newest"
        )
    return _opened(path, directory, passed_over, say)


def _opened(
    path: Path | None,
    directory: Path,
    passed_over: list[discovery.PassedOver],
    say: Callable[[str], None],
) -> Chosen:
    if path is None:
        raise UserError(
            f"{directory} holds no whole checkpoint ({'; '.join(map(str, passed_over))}); "
            f"{discovery.remedy(passed_over)}"
        )
    for skipped in passed_over:
        say(f"{skipped}; skipped")
    return _read(path)


def _newest_foreign(
    steps: dict[int, Path], say: Callable[[str], None], section: str | None
) -> Chosen:
    """Return the newest that can be read: nothing else tells whether it is whole."""
    problems = []
    for path in reversed(steps.values()):
        try:
            found = _read(path, section)
        except UserError as error:
            problems.append(str(error))
        else:
            for problem in problems:
                say(f"skipped: {problem}")
            return found
    raise UserError("\n".join(problems))
