"""What heartbeats and the times of steps cost a run: no collective, and less than 1 % of a step."""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from shardwright.train.config import load
from shardwright.train.loop.step_times import StepTimes
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import collectives, heartbeat, waits
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from tests.fixtures import Freeze, RanksOf, TreeOf
from tests.strategies import STRATEGIES

pytestmark = pytest.mark.distributed

STEPS, BLOCKS = 5, 4
"""Of a block, of which one is logged, and tells what the others were spent on; and the blocks."""
FIRST = 12
"""The step behind which blocks begin: what is slow at first is over, and no log is near."""
OF_HEARTBEATS = ("now", "step_begins", "at", "note_times")
OF_TIMES = (
    *("begin", "on_step_end", "waiting_for_data", "backward_ends", "agree", "take"),
    "_note_last_gradient",
)


class Unmeasured:
    """What stands for `StepTimes` where steps are not measured."""

    of_ranks = None
    waiting_for_data = staticmethod(nullcontext)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: ()


@contextmanager
def unwatched(trainer: Trainer) -> Iterator[None]:
    """Have the steps in the block leave no heartbeat, and measure none of them."""
    with (
        mock.patch.object(heartbeat, "_heart", None),
        mock.patch.object(heartbeat, "_fields", None),
        mock.patch.object(trainer, "step_times", Unmeasured()),
        mock.patch.object(StepTimes, "on_step_end", return_value=None),
    ):
        yield


class Spent:
    """The processor's time that this thread spends in some functions, entered and left alone."""

    def __init__(self) -> None:
        self.nanoseconds = self.calls = 0
        self._is_inside = False

    def begin(self) -> None:
        self.nanoseconds = self.calls = 0

    def taken(self) -> float:
        """Return the nanoseconds since `begin`, less what it takes to look at the clock."""
        nanoseconds, calls = self.nanoseconds, self.calls
        self.begin()
        for _ in range(calls):
            self._timed(lambda: None)
        return nanoseconds - self.nanoseconds

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **options: Any) -> Any:
            result = self._timed(function, *arguments, **options)
            return self._entered(result) if hasattr(result, "__enter__") else result

        return called

    @contextmanager
    def _entered(self, block: Any) -> Iterator[None]:
        self._timed(block.__enter__)
        try:
            yield
        finally:
            self._timed(block.__exit__, None, None, None)

    def _timed(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        if self._is_inside:  # one of them calls another
            return function(*arguments, **options)
        self.calls += 1
        self._is_inside, began = True, time.thread_time_ns()
        try:
            return function(*arguments, **options)
        finally:
            self.nanoseconds += time.thread_time_ns() - began
            self._is_inside = False


@contextmanager
def watched(spent: Spent) -> Iterator[None]:
    """Have all time counted that goes into heartbeats and the times of steps."""
    with ExitStack() as stack:
        for owner, names in ((heartbeat, OF_HEARTBEATS), (StepTimes, OF_TIMES), (waits, ("add",))):
            for name in names:
                replaced = spent.timed(getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, replaced))
        yield


def in_turns(run_dir: Path) -> dict[str, list[float]]:
    """Train with and without heartbeats in turns; return what was looked at.

    The collectives of each block with them and of each without, and of each step with them what
    share of its time they took.
    """
    rank, config, spent = rank_from_environment(), load(run_dir), Spent()
    with (
        heartbeat.beating(run_dir, rank, collectives.recorded),
        watched(spent),
        join(config, rank),
    ):
        return _in_turns(run_dir, spent)


def _in_turns(run_dir: Path, spent: Spent) -> dict[str, list[float]]:
    from transformers import TrainerCallback

    found: dict[str, list[float]] = {"with": [], "without": [], "shares": []}
    stack = ExitStack()

    class Turns(TrainerCallback):
        blocks = called_before = began_ns = 0
        is_watched = True

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.is_watched and state.global_step > FIRST:
                whole = time.thread_time_ns() - self.began_ns
                found["shares"].append(spent.taken() / whole)
            if state.global_step >= FIRST and (state.global_step - FIRST) % STEPS == 0:
                self.turn()
            spent.begin()
            self.began_ns = time.thread_time_ns()

        def turn(self) -> None:
            if self.blocks:
                found["with" if self.is_watched else "without"].append(
                    called() - self.called_before
                )
            stack.close()
            self.is_watched = self.blocks % 2 == 0
            self.blocks += 1
            if not self.is_watched:
                stack.enter_context(unwatched(trainer))
            self.called_before = called()

    trainer = assemble(run_dir, load(run_dir), rank_from_environment(), io.StringIO())
    trainer.add_callback(Turns())
    with stack:
        trainer.train()
    return found


def called() -> int:
    """Return how many collectives this rank has called so far, by torch's flight recorder."""
    import torch

    recorded = json.loads(collectives.recorded())
    groups = torch.distributed.distributed_c10d._world.pg_names.values()
    found = (recorded[name]["called"] for name in groups)
    return sum(entries[-1]["number"] for entries in found if entries)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fsdp", "zero3"))]
)
def test_they_add_no_collective_and_take_less_than_a_hundredth_of_a_tiny_step(
    strategy: str, tiny_tree: TreeOf, frozen_run: Freeze, ranks: RanksOf
) -> None:
    """By the processor's time, in which nobody else's work counts and no rank waits."""
    tree = tiny_tree("clm")
    tree["strategy"] = STRATEGIES[strategy]
    # As conf/model/gpt2_tiny.yaml has it; that of most tests is smaller by far.
    tree["model"] |= {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    tree["model"] |= {"intermediate_size": 512, "vocab_size": 2048}
    tree["data"]["eval_fraction"] = 0
    # No block has the last step, behind which nothing is agreed on.
    tree["trainer"] |= {"max_steps": FIRST + STEPS * BLOCKS + 1, "log_every_steps": STEPS}
    tree["trainer"] |= {"save_every_steps": 10_000}
    for found in ranks(2)(in_turns, frozen_run(tree)):
        assert found["with"] == found["without"]
        assert min(found["with"]) >= 2 * STEPS, "gradients, and an agreement on each step"
        share = statistics.median(found["shares"])
        print(f"{strategy}: {share:.2%} of {len(found['shares'])} steps")
        assert 0 < share < 0.01
