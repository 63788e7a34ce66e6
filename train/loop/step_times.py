"""What a rank's steps are spent on: computing, waiting for other ranks, waiting for data."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from shardwright.train.process import heartbeat, waits


class Times(NamedTuple):
    """Seconds of a step, the mean of some."""

    compute: float
    wait: float
    data: float


MICROSECONDS = 1e6
PARTS = len(Times._fields)


class StepTimes(TrainerCallback):
    """Measures a rank's own steps by the host's clock, between the log lines that tell of them.

    What lies between steps, evaluations and saves, is left out. On a GPU the host runs ahead of
    what its device does and waits for: what it tells of the two is how long it was busy.
    """

    def __init__(self) -> None:
        self._began_ns: int | None = None
        self._waited_before_ns = 0
        self._step_ns = self._wait_ns = self._data_ns = 0
        self._steps = 0
        self._data_now_ns = 0
        """Of the step that is under way."""
        self._last_gradient_ns = 0
        self.of_ranks: list[Times] | None = None
        """What steps were spent on between the two log lines before, by rank; known at a step that
        is logged, and None where there were none."""
        waits.count()

    def begin(self) -> None:
        """A step begins, with the wait for its data and for the others."""
        self._began_ns = time.perf_counter_ns()
        self._waited_before_ns = waits.waited_ns

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._began_ns is None:
            return
        self._step_ns += time.perf_counter_ns() - self._began_ns
        self._wait_ns += waits.waited_ns - self._waited_before_ns
        self._data_ns += self._data_now_ns
        self._data_now_ns = 0
        self._steps += 1
        self._began_ns = None

    def waiting_for_data(self) -> _WaitingForData:
        """Count the block as a wait for data."""
        return _WaitingForData(self)

    def waited_for_data(self, nanoseconds: int) -> None:
        self._data_now_ns += nanoseconds

    # --- DDP waits in C++, behind the last gradient of a backward pass --------------------------

    def watch(self, model: Any) -> None:
        """Have the last gradient of a model noted where DDP reduces them: its embedding's."""
        if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
            return
        weight = model.module.get_input_embeddings().weight
        if weight.requires_grad and weight.device.type == "cpu":
            weight.register_post_accumulate_grad_hook(self._note_last_gradient)

    def _note_last_gradient(self, weight: torch.Tensor) -> None:
        del weight
        self._last_gradient_ns = time.perf_counter_ns()

    def backward_ends(self) -> None:
        if self._last_gradient_ns:
            waits.add(time.perf_counter_ns() - self._last_gradient_ns)
            self._last_gradient_ns = 0

    # --- what is told of it ---------------------------------------------------------------------

    def agree(self, microseconds: list[int]) -> None:
        """Take what all ranks have told of themselves, if they did."""
        self.of_ranks = times_of_ranks(microseconds)

    def take(self) -> list[int]:
        """Return the mean microseconds of a step's parts since the last time; zeros where none."""
        steps = max(self._steps, 1)
        spent_ns = [self._step_ns - self._wait_ns - self._data_ns, self._wait_ns, self._data_ns]
        self._step_ns = self._wait_ns = self._data_ns = self._steps = 0
        parts = [max(0, part) // steps // 1000 for part in spent_ns]
        heartbeat.note_times(*parts)
        return parts


class _WaitingForData:
    """A block; not of contextlib's, which costs several times as much in each step."""

    __slots__ = ("_began_ns", "_block", "_times")

    def __init__(self, times: StepTimes) -> None:
        self._times, self._block = times, heartbeat.at(heartbeat.Phase.DATA)

    def __enter__(self) -> None:
        self._began_ns = time.perf_counter_ns()
        self._block.__enter__()

    def __exit__(self, *raised: object) -> None:
        self._block.__exit__(*raised)
        self._times.waited_for_data(time.perf_counter_ns() - self._began_ns)


def times_of_ranks(microseconds: list[int]) -> list[Times] | None:
    """Return the times of each rank out of all of them, one rank's behind another's. Pure.

    None where no step was measured yet.
    """
    if not any(microseconds):
        return None
    seconds = [value / MICROSECONDS for value in microseconds]
    return [Times(*seconds[at : at + PARTS]) for at in range(0, len(seconds), PARTS)]
