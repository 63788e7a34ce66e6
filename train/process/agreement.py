"""What all ranks tell each other: values, and that they stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from shardwright.train.process.signals import (
    CTRL_C,
    SECONDS_BETWEEN_LOOKS,
    Stop,
    asked,
    at_once,
    hear,
)

_KEY = "shardwright/stop"


def from_all(value: Any) -> list[Any]:
    """Return what each rank gives, in their order. Collective; alone it is a list of one."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check() -> None:
    """Raise Stop on all ranks where one of them was asked to stop. Collective."""
    is_asked = asked() is not None
    if dist.is_initialized():
        flag = torch.tensor(int(is_asked))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        is_asked = bool(flag)
    if is_asked:
        raise Stop


@contextmanager
def together() -> Iterator[None]:
    """Let a signal to any rank end the block on all at once, and raise Stop. Collective.

    Nothing inside may be: a rank that waits for another's work waits in no collective.
    """
    with _hearing_others() as tell_others:
        try:
            with at_once():
                yield
        except Stop:
            tell_others()
    check()


@contextmanager
def _hearing_others() -> Iterator[Callable[[], object]]:
    """Have a thread interrupt this process once another rank calls what the block is given."""
    from torch.distributed.distributed_c10d import _get_default_store

    if not dist.is_initialized():
        yield lambda: None
        return
    store, over = _get_default_store(), threading.Event()

    def listen() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            if store.check([_KEY]):
                hear(main)
                return

    main = threading.get_ident()
    listener = threading.Thread(target=listen, name="stop", daemon=True)
    listener.start()
    try:
        yield lambda: store.set(_KEY, "")
    finally:
        over.set()
        listener.join()


def reason(requesters: Sequence[str | None]) -> str:
    """Return in words who has asked which ranks, from what `asked` returns on each. Pure."""
    parts = []
    for by in dict.fromkeys(requesters):
        ranks = [str(rank) for rank, found in enumerate(requesters) if found == by]
        if by == CTRL_C or by in signal.Signals.__members__:
            parts.append(f"{by} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}")
        elif by is not None:
            parts.append(by)
    return "; ".join(parts)
