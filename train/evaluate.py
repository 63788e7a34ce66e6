"""The story of one rank of an evaluation by itself: the loop's own, on weights and no more."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TextIO

from shardwright.train.config import RunConfig
from shardwright.train.console import progress
from shardwright.train.data.batches.held_out import portions
from shardwright.train.errors import UserError
from shardwright.train.loop import isolation
from shardwright.train.loop.evaluation import of_run
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process import numerics, signals
from shardwright.train.process.rank import Rank
from shardwright.train.run import assemble
from shardwright.train.run_directory import evaluations
from shardwright.train.run_directory.evaluations import Evaluated
from shardwright.train.strategy.verify import verify_forward_only

_OF_THE_CLOCK = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


def evaluate(run_dir: Path, config: RunConfig, rank: Rank, console: TextIO) -> Path | None:
    """Measure what evaluation.json asks for; return the directory, None where told to stop."""
    try:
        measure(assemble(run_dir, config, rank, console, trains=False), console)
    except signals.Stop:
        return None
    return run_dir


def measure(trainer: Trainer, console: TextIO) -> None:
    """Evaluate the weights that the engine has placed, and write down what came of it."""
    if trainer.eval_dataset is None:
        raise UserError(
            "there are no held-out documents to evaluate on; give some with "
            "data.eval_paths='{NAME: PATH}'"
        )
    trainer.weights_of_step = evaluations.asked(trainer.run_dir) or 0
    verify_forward_only(trainer.engine, trainer)
    isolation.check(trainer)
    metrics = _metrics(trainer)
    if not trainer.is_world_process_zero():
        return
    if not math.isfinite(metrics["eval_loss"]):
        bad, count = trainer.held_out_batches_not_finite
        where = f"in {bad} of {count} batches" if bad else "in their sum"
        progress.write(f"warning: the held-out loss is not finite, {where}", console)
    sets = trainer.get_eval_dataloader().dataset.sets  # type: ignore[attr-defined]
    limit = trainer.config.trainer.eval_max_samples
    counts = [part.samples for part in portions(sets, limit)]
    own = [count for count, is_its in zip(counts, of_run(sets), strict=True) if is_its]
    named = {of.name: count for of, count in zip(sets, counts, strict=True) if of.name}
    evaluations.conclude(trainer.run_dir, Evaluated(metrics, sum(own), named))


def _metrics(trainer: Trainer) -> dict[str, float]:
    try:
        found = trainer.evaluate()
    except RuntimeError as error:
        if (problem := numerics.refused(error)) is None:
            raise
        raise UserError(problem) from error
    return {
        name: value
        for name, value in found.items()
        if name.startswith("eval_") and name not in _OF_THE_CLOCK
    }
