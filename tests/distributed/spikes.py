"""What a rank does in a test of spikes: some samples are spoilt, wherever a run meets them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from shardwright.train.config import RunConfig, load
from shardwright.train.data.batches.collator import Collator
from shardwright.train.data.batches.sampler import SampleKey, sample_at
from shardwright.train.errors import Diverged
from shardwright.train.model.loss_terms import IGNORED
from shardwright.train.process import signals
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble, run
from shardwright.train.strategy.group import join
from tests.distributed.jobs import fp16_allowed_on_a_cpu

Planted = Sequence[tuple[int, int]]
"""Ranges of positions whose samples are spoilt."""
RARE = 5
"""A token that no text has."""


def run_with_spikes(run_dir: Path, planted: Planted) -> str:
    """Do what `shardwright rank RUN_DIR` does; return what this rank prints, and its error."""
    rank, console, config = rank_from_environment(), io.StringIO(), load(run_dir)
    with spoilt(run_dir, planted), join(config, rank):
        error = _run(run_dir, config, rank, console)
    return console.getvalue() + error


def run_stopped_at_a_spike(run_dir: Path, planted: Planted) -> None:
    """Run as the only rank, which is told to stop while the step of the spoilt samples lasts."""
    rank, config, seen = rank_from_environment(), load(run_dir), [False]

    def asked() -> str | None:
        # The batch behind the spoilt one is fetched while that one is trained on.
        return "SIGTERM" if True in seen and not seen[-1] else None

    with (
        mock.patch.object(signals, "asked", asked),
        mock.patch.object(signals, "seconds_since", return_value=0.0),
        spoilt(run_dir, planted, seen),
        join(config, rank),
    ):
        assert run(run_dir, config, rank, io.StringIO()) is None


def _run(run_dir: Path, config: RunConfig, rank: Rank, console: io.StringIO) -> str:
    # Its own frame, so that nothing holds the trainer when the group is left.
    try:
        run(run_dir, config, rank, console)
    except Diverged as error:
        return str(error)
    return ""


@contextmanager
def spoilt(run_dir: Path, planted: Planted, seen: list[bool] | None = None) -> Iterator[None]:
    """Have every label of some samples be a token that comes nowhere else.

    ``seen`` gets for each batch whether it has any.
    """
    sound = Collator.__call__

    def collated(collator: Collator, samples: Any) -> Any:
        batch = sound(collator, samples)
        rows = [row for row, (_, key) in enumerate(samples) if key in keys]
        for row in rows:
            labels = batch["labels"][row]
            labels[labels != IGNORED] = RARE
        if seen is not None:
            seen.append(bool(rows))
        return batch

    keys = set(_keys(run_dir, planted))
    with mock.patch.object(Collator, "__call__", collated):
        yield


def _keys(run_dir: Path, planted: Planted) -> Iterator[SampleKey]:
    from shardwright.train import data

    config = load(run_dir)
    count = data.prepare(config, run_dir).samples_per_epoch
    for first, last in planted:
        yield from (sample_at(config.seed, count, position) for position in range(first, last))


def by_hand(run_dir: Path, planted: Planted, steps: Sequence[tuple[int, bool]]) -> list[float]:
    """Return the loss of each step of a plain loop over a run's model, alone.

    ``steps`` are the position at which the batch of each begins, and whether it updates.
    """
    rank = rank_from_environment()
    with spoilt(run_dir, planted), join(load(run_dir), rank):
        return _by_hand(run_dir, rank, steps)


def _by_hand(run_dir: Path, rank: Rank, steps: Sequence[tuple[int, bool]]) -> list[float]:
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils import clip_grad_norm_

    config = load(run_dir)
    trainer = assemble(run_dir, config, rank, io.StringIO())
    loader: Any = trainer._train_loader
    count = loader.batch_sampler.samples_per_epoch
    size, losses = config.trainer.global_batch_size, []
    optimizer = trainer.create_optimizer()
    trainer.model.train()
    for position, updates in steps:
        keys = [sample_at(config.seed, count, position + i) for i in range(size)]
        batch = loader.collate_fn([loader.dataset[key] for key in keys])
        logits = trainer.model(input_ids=batch["input_ids"]).logits
        loss = cross_entropy(logits.flatten(0, -2), batch["labels"].flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(trainer.model.parameters(), config.trainer.max_grad_norm)
        if updates:
            optimizer.step()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    return losses


def changed_by(run_dir: Path, planted: Planted) -> list[bool]:
    """Train; return for each step whether it has changed any weight of this rank's."""
    rank = rank_from_environment()
    with fp16_allowed_on_a_cpu(), spoilt(run_dir, planted), join(load(run_dir), rank):
        return _changed_by(run_dir, rank)


def _changed_by(run_dir: Path, rank: Rank) -> list[bool]:
    import torch
    from transformers import TrainerCallback

    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    before: list[torch.Tensor] = []
    changed: list[bool] = []

    def weights() -> list[torch.Tensor]:
        held = trainer.engine.local_weights(trainer)
        return [getattr(w, "_local_tensor", w).detach().clone().cpu() for w in held]

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            before[:] = weights()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            pairs = zip(weights(), before, strict=True)
            changed.append(any(not torch.equal(now, then) for now, then in pairs))

    trainer.add_callback(Look())
    trainer.train()
    return changed
