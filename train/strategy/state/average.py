"""The average of the weights, in fp32: of each rank its part, which no other one holds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shardwright.train.checkpoint.format.lazy import PortableState, Unreadable
from shardwright.train.checkpoint.read import average as files
from shardwright.train.strategy.state.host_memory import HostMemory
from shardwright.train.strategy.state.snapshot import Snapshot, needed_bytes

if TYPE_CHECKING:
    from shardwright.train.config.averages import AverageFields

logger = logging.getLogger(__name__)

Part = tuple[str, int, torch.Tensor]
"""A parameter's name, the first element's place in it, and consecutive elements."""


class Learned:
    """The average that an optimizer keeps itself: made of its weights and one of its moments."""

    replaces_weights = True

    def __init__(
        self,
        kind: str,
        own: Callable[[], Iterable[Part]],
        moments: Callable[[], Iterable[Part]],
        made_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """``own`` and ``moments`` give this rank's parts, as `Engine.own_weights` does."""
        self.kind = kind
        self._own, self._moments, self._made_of = own, moments, made_of
        self.taken = 0
        self._memory = HostMemory()

    def step_ends(self, step: int) -> None:
        self.taken += 1

    @torch.no_grad()
    def own_weights(self) -> Iterator[Part]:
        """Yield this rank's part; a weight that the optimizer does not step is as it is."""
        moments = {(name, start): values for name, start, values in self._moments()}
        for name, start, values in self._own():
            moment = moments.get((name, start))
            made = values.detach() if moment is None else self._made_of(values.detach(), moment)
            yield name, start, made.float()

    def state(self, *, copied: bool) -> dict[str, torch.Tensor]:
        found = {files.key_of(name, start): values for name, start, values in self.own_weights()}
        return _copied(found, self._memory) if copied else found

    def restore(self, state: PortableState, own_file: Path, kind: str, taken: int) -> None:
        """Only count on: weights and moments are those of the checkpoint already."""
        self.taken = taken


class Average:
    """Follows the master weights where they lie; the host waits for nothing."""

    replaces_weights = False
    """Whether it, and not the weights, is what is evaluated and exported."""

    def __init__(self, settings: AverageFields, own: Callable[[], Iterable[Part]]) -> None:
        """``own`` gives this rank's part of the live weights, as `Engine.own_weights` does."""
        self._settings, self._own = settings, own
        self.kind: str = settings.average_weights or ""
        self.taken = 0
        """How often weights were taken so far."""
        self._parts: list[Part] = []
        self._memory = HostMemory()

    @torch.no_grad()
    def step_ends(self, step: int) -> None:
        """Take the weights that a step has made, where they count."""
        settings = self._settings
        if step < settings.average_start_step or step % settings.average_every_steps:
            return
        live = list(self._own())
        if not self.taken:
            self._parts = [
                (name, start, values.detach().to(torch.float32, copy=True))
                for name, start, values in live
            ]
        else:
            self._move_towards([values.detach() for *_, values in live])
        self.taken += 1

    def _move_towards(self, live: list[torch.Tensor]) -> None:
        settings = self._settings
        of_ema = 1 - settings.average_decay
        weight = of_ema if settings.average_weights == "ema" else 1 / (self.taken + 1)
        alike: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for (_, _, average), values in zip(self._parts, live, strict=True):
            if values.dtype == average.dtype:
                of_device = alike.setdefault(values.device, ([], []))
                of_device[0].append(average)
                of_device[1].append(values)
            else:  # one at a time, as each is a copy in fp32
                average.lerp_(values.to(average.dtype), weight)
        for averages, others in alike.values():
            torch._foreach_lerp_(averages, others, weight)

    def own_weights(self) -> Iterator[Part]:
        """Yield this rank's part, to be read only."""
        yield from self._parts

    def state(self, *, copied: bool) -> dict[str, torch.Tensor]:
        """Return what this rank's file holds; copied to host memory where later steps follow."""
        found = {files.key_of(name, start): values for name, start, values in self._parts}
        return _copied(found, self._memory) if copied else found

    def restore(self, state: PortableState, own_file: Path, kind: str, taken: int) -> None:
        """Continue with the average of a checkpoint, of which this rank reads its part.

        ``own_file`` is that of the rank with this number there; where it holds just this part, no
        other is opened. One of another ``kind`` is left alone, and begins anew. Raises Unreadable.
        """
        if kind != self._settings.average_weights:
            logger.warning(
                "the checkpoint's average of the weights is %s, and trainer.average_weights=%s: "
                "it begins anew",
                kind,
                self._settings.average_weights,
            )
            return
        live = list(self._own())
        there = files.parts_in(own_file) if own_file.is_file() else {}
        wanted = {files.key_of(name, start): values.numel() for name, start, values in live}
        is_same = {key: part.numel for key, part in there.items()} == wanted
        missing = [] if is_same else [name for name, *_ in live if name not in state.ema]
        if missing:
            raise Unreadable(f"it holds no average of {missing[0]}")
        for name, start, values in live:
            part = torch.empty(values.shape, dtype=torch.float32)
            if is_same:
                read = there[files.key_of(name, start)].read()
            else:
                read = state.ema[name].read(start, start + values.numel())
            part.view(-1).copy_(read)
            self._parts.append((name, start, part.to(values.device)))
        self.taken = taken


def _copied(found: dict[str, torch.Tensor], memory: HostMemory) -> dict[str, torch.Tensor]:
    snapshot = Snapshot(memory, needed_bytes(found))
    copies = {key: snapshot.of(values) for key, values in found.items()}
    snapshot.wait()
    return copies
