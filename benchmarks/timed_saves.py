"""One rank of a timed training: python -m benchmarks.timed_saves RUN_DIR N.

It trains what RUN_DIR/config.yaml says, the first N steps uncounted; rank 0 writes
RUN_DIR/figures.json. A checkpoint in flight at the end counts: the time is up when it is written.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from train import config as run_config
from train.checkpoint import layout
from train.rank import Rank, join, rank_from_environment
from train.run import assemble
from train.trainer import Trainer


class Clock(transformers.TrainerCallback):
    """Notes when the warm-up ended and how long the training stood still in each save."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.started = 0.0
        self.step_ended = 0.0
        self.stalls: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step_ended = now()
        if state.global_step == self.warmup_steps:
            self.started = self.step_ended

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stalls.append(now() - self.step_ended)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was launched has to have run
    return time.perf_counter()


def timed(trainer: Trainer, warmup_steps: int) -> dict[str, Any]:
    """Train and return what was measured."""
    clock = Clock(warmup_steps)
    trainer.add_callback(clock)
    trainer.train()
    seconds = now() - clock.started
    checkpoints = layout.whole_checkpoints(trainer.run_dir / "checkpoints")
    on_gpu = trainer.args.device.type == "cuda"
    return {
        "seconds": seconds,
        "stalls_seconds": clock.stalls,
        "checkpoint_steps": [step for step, _ in checkpoints],
        "checkpoint_bytes": sum(
            path.stat().st_size
            for _, newest in checkpoints[-1:]
            for path in layout.files_of(newest)
        ),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
    }


def measure(run_dir: Path, rank: Rank, warmup_steps: int) -> None:
    figures = timed(assemble(run_dir, rank, sys.stdout), warmup_steps)
    if rank.index == 0:
        (run_dir / "figures.json").write_text(json.dumps(figures))


def main(argv: list[str]) -> None:
    run_dir, rank = Path(argv[0]), rank_from_environment()
    with join(run_config.load(run_dir), rank):
        measure(run_dir, rank, int(argv[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
