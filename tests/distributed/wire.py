"""What a rank sends to others and gets from them as pickled objects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from torch.distributed import distributed_c10d


@dataclass
class Wire:
    """Objects, and their bytes."""

    sent: int = 0
    received: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0


@contextmanager
def counted() -> Iterator[Wire]:
    """Count what this rank pickles for others and unpickles of theirs, by whatever collective."""
    wire = Wire()
    pickled, unpickled = distributed_c10d._object_to_tensor, distributed_c10d._tensor_to_object

    def send(*arguments: Any) -> Any:
        tensor, size = pickled(*arguments)
        wire.sent += 1
        wire.sent_bytes += int(size)
        return tensor, size

    def receive(tensor: Any, size: Any, *rest: Any) -> Any:
        wire.received += 1
        wire.received_bytes += int(size)
        return unpickled(tensor, size, *rest)

    with (
        mock.patch.object(distributed_c10d, "_object_to_tensor", send),
        mock.patch.object(distributed_c10d, "_tensor_to_object", receive),
    ):
        yield wire
