"""What a run was planned to take and what it takes: into plan.json, and in one line at its end.

Neither costs a start anything. What a rank holds is counted once, in its second step. The plan is
made by `shardwright plan RUN_DIR` beside the training, once that has lasted for a while; where it
does not come to its end in time, that command makes it later. Whatever fails, the run goes on.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from shardwright.train.plan.held import CATEGORIES, held
from shardwright.train.process.memory import available_bytes, peak_resident_bytes
from shardwright.train.program import package_environment
from shardwright.train.run_directory import plan
from shardwright.train.run_directory.plan import Measured, Planned, Start, differences, settings_of
from shardwright.train.units import duration, size

if TYPE_CHECKING:
    from shardwright.train.loop.callbacks.metrics import Metrics
    from shardwright.train.loop.trainer import Trainer

logger = logging.getLogger(__name__)

BEGINS_AFTER_SECONDS = 30.0
"""Of training; what ends before then is planned where somebody asks for it."""
NEEDS_BYTES = 2**31
"""Of free memory on the host, for the plan's two processes: four times what they take."""
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables by which a process takes itself for one of the ranks."""


class Comparison(TrainerCallback):
    """Measures what a plan predicts, and has the plan made."""

    def __init__(self, trainer: Trainer, metrics: Metrics, say: Callable[[str], None]) -> None:
        self._trainer, self._metrics, self._say = trainer, metrics, say
        self._settings = settings_of(trainer.config)
        self._process: subprocess.Popen[str] | None = None
        self._may_begin_at: float | None = None
        """When a plan may be made; None where none is wanted any more."""
        self._counts_from = 0
        """The first step in which the optimizer has its state."""
        self._held: dict[str, int | None] | None = None
        self._is_gathered = False
        self._before = Start({})
        """What earlier starts with these settings have left."""
        self._is_over = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._counts_from = state.global_step + 1
        if state.is_world_process_zero:
            self._before = plan.newest(self._trainer.run_dir, self._settings)
            if self._before.planned is None:
                self._may_begin_at = time.monotonic() + BEGINS_AFTER_SECONDS

    # Between two micro-batches; in a step of one, before the update.

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._held is None and state.global_step >= self._counts_from:
            self._count(has_gradients=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._held is None and state.global_step >= self._counts_from:
            # DeepSpeed updates in the backward pass of the last micro-batch, behind which stages 1
            # and 2 have no gradients any more (accelerate 1.15, DeepSpeedEngineWrapper.backward).
            self._count(has_gradients=not self._trainer.is_deepspeed_enabled)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._may_begin_at is not None and time.monotonic() >= self._may_begin_at:
            self._may_begin_at = None
            self._process = begun(self._trainer.run_dir)
        elif self._process is not None and self._process.poll() is not None:
            self._note(self._heard())

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the most of any rank, where all ranks meet in any case. Collective."""
        if "loss" not in kwargs["logs"] or self._held is None or self._is_gathered:
            return
        self._is_gathered = True
        mine = [-1 if (found := self._held[each]) is None else found for each in CATEGORIES]
        told = torch.tensor([mine], device=args.device)
        most = self._trainer.accelerator.gather(told).amax(dim=0).tolist()
        self._held = {c: None if m < 0 else m for c, m in zip(CATEGORIES, most, strict=True)}
        if state.is_world_process_zero:
            self._note()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self._is_over:
            return
        self._is_over = True
        self._may_begin_at = None
        known = self._note(self._heard())
        if known is not None and (line := in_a_line(known)):
            self._say(line)

    # --- what is measured ---------------------------------------------------------------------

    def _count(self, *, has_gradients: bool) -> None:
        self._held = dict.fromkeys(CATEGORIES)
        try:
            found = held(self._trainer).values()
        except Exception as error:  # of tensors of any library's
            logger.warning("what this rank holds cannot be counted: %r", error)
            return
        for category in CATEGORIES:
            if has_gradients or category != "gradients":
                self._held[category] = sum(each[category] for each in found)

    def measured(self) -> Measured:
        """Return what all starts with these settings have taken so far."""
        metrics, device = self._metrics, self._trainer.args.device.type
        on_gpu = device == "cuda"
        counted = self._held or {}
        speed = metrics.speed()
        now = Measured(
            device=device,
            peak_bytes=metrics.peak_bytes or None if on_gpu else None,
            reserved_bytes=metrics.reserved_bytes or None if on_gpu else None,
            resident_bytes=peak_resident_bytes() if on_gpu else metrics.peak_bytes or None,
            **{f"{category}_bytes": counted.get(category) for category in CATEGORIES},
            steps=speed.steps,
            seconds=speed.seconds,
            tokens=speed.tokens,
        )
        before = self._before.measured
        return now if before is None else before.continued(now)

    def _note(self, planned: Planned | None = None) -> Start | None:
        run_dir = self._trainer.run_dir
        try:
            return plan.note(run_dir, self._settings, planned=planned, measured=self.measured())
        except OSError as error:  # as with metrics.jsonl
            logger.warning("plan.json could not be written: %s", error)
            return None

    # --- what is planned ----------------------------------------------------------------------

    def _heard(self) -> Planned | None:
        """Return the plan of a process that has ended; end one that has not."""
        process, self._process = self._process, None
        if process is None:
            return None
        if process.poll() is None:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return None
        answer, _ = process.communicate()
        found = of_answer(answer) if process.returncode == 0 else None
        if found is None:
            logger.info("the plan could not be made: exit code %s", process.returncode)
        return found


