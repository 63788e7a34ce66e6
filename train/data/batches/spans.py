"""Windows of the corpus to batches of span corruption: texts without some spans, and these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from shardwright.train.config.spans import SpanCounts
from shardwright.train.data.batches.collator import IGNORED, Ids, draws_of
from shardwright.train.data.batches.sampler import SampleKey
from shardwright.train.data.batches.samples import Window


@dataclass(frozen=True)
class SpanCollator:
    """Makes a batch of windows, each of which fills its rows: nothing is padded.

    ``input_ids`` (batch, inputs) are what the encoder sees: a window with a sentinel in place of
    each span, and the end. ``labels`` (batch, targets) are each span behind its sentinel, and the
    end; ``decoder_input_ids`` are the same a position later, as who writes them sees them.
    """

    counts: SpanCounts
    sentinels: Ids
    """Of the spans of a sample, in their order."""
    start: int
    """What the decoder sees first: T5's padding."""
    end: int
    seed: int

    def __call__(self, samples: list[tuple[Window, SampleKey]]) -> dict[str, Any]:
        rows = [self.corrupted(window.tokens, key) for window, key in samples]
        inputs, targets = (np.stack(part) for part in zip(*rows, strict=True))
        seen = np.roll(targets, 1, axis=1)
        seen[:, 0] = self.start
        counted = np.array([[key.counted] for _, key in samples])
        return {
            "input_ids": torch.from_numpy(inputs),
            "decoder_input_ids": torch.from_numpy(seen),
            "labels": torch.from_numpy(np.where(counted, targets, IGNORED)),
        }

    def corrupted(self, tokens: Ids, key: SampleKey) -> tuple[Ids, Ids]:
        """Return a window's inputs and targets.

        Lengths of spans, and of what is between them, are drawn from all that add up to the counts,
        each as likely; the window begins with what is left and ends with a span (Raffel et al.
        2020). A pure function of the window, the seed, the epoch and the sample's index.
        """
        counts, draws = self.counts, draws_of(self.seed, key)
        lengths = np.empty(2 * counts.spans, dtype=np.int64)
        lengths[1::2] = _parts(draws, counts.noise, counts.spans)
        lengths[::2] = _parts(draws, counts.window - counts.noise, counts.spans)
        bounds = np.concatenate(([0], np.cumsum(lengths)))
        kept = [tokens[a:b] for a, b in zip(bounds[:-1:2], bounds[1::2], strict=True)]
        spans = [tokens[a:b] for a, b in zip(bounds[1:-1:2], bounds[2::2], strict=True)]
        marks, end = self.sentinels[:, None], np.array([self.end])
        inputs = [part for pair in zip(kept, marks, strict=True) for part in pair]
        targets = [part for pair in zip(marks, spans, strict=True) for part in pair]
        return np.concatenate([*inputs, end]), np.concatenate([*targets, end])


def _parts(draws: np.random.Generator, total: int, count: int) -> Ids:
    """Return ``count`` whole numbers of at least 1 that add up to ``total``, any as likely."""
    inner = np.sort(np.argsort(draws.random(total - 1), kind="stable")[: count - 1]) + 1
    return np.diff(np.concatenate(([0], inner, [total])))
