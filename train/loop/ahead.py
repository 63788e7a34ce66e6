"""The step to come: its micro-batches, and what all ranks add up of it while they still train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from shardwright.train.data.batches.collator import PADDING, PREDICTABLE

if TYPE_CHECKING:
    from shardwright.train.strategy.finite import Numbers

Batch = dict[str, torch.Tensor]


class Agreed(NamedTuple):
    """What all ranks know alike of a step before it begins, added up over them."""

    labels: int
    tokens: int
    stops: int
    """How many were asked to stop."""
    losses_not_finite: int
    norms_not_finite: int
    """Of the step `Ahead.judged`."""
    alarms: int
    """How many ranks have seen a module in the step before whose numbers end the run."""
    profiles: int
    """How many were asked for a profile."""


class Ahead:
    """One step's micro-batches in host memory, of which the ranks are told over gloo.

    That takes no part of the device: nothing waits for what it computes, and no collective of its
    own comes between those of the engine.
    """

    def __init__(
        self,
        batches: list[Batch],
        *,
        labels: int,
        tokens: int,
        stops: bool,
        judged: Numbers | None,
        alarm: bool = False,
        profile: bool = False,
        times: Sequence[int] = (),
    ) -> None:
        """Begin to tell the others. Collective, and does not wait.

        ``judged`` is what this rank has seen of the newest step of which anything is known,
        ``alarm`` whether it has watched a module fail, ``profile`` whether it was asked for one,
        ``times`` what its steps were spent on: of all ranks or of none.
        """
        self.batches, self.judged = batches, judged
        not_finite = judged.not_finite if judged is not None else [0, 0]
        ranks, rank = 1, 0
        if dist.is_initialized():
            ranks, rank = dist.get_world_size(), dist.get_rank()
        # Each rank's in a place of its own: added to the zeros of all others, they are gathered.
        places = [0] * (len(times) * ranks)
        places[rank * len(times) : (rank + 1) * len(times)] = times
        flags = [int(alarm), int(profile)]
        self._sums = torch.tensor([labels, tokens, int(stops), *not_finite, *flags, *places])
        self.times: list[int] = []
        """Those of all ranks, one behind another, once it is agreed."""
        self._work: Any = None
        if ranks > 1:
            self._work = dist.all_reduce(self._sums, async_op=True)

    def agreed(self) -> Agreed:
        """Return the sums over all ranks, once all have come here."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        sums = self._sums.tolist()
        self.times = sums[len(Agreed._fields) :]
        return Agreed(*sums[: len(Agreed._fields)])


def counted(batches: list[Batch], ignored: int) -> tuple[int, int]:
    """Return how many labels and how many tokens, padding left out, are in micro-batches.

    Of an encoder-decoder both what is read and what is written. Where labels have weights, instead
    of labels how many tokens there could be labels of.
    """
    labels = tokens = 0
    for batch in batches:
        if PREDICTABLE in batch:
            labels += int(batch[PREDICTABLE])
        else:
            labels += int((batch["labels"].numpy() != ignored).sum())
        if "decoder_input_ids" in batch:
            tokens += batch["decoder_input_ids"].numel()
        if "attention_mask" in batch:
            tokens += int(batch["attention_mask"].numpy().sum())
        else:
            tokens += batch["input_ids"].numel() - int(batch.get(PADDING, 0))
    return labels, tokens
