"""The first micro-batches of a run, and their samples: what its own loader would give its ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from shardwright.train.config import (
    RunConfig,
    accumulation_steps,
    rank_layout,
    samples_wanted,
    schedule_of,
)
from shardwright.train.data.batches.collator import IGNORED
from shardwright.train.data.batches.loader import Batches, eval_loader, train_loader
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window
from shardwright.train.data.prepare import Prepared
from shardwright.train.data.upkeep.lengths import Between, ends_in
from shardwright.train.data.upkeep.shown_samples import Ids, Row

ENDLESS = 2**40
"""Steps: only the first ones are looked at."""


class MicroBatch(NamedTuple):
    """What a rank gets at once."""

    keys: list[SampleKey]
    windows: list[Window]
    ids: Ids
    """Shape (samples, width)."""
    labels: Ids


@dataclass
class Positions:
    """Counts of the positions of some micro-batches."""

    micro_batches: int = 0
    positions: int = 0
    padding: int = 0
    predicted: int = 0
    """Positions of which the model predicts a token."""

    def add(self, batch: MicroBatch, used: int, *, is_padded: bool) -> None:
        """Count a batch of which ``used`` positions are no padding."""
        positions = batch.ids.size if is_padded else used
        self.micro_batches += 1
        self.positions += positions
        self.padding += positions - used
        self.predicted += int((batch.labels != IGNORED).sum())


@dataclass(frozen=True)
class Rows:
    """The samples of a run, or of its evaluations, in the order in which they are taken."""

    config: RunConfig
    prepared: Prepared
    between: Between | None
    """Tells documents apart where their ends are not kept."""
    held_out: bool = False

    def micro_batches(self) -> Iterator[MicroBatch]:
        """Yield those of all ranks, in the order of their samples.

        Which rank gets which depends on their number, and what is in them does not.
        """
        loader, batches = self._dealt()
        assert loader.collate_fn is not None
        for keys in batches:
            samples = [loader.dataset[key] for key in keys]
            batch = loader.collate_fn(samples)
            windows = [window for window, _ in samples]
            yield MicroBatch(keys, windows, batch["input_ids"].numpy(), batch["labels"].numpy())

    def _dealt(self) -> tuple[Batches, Any]:
        """Return the loader of the first rank, and what deals it the micro-batches of all."""
        config = self.config
        layout = rank_layout(config.strategy, config.launcher.world_size)
        if self.held_out:
            loader = eval_loader(self.prepared, config, rank=0, layout=layout)
            batches: Any = loader.batch_sampler
            return loader, replace(batches, data_parallel_size=1)
        wanted = samples_wanted(
            config, self.prepared.samples_per_epoch, self.prepared.samples_of_max_tokens
        )
        is_known = wanted is not None or config.trainer.max_steps is not None
        loader = train_loader(
            self.prepared,
            config,
            rank=0,
            layout=layout,
            total_steps=ENDLESS,
            schedule=schedule_of(config.trainer, wanted) if is_known else None,
        )
        slots = accumulation_steps(config.trainer, layout) * layout.data_parallel_size
        batches = loader.batch_sampler
        return loader, replace(batches, data_parallel_size=1, accumulation_steps=slots)

    @property
    def is_padded(self) -> bool:
        """Whether a batch has rows, and not its lines end to end."""
        data = self.config.data
        return not (data.line_by_line and data.is_unpadded)

    def first(self, count: int) -> Iterator[Row]:
        """Yield the first samples, each as its row of a micro-batch."""
        every = (
            self._row(batch, row)
            for batch in self.micro_batches()
            for row, key in enumerate(batch.keys)
            if key.counted
        )
        for position, row in enumerate(islice(every, count)):
            yield row._replace(position=position)

    def positions(self, micro_batches: int) -> Positions:
        """Count the positions of the first micro-batches."""
        found = Positions()
        for batch in islice(self.micro_batches(), micro_batches):
            used = sum(self._width(window) for window in batch.windows)
            found.add(batch, used, is_padded=self.is_padded)
        return found

    def _width(self, window: Window) -> int:
        """Return how many positions of its row a sample takes: for mlm with its frame."""
        if self.config.objective.is_encoder_decoder:
            return self.config.data.tokens_per_sample
        tokens = len(window.tokens)
        return tokens + 2 if self.config.objective.is_masked else max(0, tokens - 1)

    def _row(self, batch: MicroBatch, row: int) -> Row:
        key, window = batch.keys[row], batch.windows[row]
        frame = self.config.objective.is_masked
        width = self._width(window)
        stop = None if self.is_padded else width
        ids, labels = batch.ids[row][:stop], batch.labels[row][:stop]
        if self.config.objective.is_encoder_decoder:
            source, number = self._origin(key)
            return Row(0, source, number, ids, batch.labels[row], width, [], False, writes=True)
        if window.document_ends is not None:
            ends = window.document_ends + frame
        elif self.between is not None and not self.config.data.line_by_line:
            ends = ends_in(window.tokens, self.between) + frame
        else:
            ends = np.empty(0, dtype=np.int64)
        source, number = self._origin(key)
        inside = [int(end) for end in ends if 0 < end < width]
        return Row(0, source, number, ids, labels, width, inside, masked=frame)

    def _origin(self, key: SampleKey) -> tuple[int, int]:
        """Return source, or set of held-out documents, and number of a sample in it."""
        if self.held_out:
            first = self.prepared.held_out_sets[key.held_out_set].first
            return key.held_out_set, key.sample - first
        mixture = (self.prepared.stages or (self.prepared.train,))[key.stage]
        return mixture.locate(key.epoch, key.sample)
