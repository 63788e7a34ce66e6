"""The progress bar and the lines of held-out loss that a person watches."""

from __future__ import annotations

import os
from typing import Any, TextIO

from tqdm import tqdm
from transformers import TrainerCallback

from train.terminal import Terminal


def is_terminal(console: TextIO) -> bool:
    """Return whether a bar can be drawn: mpirun gives ranks a terminal without any columns."""
    try:
        return console.isatty() and os.get_terminal_size(console.fileno()).columns > 0
    except OSError:  # closed in between
        return False


class Progress(TrainerCallback):
    """Draws on rank 0's terminal; where there is none, prints a line for each logged step."""

    def __init__(self, console: TextIO) -> None:
        self._console = console
        self._bar: tqdm | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                file=self._console,
                dynamic_ncols=True,
                disable=not is_terminal(self._console),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self._bar is None:
            return
        if "loss" in logs:
            shown = f"loss {logs['loss']:.4f}  {logs.get('tokens_per_second', 0):,.0f} tokens/s"
            line = f"step {state.global_step}/{state.max_steps}  {shown}"
            if self._bar.disable:
                self._write(line)
            else:
                self._bar.set_postfix_str(shown)
                if isinstance(self._console, Terminal):  # a log has no bar
                    self._console.copy(line)
        if "eval_loss" in logs:
            text = (
                f"step {state.global_step}/{state.max_steps}  "
                f"held-out loss {logs['eval_loss']:.4f}  perplexity {logs['eval_perplexity']:.2f}"
            )
            if "eval_masked_accuracy" in logs:
                text += f"  masked accuracy {logs['eval_masked_accuracy']:.1%}"
            self._write(text)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()

    def _write(self, text: str) -> None:
        tqdm.write(text, file=self._console)
        self._console.flush()
