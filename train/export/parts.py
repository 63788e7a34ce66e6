"""Each rank's own part of the live weights into the files of a model, and nobody else's."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from shardwright.train.export.safetensors import Writer

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer
    from shardwright.train.process.meeting import Meeting

SLICE_ELEMENTS = 2**22
"""What is in host memory at once of weights that lie elsewhere, or in another dtype."""


Parts = Iterator[tuple[str, int, torch.Tensor]]
"""A parameter's name, the first element's place in it, and consecutive elements."""


def write(
    trainer: Trainer,
    own: Parts,
    writer: Writer,
    others: Meeting,
    advance: Callable[[int], object],
) -> None:
    """Write this rank's ``own`` part of the weights; ``advance`` hears of each slice's bytes.

    Where each node has a disk of its own, ranks of the other nodes send theirs to one on the first,
    as that is where the model is to be. Raises what `Writer.write` does, and what other ranks have
    raised.
    """

    def write_one(name: str, start: int, values: torch.Tensor) -> None:
        writer.write(name, values, start)
        advance(values.nbytes)

    node_size = _ranks_at_the_disk(trainer)
    rank, count = trainer.args.process_index, trainer.args.world_size
    if rank >= node_size:
        others.wait_for(f"send/{rank}")
        _send(_slices(own), rank % node_size)
        return
    for part in _slices(own):
        write_one(*part)
    for sender in range(rank + node_size, count, node_size):
        # Until then it waits where no limit is set: each before it has its own part to write.
        others.set(f"send/{sender}")
        for part in _received(sender):
            write_one(*part)


def travel(trainer: Trainer) -> bool:
    """Whether some ranks send their part to others, in which they cannot be interrupted."""
    return _ranks_at_the_disk(trainer) < trainer.args.world_size


def _ranks_at_the_disk(trainer: Trainer) -> int:
    """Return how many ranks, from the first on, reach the disk that the model is written to."""
    if getattr(trainer.config.strategy, "node_local_checkpoints", False):
        return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return trainer.args.world_size


def _slices(own: Parts) -> Parts:
    """Yield this rank's part on the CPU in fp32."""
    for name, start, values in own:
        for begin in range(0, values.numel(), SLICE_ELEMENTS):
            part = values.detach()[begin : begin + SLICE_ELEMENTS]
            yield name, start + begin, part.to("cpu", torch.float32)


def _send(slices: Parts, to: int) -> None:
    for name, start, values in slices:
        dist.send_object_list([(name, start, values.numel())], to)
        dist.send(values.contiguous(), to)
    dist.send_object_list([None], to)


def _received(sender: int) -> Parts:
    while True:
        found: list[Any] = [None]
        dist.recv_object_list(found, sender)
        if found[0] is None:
            return
        name, start, length = found[0]
        values = torch.empty(length)
        dist.recv(values, sender)
        yield name, start, values
