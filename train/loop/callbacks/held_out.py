"""Say so where the held-out loss is not finite, and end the run where it stays that way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from transformers import TrainerCallback

from shardwright.train.console import progress
from shardwright.train.errors import Diverged
from shardwright.train.loop import divergence

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer


class HeldOut(TrainerCallback):
    """Warns of one evaluation that is not finite, and raises Diverged where no later one is.

    The weights are finite, and so is the loss that trains them: one document may be at fault, or a
    precision in which logits overflow. Such an evaluation is never the best.
    """

    def __init__(self, trainer: Trainer, console: TextIO) -> None:
        self.trainer = trainer
        self._console = console

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        not_finite = unfinished(state.log_history)
        if not not_finite:
            return
        step, loss = not_finite[-1]
        bad, count = trainer.held_out_batches_not_finite
        where = f"in {bad} of {count} batches" if bad else "in their sum"
        text = f"the held-out loss at step {step:,} is {_word(loss)}, {where}"
        # With the best checkpoint's weights in final/, no last evaluation is needed.
        is_last = step >= state.max_steps and trainer.config.checkpoint.export == "last"
        if len(not_finite) == 1 and not is_last:
            if state.is_world_process_zero:
                progress.write(
                    f"warning: {text}, while the weights are finite; it does not count for the "
                    "best checkpoint, and if the next evaluation is not finite either, the run "
                    "ends",
                    self._console,
                )
            return
        if len(not_finite) > 1:
            text += f", and at step {not_finite[-2][0]:,} it was {_word(not_finite[-2][1])}"
        trainer.save_if_not_saved()  # the weights are as good as any
        # Closes the progress bar and the trackers.
        trainer.callback_handler.on_train_end(args, state, control)
        raise Diverged(
            f"{text}, while the weights are finite. Look at the held-out documents, and whether "
            f"precision.compute_dtype={trainer.config.precision.compute_dtype} holds the model's "
            f"logits; {divergence.way_on(trainer.run_dir)}"
        )


def unfinished(log_history: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Return step and loss of the newest evaluations, as long as they are not finite. Pure."""
    found: list[tuple[int, float]] = []
    for entry in reversed(log_history):
        if "eval_loss" not in entry:
            continue
        if math.isfinite(entry["eval_loss"]):
            break
        if not found or found[-1][0] != entry["step"]:  # evaluated again after a resume
            found.append((entry["step"], entry["eval_loss"]))
    return found[::-1]


def _word(loss: float) -> str:
    return "NaN" if math.isnan(loss) else "inf"
