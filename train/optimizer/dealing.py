"""Work that needs a whole matrix, dealt out among the ranks that hold its rows or copies of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

Shape = tuple[int, int]


def dealt(costs: Sequence[float], workers: int) -> list[list[int]]:
    """Return which pieces of work each of some workers gets, the costliest first. Pure.

    The costliest that is left goes to whoever has least to do, which makes the busiest at most a
    third busier than it has to be (Graham 1969).
    """
    hands: list[list[int]] = [[] for _ in range(workers)]
    loads = [(0.0, worker) for worker in range(workers)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        load, worker = loads[0]
        hands[worker].append(number)
        heapq.heapreplace(loads, (load + costs[number], worker))
    return hands


def rows_of(rows: int, part: int, parts: int) -> int:
    """Return how many rows of a matrix one of its shards has: equal ones, the last smaller. Pure.

    As FSDP2 and DTensor divide them, which is by `torch.chunk`.
    """
    each = -(-rows // parts)
    return max(0, min(each, rows - part * each))


@dataclass(frozen=True)
class Holders:
    """The ranks that share some matrices: groups with this rank in them, None for it alone."""

    shards: dist.ProcessGroup | None
    """Each holds rows, and together they hold all."""
    replicas: dist.ProcessGroup | None
    """Each holds the same."""

    @classmethod
    def of(cls, matrix: Tensor) -> Holders:
        """Return those of a sharded matrix; all ranks hold one that is not a DTensor alike."""
        if not isinstance(matrix, DTensor):
            alone = not dist.is_initialized() or dist.get_world_size() == 1
            return cls(None, None if alone else dist.group.WORLD)
        groups: dict[bool, dist.ProcessGroup] = {}
        mesh = matrix.device_mesh
        for dimension, placement in enumerate(matrix.placements):
            if mesh.size(dimension) > 1:
                is_shard = isinstance(placement, Shard)
                assert not isinstance(placement, Shard) or placement.dim == 0, "rows are divided"
                assert is_shard not in groups, "one dimension of a mesh for each"
                groups[is_shard] = mesh.get_group(dimension)
        return cls(groups.get(True), groups.get(False))


def worked_on(
    shapes: Sequence[Shape],
    rows: Callable[[int], Tensor],
    work: Callable[[int, Tensor], Tensor],
    holders: Holders,
    like: Tensor,
) -> Iterator[tuple[int, Tensor]]:
    """Yield, for each matrix by its number, this rank's rows of what ``work`` makes of the whole.

    ``rows`` gives this rank's rows of a matrix, in dtype and on device of ``like``; ``work`` keeps
    shape, dtype and device, and may overwrite what it is given. It is done once for each matrix, by
    one rank. Collective: all ranks have the same matrices, and get them in one order.

    In rounds of one matrix a rank, so that all work at once. In each a rank holds, besides its own
    parts, one whole matrix and what came of it, and its rows of one for each of its peers.
    """
    shards, replicas = _Place.of(holders.shards), _Place.of(holders.replicas)
    hands = dealt([_cost(*shape) for shape in shapes], replicas.count * shards.count)
    exchange = _Exchange(shapes, shards, like)
    for turn in range(max(map(len, hands), default=0)):
        at_work = [hand[turn] if turn < len(hand) else None for hand in hands]
        of_replicas = [
            at_work[first : first + shards.count] for first in range(0, len(hands), shards.count)
        ]
        found = exchange.through_owners(of_replicas[replicas.index], rows, work)
        for replica, numbers in enumerate(of_replicas):
            held = exchange.held(numbers)
            taken = found if replica == replicas.index else like.new_empty(sum(held))
            if replicas.group is not None and taken.numel():
                dist.broadcast(_bytes(taken), group=replicas.group, group_src=replica)
            for number, part in zip(numbers, taken.split(held), strict=True):
                if number is not None:
                    yield number, part.view(-1, shapes[number][1])


def _cost(rows: int, columns: int) -> float:
    """Return what an iteration of Newton and Schulz multiplies: two products along, one across."""
    short, long = sorted((rows, columns))
    return short * short * (2 * long + short)


@dataclass(frozen=True)
class _Place:
    """This rank's place in a group."""

    group: dist.ProcessGroup | None
    index: int
    count: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Place:
        if group is None:
            return cls(None, 0, 1)
        return cls(group, dist.get_rank(group), dist.get_world_size(group))


@dataclass(frozen=True)
class _Exchange:
    """Matrices of one replica, between its ranks' rows and the rank that has the whole."""

    shapes: Sequence[Shape]
    shards: _Place
    like: Tensor

    def held(self, numbers: Sequence[int | None]) -> list[int]:
        """Return how many elements of each matrix this rank holds."""
        return [self._elements(number, self.shards.index) for number in numbers]

    def _elements(self, number: int | None, part: int) -> int:
        if number is None:
            return 0
        rows, columns = self.shapes[number]
        return rows_of(rows, part, self.shards.count) * columns

    def through_owners(
        self,
        numbers: Sequence[int | None],
        rows: Callable[[int], Tensor],
        work: Callable[[int, Tensor], Tensor],
    ) -> Tensor:
        """Send rows to whoever works on the whole; return what comes back, end to end.

        ``numbers`` says what each rank of the replica works on.
        """
        given = torch.cat(
            [self.like.new_empty(0), *(rows(n).flatten() for n in numbers if n is not None)]
        )
        own = numbers[self.shards.index]
        here = [self._elements(own, part) for part in range(self.shards.count)]
        whole = self._exchanged(given, self.held(numbers), here)
        if own is not None:
            whole = work(own, whole.view(self.shapes[own])).flatten()
        return self._exchanged(whole, here, self.held(numbers))

    def _exchanged(self, given: Tensor, sent: list[int], received: list[int]) -> Tensor:
        if self.shards.group is None:
            return given
        taken = given.new_empty(sum(received))
        size = given.itemsize
        dist.all_to_all_single(
            _bytes(taken),
            _bytes(given),
            [count * size for count in received],
            [count * size for count in sent],
            group=self.shards.group,
        )
        return taken


def _bytes(tensor: Tensor) -> Tensor:
    """Return the same memory as bytes, which every backend can send."""
    return tensor.view(torch.uint8)
