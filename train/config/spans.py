"""How many tokens span corruption takes of a sample, and in how many spans: T5's arithmetic."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

SENTINELS = 100
"""Tokens that stand for spans in a vocabulary that is trained here, as many as T5's has."""


class SpanCounts(NamedTuple):
    """What a sample of span corruption is made of, in tokens."""

    window: int
    """Consecutive tokens of the corpus."""
    noise: int
    """Those of them that are taken away and to be predicted."""
    spans: int
    """In how many pieces; each has a sentinel in the inputs and before it in the targets."""

    @property
    def inputs(self) -> int:
        """What the encoder sees: what is left, a sentinel for each span, and the end."""
        return self.window - self.noise + self.spans + 1

    @property
    def targets(self) -> int:
        """What the decoder predicts: each span behind its sentinel, and the end."""
        return self.noise + self.spans + 1


def counts_of_window(window: int, density: float, mean_span: float) -> SpanCounts:
    """Return how a window of some tokens is divided (Raffel et al. 2020). Pure.

    At least one token is taken, one is left, and one between each two spans and before the first.
    """
    noise = min(max(round(window * density), 1), window - 1)
    spans = min(max(round(noise / mean_span), 1), window - noise)
    return SpanCounts(window, noise, spans)


@lru_cache(maxsize=64)
def counts_of_inputs(inputs: int, density: float, mean_span: float) -> SpanCounts:
    """Return the longest window that makes so many tokens for the encoder. Pure.

    One token more makes one more of them or none, but for densities at which spans of one token
    hardly have room: there a window that is one too long has a span less than it would have.
    """
    window = max(2, inputs - 1)  # no span is shorter than the sentinel that takes its place
    while counts_of_window(window + 1, density, mean_span).inputs <= inputs:
        window += 1
    found = counts_of_window(window, density, mean_span)
    if found.inputs < inputs:
        longer = counts_of_window(window + 1, density, mean_span)
        return longer._replace(spans=longer.spans - (longer.inputs - inputs))
    return found
