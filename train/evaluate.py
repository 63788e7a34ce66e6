"""The story of one rank of an evaluation by itself: the loop's own, before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TextIO

from transformers import TrainerCallback

from shardwright.train.config import RunConfig
from shardwright.train.data.batches.held_out import portions
from shardwright.train.errors import UserError
from shardwright.train.loop.evaluation import of_run
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import signals
from shardwright.train.process.rank import Rank
from shardwright.train.run import assemble
from shardwright.train.run_directory import evaluations
from shardwright.train.run_directory.evaluations import Evaluated

_OF_THE_CLOCK = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def evaluate(run_dir: Path, config: RunConfig, rank: Rank, console: TextIO) -> Path | None:
    """Measure what evaluation.json asks for; return the directory, None where told to stop."""
    try:
        measure(assemble(run_dir, config, rank, console))
    except signals.Stop:
        return None
    return run_dir


def measure(trainer: Trainer) -> None:
    """Evaluate the weights that the engine begins with, and write down what came of it."""
    if trainer.eval_dataset is None:
        raise UserError(
            "there are no held-out documents to evaluate on; give some with "
            "data.eval_paths='{NAME: PATH}'"
        )
    trainer.weights_of_step = evaluations.asked(trainer.run_dir) or 0
    trainer.args.eval_on_start = True
    trainer.add_callback(_NoStep())
    trainer.train()
    if not trainer.is_world_process_zero():
        return
    entry = next(e for e in reversed(trainer.state.log_history) if "eval_loss" in e)
    metrics = {
        name: value
        for name, value in entry.items()
        if name.startswith("eval_") and name not in _OF_THE_CLOCK
    }
    sets = trainer.get_eval_dataloader().dataset.sets  # type: ignore[attr-defined]
    limit = trainer.config.trainer.eval_max_samples
    counts = [part.samples for part in portions(sets, limit)]
    own = [count for count, is_its in zip(counts, of_run(sets), strict=True) if is_its]
    named = {of.name: count for of, count in zip(sets, counts, strict=True) if of.name}
    evaluations.conclude(trainer.run_dir, Evaluated(metrics, sum(own), named))


class _NoStep(TrainerCallback):
    """Ends the training with its first evaluation, as one does that stops early."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True
