"""Which way to train `auto` comes to: the fastest that fits, of equals the plainest. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

AS_FAST = 0.02
"""By which part of a step's time two ways may differ and count as equally fast."""
ENOUGH_TOKENS = 2**14
"""Of a micro-batch: assumed to keep any device busy, so that more of them only take memory."""
SMALLER = 0.9
"""Of a device's bytes what the next smaller way takes at the most."""


@dataclass(frozen=True)
class Way:
    """One way to train a run that does not change what it learns."""

    strategy: str
    """The option of conf/strategy/."""
    place: int
    """Of the strategy among all, those first that divide and offload least."""
    micro_batch_size: int
    tokens: int
    """Of a micro-batch."""
    every_blocks: int | None
    """Of which blocks activations are recomputed; None of none."""
    seconds: float
    """Of an optimizer step, as planned."""

    @property
    def plainness(self) -> tuple[int, float, int, int]:
        """Less is preferred: divided least, least recomputed, enough tokens and then few."""
        recomputed = 0.0 if self.every_blocks is None else 1 / self.every_blocks
        lacking = max(0, ENOUGH_TOKENS - self.tokens)
        return self.place, recomputed, lacking, self.micro_batch_size


def choose(ways: Sequence[Way], fits: Callable[[Way], bool]) -> Way | None:
    """Return the plainest of those that fit and are as fast as the fastest; None where none fits.

    ``fits`` may be slow: it is asked of the fastest ones first, and of few others.
    """
    for way in sorted(ways, key=lambda way: (way.seconds, way.plainness)):
        if fits(way):
            as_fast = [each for each in ways if each.seconds <= way.seconds * (1 + AS_FAST)]
            return next(filter(fits, sorted(as_fast, key=lambda each: each.plainness)))
    return None


def next_smaller(
    ways: Sequence[Way],
    chosen: Way,
    fits: Callable[[Way], bool],
    device_bytes: Callable[[Way], int],
    at_least: Callable[[Way], int] = lambda way: 0,
) -> Way | None:
    """Return what `choose` finds of those that take noticeably less of a device than ``chosen``.

    ``device_bytes`` may be slow, and is not asked where ``at_least`` is too much already.
    """
    most = SMALLER * device_bytes(chosen)
    return choose(
        [way for way in ways if at_least(way) <= most],
        lambda way: fits(way) and device_bytes(way) <= most,
    )
