"""The progress bar and the lines of losses that a person watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.console.terminal import Terminal
from shardwright.train.units import duration, size


class Progress(TrainerCallback):
    """Draws on rank 0's terminal; where there is none, prints a line for each logged step."""

    def __init__(
        self,
        console: TextIO,
        *,
        compiles: bool = False,
        summary: Callable[[], str | None] = lambda: None,
        samples_at: Callable[[int], int] = lambda step: step,
    ) -> None:
        """``summary`` returns what is said when training has ended.

        ``samples_at`` returns the samples of so many steps, which take longer where they are more.
        """
        self._console, self._summary, self._samples_at = console, summary, samples_at
        self._first = "the first step, which compiles the model" if compiles else "the first step"
        self._is_over = False
        self._phase: progress.Phase | None = None
        self._first_ended: tuple[int, float] | None = None
        """The first step of this start, and when it ended: it takes longer than others."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            progress.end_all()  # the start
            self._phase = progress.begin(
                "training",
                total=state.max_steps,
                unit="step",
                starts_at=state.global_step,
                leave=True,
                shows_start=False,
                has_bar_name=False,
                console=self._console,
            )
            if state.global_step < state.max_steps:
                self._phase.note = self._first

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phase is None:
            return
        self._phase.done = state.global_step
        if self._first_ended is None:
            self._first_ended = state.global_step, time.monotonic()
            self._phase.note = ""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self._phase is None:
            return
        if "loss" in logs:
            shown = facts(logs)
            line = "  ".join(
                [f"step {state.global_step}/{state.max_steps}", *facts(logs, least=True)]
            )
            left = self._left_seconds(state.global_step, state.max_steps)
            line += f"  {duration(left)} left" if left else ""
            if not self._phase.is_drawn:
                self._write(line)
            else:
                self._phase.facts = shown
                if self._first_ended is not None and state.global_step == self._first_ended[0]:
                    self._phase.refresh()
                if isinstance(self._console, Terminal):  # a log has no bar
                    self._console.copy(line)
        if "eval_loss" in logs:
            text = (
                f"step {state.global_step}/{state.max_steps}  "
                f"held-out loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}"
            )
            if "eval_own_loss" in logs:
                text += f"  own loss {logs['eval_own_loss']:.4f}"
            if "eval_masked_accuracy" in logs:
                text += f"  masked accuracy {logs['eval_masked_accuracy']:.1%}"
            if "eval_bits_per_byte" in logs:
                text += f"  bits per byte {logs['eval_bits_per_byte']:.4f}"
            prefix = "eval_loss/"
            losses = [(k.removeprefix(prefix), v) for k, v in logs.items() if k.startswith(prefix)]
            named = ", ".join(f"{name} {loss:.4f}" for name, loss in losses)
            self._write(f"{text}  ({named})" if named else text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._phase is None or self._is_over:
            return
        self._is_over = True
        self._phase.end()
        if summary := self._summary():
            progress.write(summary, self._console)

    def _left_seconds(self, step: int, steps: int) -> float | None:
        """Return how long the rest takes if it takes as long a sample as what is behind."""
        if self._first_ended is None or step <= self._first_ended[0]:
            return None
        first, ended = self._first_ended
        before, here, end = map(self._samples_at, (first, step, steps))
        return (time.monotonic() - ended) / (here - before) * (end - here)

    def _write(self, text: str) -> None:
        assert self._phase is not None
        progress.write(text, self._console)
        self._phase.had_a_line()


def facts(logs: Mapping[str, Any], *, least: bool = False) -> list[str]:
    """Return what a logged step tells of loss, speed and memory, the most important first. Pure.

    ``least`` leaves out what hardly changes, for lines that stay.
    """
    shown = [f"loss {logs['loss']:.4f}"]
    if (speed := logs.get("tokens_per_second")) is not None:
        shown.append(f"{speed:,.0f} tokens/s")
    if (mfu := logs.get("mfu")) is not None:
        shown.append(f"MFU {mfu:.1%}")
    if (sent := logs.get("sent_bytes_per_second")) is not None:
        shown.append(f"{size(sent)}/s sent")
    if not least and (memory := logs.get("peak_memory_bytes")) is not None:
        shown.append(size(memory))
    return shown
