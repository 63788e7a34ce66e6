"""What all ranks tell each other: values, and that they stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from shardwright.train.process.meeting import Meeting
from shardwright.train.process.signals import CTRL_C, Stop, asked, at_once, hear


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
def patiently() -> Iterator[Meeting]:
    """Wait at the end of the block, without a limit, until all ranks have come there. Collective.

    Nothing inside may be: it is for work whose time depends on a disk. An error in one rank is
    raised in all of them, at the end or where they `look`.
    """
    with _meeting() as met:
        yield met
        met.wait_for_all()
    if dist.is_initialized():
        # The store may be one rank's, which is not to leave before all have heard.
        dist.all_reduce(torch.zeros(1))


@contextmanager
def together() -> Iterator[Meeting]:
    """As `patiently`, where a signal to any rank ends the block on all at once; raises Stop."""
    main = threading.get_ident()
    with _meeting(on_stop=lambda: hear(main)) as met:
        try:
            with at_once():
                yield met
                met.wait_for_all()
        except Stop:
            met.stop()
    check()


def from_all_patiently(value: Any) -> list[Any]:
    """As `from_all`, where ranks may come far apart from each other."""
    with patiently():
        pass
    return from_all(value)


@contextmanager
def _meeting(on_stop: Callable[[], object] | None = None) -> Iterator[Meeting]:
    if dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.distributed_c10d import _get_default_store

        met = Meeting(_get_default_store(), dist.get_rank(), dist.get_world_size())
    else:
        met = Meeting(None, 0, 1)
    with met.listening(on_stop):
        try:
            yield met
        except BaseException as error:
            met.fail(error)
            raise


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
