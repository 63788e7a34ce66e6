"""From what is summed over held-out samples to the metrics of an evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardwright.train.data.batches.held_out import HeldOutSet


class Sums(NamedTuple):
    """Of the batches of a set, over all ranks; never a mean of means."""

    loss: float
    """In nats, of all labels."""
    correct: float
    """Labels that were predicted right."""
    labels: float
    """Or, where they have weights, the tokens of which there could be labels."""
    samples: float
    """Those that have a label."""
    not_finite: float
    """Batches whose loss is not."""
    batches: float
    own: float = 0.0
    """By the loss of the user's own, of all labels."""

    def __add__(self, other: tuple[float, ...]) -> Sums:  # type: ignore[override]
        return Sums(*(mine + its for mine, its in zip(self, other, strict=True)))


NOTHING = Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def total(sets: Sequence[HeldOutSet], sums: Sequence[Sums]) -> Sums:
    """Return the sums of which the run's own loss is made. Pure.

    They are those of its corpus; where that holds out nothing, of the user's own documents.
    """
    return sum((of for of, is_its in zip(sums, of_run(sets), strict=True) if is_its), NOTHING)


def metrics(
    sets: Sequence[HeldOutSet],
    sums: Sequence[Sums],
    *,
    masked: bool,
    has_own_loss: bool = False,
    is_code: bool = True,
) -> Iterator[tuple[str, float]]:
    """Yield name and value of what was measured, of all and of each set that has a name. Pure.

    The loss is that of the objective, whatever function of the user's own is minimised. Bits per
    byte are told where the loss ``is_code`` of the text, and not of ``masked`` models: what one
    predicts, it has seen the surroundings of. What masked diffusion minimises bounds one from
    above.
    """
    is_code = is_code and not masked
    whole = total(sets, sums)
    mean = whole.loss / max(whole.labels, 1)
    yield "loss", mean
    yield "perplexity", math.exp(min(mean, 700.0))
    if masked:
        yield "masked_accuracy", whole.correct / max(whole.labels, 1)
    if has_own_loss:
        yield "own_loss", whole.own / max(whole.labels, 1)
    its = [each for each, is_its in zip(sets, of_run(sets), strict=True) if is_its]
    if is_code and (bits := bits_per_byte(mean, its)) is not None:
        yield "bits_per_byte", bits
    for each, of in zip(sets, sums, strict=True):
        if each.name is None or not of.labels:
            continue
        mean = of.loss / of.labels
        yield f"loss/{each.name}", mean
        if has_own_loss:
            yield f"own_loss/{each.name}", of.own / of.labels
        if is_code and (bits := bits_per_byte(mean, [each])) is not None:
            yield f"bits_per_byte/{each.name}", bits


def bits_per_byte(mean: float, sets: Sequence[HeldOutSet]) -> float | None:
    """Return a mean loss of tokens (nats) as bits per byte of text; None where that is not known.

    By how many tokens the documents of the sets are, ends of documents included, and how many bytes
    of UTF-8. Pure.
    """
    found = [each.text_bytes for each in sets]
    known = [count for count in found if count is not None]
    if len(known) < len(found) or not sum(known):
        return None
    return mean * sum(each.tokens for each in sets) / (sum(known) * math.log(2))


def of_run(sets: Sequence[HeldOutSet]) -> list[bool]:
    """Return for each set whether the run's own loss is of it."""
    has_own = any(each.is_own and len(each.samples) for each in sets)
    return [each.is_own or not has_own for each in sets]
