"""What a run that has diverged says: what was not finite, and what there is to resume from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shardwright.train.checkpoint.format import layout
from shardwright.train.loop.numerics.records import Finding, earliest
from shardwright.train.run_directory.names import CHECKPOINTS, DIAGNOSIS


@dataclass(frozen=True)
class Found:
    """What one rank has seen of the step in which training has diverged."""

    loss: float
    norm: float
    weights_are_sound: bool
    watched: Finding | None = None
    """What trainer.debug.numerics=watch has found on it."""


def diagnosis(found: Sequence[Found]) -> str:
    """Return what was not finite, and on which ranks, in a phrase. Pure."""
    damaged = [rank for rank, seen in enumerate(found) if not seen.weights_are_sound]
    if bad := {rank: seen.loss for rank, seen in enumerate(found) if not math.isfinite(seen.loss)}:
        # The sum over micro-batches: inf - inf is NaN.
        what = "inf" if all(math.isinf(loss) for loss in bad.values()) else "NaN"
        text = f"the loss is {what}{_on(bad, len(found))}"
        if damaged:
            text += f", since an update{_on(damaged, len(found))} left {_DAMAGED}"
        return text
    if damaged:
        return f"its update{_on(damaged, len(found))} left {_DAMAGED}"
    if any(seen.watched for seen in found) and all(math.isfinite(seen.norm) for seen in found):
        return "trainer.debug.numerics=watch has seen a module past what it may give"
    norm = next((seen.norm for seen in found if not math.isfinite(seen.norm)), math.nan)
    return f"the gradient norm is {'inf' if math.isinf(norm) else 'NaN'}, and the loss is finite"


_DAMAGED = "weights that are NaN, infinite or too large to compute with"


def _on(ranks: Iterable[int], world_size: int) -> str:
    named = [str(rank) for rank in ranks]
    if world_size == 1:
        return ""
    if len(named) == world_size:
        return " on every rank"
    return f" on rank{'s' * (len(named) > 1)} {', '.join(named)}"


def message(
    run_dir: Path, step: int, found: Sequence[Found], *, learning_rate: float, began_at: int | None
) -> str:
    """Return what to tell the user: what was not finite, what is left, and how to resume.

    ``began_at`` is the step of the checkpoint from which the run was resumed.
    """
    place = _place(run_dir, step, found)
    text = f"training has diverged at step {step:,}: {diagnosis(found)}{place}. "
    remedy = (
        f"lower trainer.learning_rate (it is {learning_rate:g}) or trainer.max_grad_norm, or warm "
        "up for longer, and "
    )
    saved = layout.whole_checkpoints(run_dir / CHECKPOINTS)
    if not saved:
        return f"{text}Nothing had been saved; {remedy}start a new run with `shardwright train`"
    newest_step, newest = saved[-1]
    text += f"{newest.name} is the newest checkpoint, and its weights are finite; "
    if newest_step == began_at and step == began_at + 1 and len(saved) > 1:
        text += (
            "this was the first step after it, so that it may be beyond repair: if it diverges "
            f"again, delete {newest} to resume from {saved[-2][1].name}; "
        )
    resume = resume_command(run_dir)
    return f"{text}{remedy}resume with: {resume} trainer.learning_rate={learning_rate / 10:g}"


def _place(run_dir: Path, step: int, found: Sequence[Found]) -> str:
    """Return the module with which it began, in a phrase; how to find it where nobody watched."""
    if (first := earliest(seen.watched for seen in found)) is None:
        if all(math.isfinite(seen.loss) and math.isfinite(seen.norm) for seen in found):
            return ""  # no module has given it, but the update
        return f". The module in which it began: {diagnose_command(run_dir)} --replay {step}"
    return f"; {first.said()} ({run_dir / DIAGNOSIS / first.report} has the ranges before it)"


def diagnose_command(run_dir: Path) -> str:
    return f"shardwright diagnose {shlex.quote(str(run_dir))}"


def resume_command(run_dir: Path) -> str:
    return f"shardwright resume {shlex.quote(str(run_dir))}"


def way_on(run_dir: Path) -> str:
    """Return the newest checkpoint and what can be done with it, in a phrase."""
    saved = layout.whole_checkpoints(run_dir / CHECKPOINTS)
    if not saved:
        return "nothing had been saved; start a new run with `shardwright train`"
    newest = saved[-1][1]
    return (
        f"{newest.name} is the newest checkpoint: `shardwright recover {shlex.quote(str(newest))} "
        f"OUT` writes its weights; resume with: {resume_command(run_dir)}"
    )
