"""One rank of a timed comparison: python -m benchmarks.timed_overhead RUN_DIR WARMUP_ROUNDS STEPS.

It trains what RUN_DIR/config.yaml says in three ways: by a bare loop, by the stock Trainer and by
ours. Each is a thread of one process; they take turns of STEPS steps, and while one has its turn
the others wait, so that whatever else the machine does hits all of them alike. Rank 0 writes the
seconds of the steps of each turn, by the wall and of CPU time, to RUN_DIR/figures.json.
"""

from __future__ import annotations

import gc
import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.functional import cross_entropy

from benchmarks.timed_run import stock_trainer
from shardwright.train import config as run_config
from shardwright.train import data
from shardwright.train.config import RankLayout, RunConfig
from shardwright.train.data.batches.loader import train_loader
from shardwright.train.model import build as models
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from shardwright.train.strategy.replicated import Replicated

Times = list[tuple[float, float]]
"""Seconds by the wall and of this process's CPU time, of one step each."""


class Turns:
    """Lets one of several threads go on at a time, for a number of steps."""

    def __init__(self, ways: list[str], steps: int) -> None:
        self.steps = steps
        self.of_each: dict[str, list[Times]] = {way: [] for way in ways}
        self.error: BaseException | None = None
        self._changed = threading.Condition()
        self._order = list(ways)
        self._collects = dict.fromkeys(ways, True)
        """Whether each has garbage collected for it, as far as it has said so by now."""
        self._began = (0.0, 0.0)

    def run(self, ways: dict[str, Callable[[Callable[[], None]], None]]) -> None:
        """Have each way train; it is given what it calls at the end of each step."""
        threads = [threading.Thread(target=self._thread, args=way) for way in ways.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _thread(self, way: str, train: Callable[[Callable[[], None]], None]) -> None:
        try:
            self._wait(way)
            train(lambda: self.step_ended(way))
        except BaseException as error:
            self.error = self.error or error
        with self._changed:
            self._order.remove(way)
            gc.enable()
            self._changed.notify_all()

    def _wait(self, way: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._order[0] == way or self.error is not None)
        if self.error is not None:
            raise SystemExit
        gc.collect(0)  # what others have left behind is not to be paid for here
        if not self._collects[way]:
            gc.disable()
        self.of_each[way].append([])
        self._began = time.perf_counter(), time.process_time()

    def step_ended(self, way: str) -> None:
        """Note a step; after the last one of a turn wait for the next turn."""
        now = time.perf_counter(), time.process_time()
        turn = self.of_each[way][-1]
        turn.append((now[0] - self._began[0], now[1] - self._began[1]))
        if len(turn) < self.steps:
            self._began = time.perf_counter(), time.process_time()
            return
        self._collects[way] = gc.isenabled()
        with self._changed:
            self._order.append(self._order.pop(0))
            gc.enable()
            self._changed.notify_all()
        self._wait(way)


class StepEnds(transformers.TrainerCallback):
    def __init__(self, ended: Callable[[], None]) -> None:
        self.ended = ended

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended()


def trained(trainer: transformers.Trainer, ended: Callable[[], None]) -> None:
    trainer.add_callback(StepEnds(ended))
    trainer.train()


def trained_by_hand(
    config: RunConfig, run_dir: Path, rank: Rank, ended: Callable[[], None]
) -> None:
    """Train as one would who writes the loop himself, with care and for this model alone."""
    trainer, layout = config.trainer, RankLayout(replicas=rank.world_size)
    prepared = data.prepare(config, run_dir)
    steps = trainer.max_steps
    assert steps is not None
    loader = train_loader(prepared, config, rank=rank.index, layout=layout, total_steps=steps)
    built, values = models.build(config, prepared.tokenizer)
    model: Any = Replicated(config, layout).shard(built, values).train()
    if rank.world_size > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, broadcast_buffers=False
        )
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": trainer.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=trainer.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for batch in loader:
        labels = batch.pop("labels")
        logits = model(**batch).logits
        cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, trainer.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ended()


def main(argv: list[str]) -> None:
    run_dir, rank = Path(argv[0]), rank_from_environment()
    warmup_rounds, steps = map(int, argv[1:])
    config = run_config.load(run_dir)
    with join(config, rank):
        measure(run_dir, config, rank, warmup_rounds, steps)


def measure(run_dir: Path, config: RunConfig, rank: Rank, warmup_rounds: int, steps: int) -> None:
    # Built one after the other: what is built is global to the process for a while.
    ours = assemble(run_dir, config, rank, io.StringIO())
    stock = stock_trainer(config, run_dir, rank.world_size)
    stock.remove_callback(transformers.PrinterCallback)
    turns = Turns(["bare", "stock", "ours"], steps)
    turns.run(
        {
            "bare": lambda ended: trained_by_hand(config, run_dir, rank, ended),
            "stock": lambda ended: trained(stock, ended),
            "ours": lambda ended: trained(ours, ended),
        }
    )
    if rank.index == 0:
        found = {
            way: [turn for turn in of_each if turn][warmup_rounds:]
            for way, of_each in turns.of_each.items()
        }
        (run_dir / "figures.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
