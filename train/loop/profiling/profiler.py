"""Profile steps of a live run, on the ranks that are to write what they have done."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from shardwright.train.config import Rhythm, TrainerConfig
from shardwright.train.config.profile import Profile
from shardwright.train.durable import write_text
from shardwright.train.loop.profiling.parts import (
    DATA,
    STEP,
    communication_of,
    most_allocated,
    steps_of,
)
from shardwright.train.loop.profiling.table import said_of_memory, table
from shardwright.train.process import signals
from shardwright.train.run_directory.names import PROFILES, profile_of

logger = logging.getLogger(__name__)

MOST_SNAPSHOT_ENTRIES = 100_000
"""Allocations of which a memory snapshot has the stacks: some 100 MB at the most."""
_NOTHING: AbstractContextManager[None] = nullcontext()


class Profiler(TrainerCallback):
    """Has steps traced that the config names, or that somebody asks for while the run lives.

    Where none is under way it does nothing: no hook, no event and no file. A trace reads no random
    number and changes no tensor, so that a run with one trains to the same bits.
    """

    def __init__(
        self,
        config: TrainerConfig,
        rhythm: Rhythm,
        run_dir: Path,
        args: TrainingArguments,
        say: Callable[[str], object] = logger.info,
    ) -> None:
        """``say`` tells a person, on the first rank."""
        self._rhythm, self._config = rhythm, config.profile
        self._folder, self.say = run_dir / PROFILES, say
        self._rank, self._device = args.process_index, args.device
        self._steps = range(0)
        """Those that are profiled, or were the last time: on every rank alike."""
        self._is_under_way = False
        self._whole_steps = 0
        self._trace: Any = None
        self._step: Any = None

    def disturbs(self, step: int) -> bool:
        """Return whether a step was, or the one before, and so takes longer than others.

        The one behind waits for whoever writes.
        """
        return step in self._steps or step - 1 in self._steps

    def take_request(self) -> bool:
        """Return whether this rank was asked for a profile since the last time."""
        return signals.take_profile_request()

    def data(self) -> AbstractContextManager[Any]:
        """Return what the assembly of a batch is to be inside of."""
        return _NOTHING if self._trace is None else torch.profiler.record_function(DATA)

    def step_begins(self, step: int) -> None:
        """Note the beginning of a step that follows others of the same trace."""
        if self._trace is not None:
            self._step = torch.profiler.record_function(f"{STEP}{step}")
            self._step.__enter__()

    def agreed(self, step: int, last_step: int, *, is_asked: bool) -> None:
        """Begin where it is due: all ranks know alike whether one of them was asked."""
        if self._is_under_way or not (is_asked or step == self._config.at_step):
            return
        self._is_under_way = True
        last = last_of(self._config, self._rhythm, step, last_step)
        self._steps = range(step, last + 1)
        if self._rank == 0:
            ranks = ", ".join(map(str, self._config.ranks))
            named = "rank" if len(self._config.ranks) == 1 else "ranks"
            self.say(f"profiling steps {step} to {last} on {named} {ranks}, into {self._folder}")
        if self._rank in self._config.ranks:
            self._start()
        self.step_begins(step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_under_way:
            return
        is_last = state.global_step >= self._steps[-1]
        self._whole_steps = state.global_step
        if self._trace is not None:
            if is_last and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._end_step()
        if is_last:
            self._finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_under_way:  # stopped in the midst of them
            self._end_step()
            self._finish()

    def _start(self) -> None:
        on_gpu = self._device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if on_gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._device)
            torch.cuda.memory._record_memory_history(max_entries=MOST_SNAPSHOT_ENTRIES)
        trace = torch.profiler.profile(activities=activities, profile_memory=True)
        try:
            trace.start()
        except RuntimeError as error:
            logger.warning("torch's profiler cannot be started: %s", error)
            return
        self._trace = trace

    def _end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _finish(self) -> None:
        self._is_under_way, first = False, self._steps[0]
        trace, self._trace = self._trace, None
        if trace is None:
            return
        try:
            trace.stop()
            self._folder.mkdir(exist_ok=True)
            self._write(trace, self._folder / profile_of(first, self._rank))
        except (OSError, RuntimeError) as error:  # as a full disk: no reason to end the run
            logger.warning("the profile of step %d is lost: %s", first, error)

    def _write(self, trace: Any, beginning: Path) -> None:
        """Write the trace as browsers' viewers take it, its table, and the memory's snapshot."""
        snapshot = None
        if self._device.type == "cuda":
            snapshot = f"{beginning.name}.memory.pickle"
            torch.cuda.memory._dump_snapshot(str(beginning.with_name(snapshot)))
            torch.cuda.memory._record_memory_history(enabled=None)
        path = beginning.with_name(f"{beginning.name}.trace.json.gz")
        trace.export_chrome_trace(str(path))
        with gzip.open(path, "rt") as file:
            events = json.load(file)["traceEvents"]
        title = f"rank {self._rank} on {socket.gethostname()}, {self._device.type}"
        found = table(
            title,
            [step for step in steps_of(events) if step.number <= self._whole_steps],
            communication_of(events),
            said_of_memory(most_allocated(events), snapshot),
        )
        write_text(beginning.with_name(f"{beginning.name}.txt"), found)
        logger.info("a profile is in %s*", beginning)


def last_of(profile: Profile, rhythm: Rhythm, first: int, last_step: int) -> int:
    """Return the last step of a profile that begins at a step. Pure.

    An evaluation or a save behind a step ends it: it would be most of the trace.
    """
    steps = range(first, min(first + profile.steps - 1, last_step) + 1)
    return next((s for s in steps if rhythm.is_interrupted(s, last_step)), steps[-1])
