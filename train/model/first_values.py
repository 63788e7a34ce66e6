"""First values that come whole: each is made by one rank, which hands the others what they want.

A model's ranks would else all draw all of it, which takes minutes where it has 70 billion
parameters. What each value is does not depend on who makes it, nor on how many ranks there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import nn

from shardwright.train.model.weights import InitialValues, Owners, Wanted, in_turn

DEALT_FROM_ELEMENTS = 65_536
"""What is smaller is made by everyone: in less time than it takes to be sent."""


def dealt_in_turn(
    wanted: Sequence[Wanted], values: InitialValues, shards: int
) -> Iterator[torch.Tensor]:
    """Yield each part as `in_turn` does. Collective, in the order of ``wanted``.

    All ranks want parts of the same parameters, each its own: one in ``shards`` of each value. In
    memory are the parts of so many values, which is about a whole one, and one that is made here.
    """
    is_dealt = _dealt(wanted, values)
    dealt = _handed_out([p for p, yes in zip(wanted, is_dealt, strict=True) if yes], values, shards)
    own = in_turn([p for p, yes in zip(wanted, is_dealt, strict=True) if not yes], values)
    for yes in is_dealt:
        yield next(dealt if yes else own)


def whole_in_turn(
    names: dict[str, int], values: InitialValues, device: torch.device | str
) -> Iterator[torch.Tensor]:
    """Yield all of each parameter, flat and in fp32; the next one overwrites it.

    ``names`` has the elements of each. Collective: everyone wants them all. What is handed on lies
    on ``device``, from which it travels, and the rest on the CPU.
    """
    wanted = [Wanted(name, elements, 0, elements) for name, elements in names.items()]
    is_dealt = _dealt(wanted, values)
    dealt = _broadcast([p for p, yes in zip(wanted, is_dealt, strict=True) if yes], values, device)
    own = in_turn([p for p, yes in zip(wanted, is_dealt, strict=True) if not yes], values)
    for yes in is_dealt:
        yield next(dealt if yes else own)


def materialize(
    model: nn.Module,
    values: InitialValues,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    take: Callable[[str, torch.Tensor], bool] | None = None,
) -> None:
    """Replace the meta parameters by real ones on ``device``, one after the other.

    Collective. The host holds no more than two whole parameters at a time, beside
    what stays there. ``take`` is given each by its name, flat and in fp32, and returns whether it
    has put it in place itself.
    """
    owners = Owners(model)
    parameters = dict(model.named_parameters())
    elements = {name: parameter.numel() for name, parameter in parameters.items()}
    wholes = whole_in_turn(elements, values, device)
    for (name, parameter), whole in zip(parameters.items(), wholes, strict=True):
        if take is not None and take(name, whole):
            continue
        real = torch.empty(parameter.shape, dtype=dtype, device=device)
        owners.replace(parameter, real.copy_(whole.view(real.shape)))


def _dealt(wanted: Sequence[Wanted], values: InitialValues) -> list[bool]:
    """Say of each part whether one rank makes the value for all; alike on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [False] * len(wanted)
    return [
        values[part.name].comes_whole and part.elements >= DEALT_FROM_ELEMENTS for part in wanted
    ]


def _handed_out(
    wanted: Sequence[Wanted], values: InitialValues, shards: int
) -> Iterator[torch.Tensor]:
    if not wanted:
        return
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made = torch.empty(max((p.elements for p in wanted[rank::ranks]), default=0))
    turns = [range(i, min(i + shards, len(wanted))) for i in range(0, len(wanted), shards)]
    received = torch.empty(max(sum(wanted[i].length for i in turn) for turn in turns))
    for turn in turns:
        # What is made here, there is one of at most: as many as there are ranks come between.
        mine = next((wanted[i] for i in turn if i % ranks == rank), None)
        asked = torch.zeros(ranks, 2, dtype=torch.int64)
        for i in turn:
            asked[i % ranks] = torch.tensor([wanted[i].start, wanted[i].length])
        asked_of_me = torch.empty_like(asked)
        dist.all_to_all_single(asked_of_me, asked)
        sent = made[:0]
        if mine is not None:
            whole = made[: mine.elements]
            values[mine.name].write(whole)
            sent = _parts(whole, asked_of_me.tolist())
        lengths = asked[:, 1].tolist()
        got = received[: sum(lengths)]
        dist.all_to_all_single(got, sent, lengths, asked_of_me[:, 1].tolist())
        parts = got.split(lengths)
        yield from (parts[i % ranks] for i in turn)


def _parts(whole: torch.Tensor, places: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return parts of a value, one after the other: itself where they follow on one another. Pure.

    ``places`` are their starts and lengths.
    """
    end = 0
    for start, length in places:
        if length and start != end:
            return torch.cat([whole[start : start + length] for start, length in places])
        end += length
    return whole[:end]


def _broadcast(
    wanted: Sequence[Wanted], values: InitialValues, device: torch.device | str
) -> Iterator[torch.Tensor]:
    if not wanted:
        return
    rank, ranks = dist.get_rank(), dist.get_world_size()
    made = torch.empty(max((p.elements for p in wanted[rank::ranks]), default=0))
    travels = torch.empty(max(part.elements for part in wanted), device=device)
    for first in range(0, len(wanted), ranks):
        turn = wanted[first : first + ranks]
        if rank < len(turn):
            values[turn[rank].name].write(made[: turn[rank].elements])
        for maker, part in enumerate(turn):
            whole = travels[: part.elements]
            if maker == rank:
                whole.copy_(made[: part.elements])
            dist.broadcast(whole, maker)
            yield whole
