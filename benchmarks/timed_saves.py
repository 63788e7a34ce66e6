"""One rank of a timed training: python -m benchmarks.timed_saves RUN_DIR WARMUP_STEPS ROUNDS STEPS.

It trains what RUN_DIR/config.yaml says. After the warm-up, each round has a stretch of STEPS steps
for each way to save, in turns: none, sync and async, the save at its beginning. A stretch ends when
what it saved is published. Rank 0 writes RUN_DIR/figures.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from shardwright.train import config as run_config
from shardwright.train.checkpoint.format import layout
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.run_directory.names import CHECKPOINTS
from shardwright.train.strategy.group import join

WAYS = ("none", "sync", "async")


class Stretches(transformers.TrainerCallback):
    """Saves at the beginning of each stretch and times it to its end."""

    def __init__(self, trainer: Trainer, warmup_steps: int, rounds: int, steps: int) -> None:
        self.trainer, self.warmup_steps, self.steps = trainer, warmup_steps, steps
        # Who comes first alternates, as a disk may still be busy with what came before.
        self.ways = [way for i in range(rounds) for way in (WAYS if i % 2 == 0 else WAYS[::-1])]
        self.seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        self.stall_seconds: dict[str, list[float]] = {"sync": [], "async": []}
        self.started = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done, rest = divmod(state.global_step - self.warmup_steps, self.steps)
        if rest or done < 0:
            return
        if done:
            self.trainer.saver.wait()
            self.seconds[self.ways[done - 1]].append(now() - self.started)
        if done < len(self.ways):
            self.begin(self.ways[done])

    def begin(self, way: str) -> None:
        self.started = now()
        if way != "none":
            self.trainer.saver.in_background = way == "async"
            self.trainer.saver.save()
            self.stall_seconds[way].append(now() - self.started)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # what was launched has to have run
    return time.perf_counter()


def measure(run_dir: Path, rank: Rank, warmup_steps: int, rounds: int, steps: int) -> None:
    trainer = assemble(run_dir, run_config.load(run_dir), rank, sys.stdout)
    stretches = Stretches(trainer, warmup_steps, rounds, steps)
    trainer.add_callback(stretches)
    trainer.train()
    ((_, newest), *_) = reversed(layout.whole_checkpoints(run_dir / CHECKPOINTS))
    on_gpu = trainer.args.device.type == "cuda"
    figures = {
        "seconds": stretches.seconds,
        "stall_seconds": stretches.stall_seconds,
        "checkpoint_bytes": sum(path.stat().st_size for path in layout.files_of(newest)),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
    }
    if rank.index == 0:
        (run_dir / "figures.json").write_text(json.dumps(figures))


def main(argv: list[str]) -> None:
    run_dir, rank = Path(argv[0]), rank_from_environment()
    warmup_steps, rounds, steps = map(int, argv[1:])
    with join(run_config.load(run_dir), rank):
        measure(run_dir, rank, warmup_steps, rounds, steps)


if __name__ == "__main__":
    main(sys.argv[1:])
