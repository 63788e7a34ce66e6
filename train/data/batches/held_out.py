"""The sets of held-out samples that an evaluation tells apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardwright.train.data.batches.sampler import Portion
from shardwright.train.data.batches.samples import Mixture, Samples


class HeldOutSet(NamedTuple):
    """The held-out samples of one source of the corpus, or of the user's own documents."""

    name: str | None
    """None of a corpus of one source, which needs none."""
    samples: Samples
    is_own: bool
    """Of the run's corpus."""
    first: int = 0
    """Number of the first sample among all of the corpus that are held out; by it they are masked.
    That of the user's own is 0: what else is held out does not change their masks."""

    @property
    def tokens(self) -> int:
        """All of its documents, also those that are in no sample."""
        return len(self.samples.store.tokens)

    @property
    def text_bytes(self) -> int | None:
        """Of its documents; None where that is not known."""
        return self.samples.store.text_bytes


def sets_of(mixture: Mixture, names: Sequence[str]) -> Iterator[HeldOutSet]:
    """Yield the sources of a corpus; without ``names`` there is one."""
    first = 0
    for source, samples in enumerate(mixture.sources):
        yield HeldOutSet(names[source] if names else None, samples, is_own=True, first=first)
        first += len(samples)


def portions(sets: Sequence[HeldOutSet], limit: int | None) -> tuple[Portion, ...]:
    """Return what is evaluated of each set. Pure.

    ``limit`` is trainer.eval_max_samples: the first ones of all that the corpus holds out, and of
    each set of the user's own.
    """

    def share(of: HeldOutSet) -> int:
        return len(of.samples) if limit is None else min(len(of.samples), max(0, limit - of.first))

    return tuple(Portion(each.first, share(each)) for each in sets)
