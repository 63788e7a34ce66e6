"""The first samples of a run, each as its row of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shardwright.train.config import RunConfig
from shardwright.train.data.batches.loader import collator
from shardwright.train.data.batches.sampler import sample_at
from shardwright.train.data.prepare import Prepared
from shardwright.train.data.upkeep.lengths import Between, ends_in
from shardwright.train.data.upkeep.shown_samples import Row


def first_rows(
    config: RunConfig, prepared: Prepared, between: Between | None, count: int
) -> Iterator[Row]:
    """Yield the first ``count`` samples in the order of a run, with the masks of that run.

    Padding is that of a micro-batch of them, of at most the run's own size.
    """
    causal = config.objective.kind == "clm"
    mixture, collate = prepared.train, collator(prepared, config, config.seed)
    if prepared.stages:
        mixture, length = prepared.stages[0], config.data.stages[0].sequence_length
        collate = replace(collate, sequence_length=length or collate.sequence_length)
    if prepared.stages:
        mixture, stage = prepared.stages[0], config.data.stages[0]
        collate = replace(collate, sequence_length=stage.sequence_length or collate.sequence_length)
    pads = not (config.data.line_by_line and config.data.is_unpadded)
    at_once = config.trainer.micro_batch_size if pads else 1
    size = at_once if isinstance(at_once, int) else 1
    for first in range(0, count, size):
        positions = range(first, min(first + size, count))
        keys = [sample_at(config.seed, len(mixture), position) for position in positions]
        windows = [mixture.get(key.epoch, key.sample) for key in keys]
        batch = collate(list(zip(windows, keys, strict=True)))
        for row, (position, key, window) in enumerate(zip(positions, keys, windows, strict=True)):
            ids, labels = (batch[name][row].numpy() for name in ("input_ids", "labels"))
            width = len(window.tokens) - 1 if causal else len(window.tokens) + 2
            inside = np.asarray(ids[:width])
            if window.document_ends is not None:
                ends = window.document_ends + (not causal)
            elif between is not None and not config.data.line_by_line:
                ends = ends_in(window.tokens, between) + (not causal)
            else:
                ends = np.empty(0, dtype=np.int64)
            source, number = mixture.locate(key.epoch, key.sample)
            yield Row(
                position,
                source,
                number,
                np.asarray(ids) if pads else inside,
                np.asarray(labels) if pads else np.asarray(labels[:width]),
                width,
                [int(end) for end in ends if 0 < end < width],
                masked=not causal,
            )