def begun(run_dir: Path) -> subprocess.Popen[str] | None:
    """Begin to plan a run that is under way, behind all that it needs itself; None without room."""
    if (free := available_bytes()) is not None and free < NEEDS_BYTES:
        return None
    nice = ["nice", "-n10"] if shutil.which("nice") else []
    try:
        process = subprocess.Popen(
            [*nice, sys.executable, "-m", "shardwright", "plan", str(run_dir), "--json"],
            env=environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    except OSError:  # no room for a process more
        return None
    with suppress(OSError):  # where memory runs out all the same, it is not a rank that goes
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
    return process


def environment(of_rank: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that is none of the ranks. Pure."""
    kept = {
        name: value
        for name, value in of_rank.items()
        if name not in OF_RANKS and not name.startswith("TORCHELASTIC_")
    }
    return {**kept, **package_environment(of_rank)}


def of_answer(answer: str) -> Planned | None:
    """Return the plan that `shardwright plan RUN_DIR --json` has printed. Pure."""
    try:
        found = json.loads(answer)["starts"][-1]["planned"]
        return Planned.of_json(found) if found else None
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def in_a_line(start: Start) -> str | None:
    """Return how a plan and what came of it differ; None where nothing can be compared. Pure."""
    found = {each.name: each for each in differences(start)}
    parts = []
    if (peak := found.get("peak_bytes")) is not None:
        parts.append(_part(size(round(peak.planned)), size(round(peak.measured)), peak.missed))
    else:
        states = [found[name] for name in STATES if name in found]
        if states:
            planned, measured = sum(s.planned for s in states), sum(s.measured for s in states)
            told = _part(size(round(planned)), size(round(measured)), planned / measured - 1)
            parts.append(f"{told} of model states")
    if (step := found.get("step_seconds")) is not None:
        told = _part(_seconds(step.planned), _seconds(step.measured), step.missed)
        parts.append(f"{told} a step")
    return f"planned and measured of a rank: {', '.join(parts)}" if parts else None


STATES = ("parameters_bytes", "gradients_bytes", "optimizer_bytes")


def _part(planned: str, measured: str, missed: float) -> str:
    return f"{planned} and {measured} ({missed:+z.0%})"


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.3g} s"
