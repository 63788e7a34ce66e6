"""One of the ranks that `shardwright doctor` starts, with the arguments DIRECTORY REPORT [speeds].

DIRECTORY holds the config.yaml that says how many ranks there are and on what they run; the first
rank writes what all of them measured to the file REPORT.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from shardwright.train.config import RunConfig, load
from shardwright.train.diagnosis import pairs
from shardwright.train.diagnosis.pairs import Pair
from shardwright.train.diagnosis.speeds import Speeds, seconds, speeds
from shardwright.train.durable import write_text
from shardwright.train.errors import BAD_INPUT, FAILED, UserError
from shardwright.train.process import inherited, nccl_log
from shardwright.train.process.arguments import decoded

logger = logging.getLogger(__name__)

WITH_SPEEDS = "speeds"
"""A third argument, of ranks that are to measure them."""


@dataclass(frozen=True)
class Measured:
    """What one rank measured; rates are None where there is one rank only."""

    rank: int
    host: str
    device: str
    local_rank: int
    """Which of its node's ranks it is, and so which device it has."""
    clock: float
    """Seconds since 1970, read right after a barrier."""
    matmul_flops: float
    """Floating-point operations per second of a square matrix product."""
    all_reduce_bytes_per_second: float | None = None
    all_gather_bytes_per_second: float | None = None
    """Bus bandwidth: what went through each rank's link, whatever the number of ranks."""
    small_all_reduce_seconds: float | None = None
    """Latency: that of four bytes."""
    pairs: tuple[Pair, ...] = ()
    """On the first rank of a node: with each node whose first rank has a higher number."""
    speeds: Speeds | None = None
    """What a plan wants to know besides; None where nobody asks."""


def main(argv: list[str]) -> int:
    """Run one rank; return 0, 1 where it failed, or 2 on bad input."""
    from shardwright.train.process import logs
    from shardwright.train.process.rank import rank_from_environment
    from shardwright.train.run_directory.failures import note_failure
    from shardwright.train.strategy.group import join

    directory, report = (Path(decoded(argument)) for argument in argv[:2])
    wanted = [decoded(argument) for argument in argv[2:]]
    rank = rank_from_environment()
    inherited.forget_engine(os.environ)
    config = load(directory)
    if config.launcher.device == "cuda":
        for name, value in nccl_log.variables(directory, os.environ).items():
            os.environ[name] = value  # before NCCL's first call, which reads them
    logs.open_rank_log(directory, rank, nodes=config.launcher.nodes)
    try:
        with join(config, rank):
            found = measure(config, with_speeds=WITH_SPEEDS in wanted)
            if rank.index == 0:
                ranks = [dataclasses.asdict(measured) for measured in found]
                write_text(report, json.dumps(ranks, indent=1))
    except Exception as error:
        logger.exception("rank %d failed", rank.index)
        note_failure(directory, rank.index, error)
        return BAD_INPUT if isinstance(error, UserError) else FAILED
    return 0


def measure(config: RunConfig, *, with_speeds: bool = False) -> list[Measured]:
    """Return what each rank measured, in their order. Collective.

    Raises RuntimeError where a collective gives a wrong result.
    """
    from shardwright.train.process.agreement import from_all

    on_gpu = config.launcher.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    if dist.is_initialized():
        dist.barrier()
    mine = Measured(
        rank=dist.get_rank() if dist.is_initialized() else 0,
        host=socket.gethostname(),
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        clock=0.0,
        # All at once: what a training does, and what shows a node whose cores are taken.
        matmul_flops=_matmul_flops(device),
        speeds=speeds(device) if with_speeds else None,
    )
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [dataclasses.replace(mine, clock=time.time())]
    elements = (256 if on_gpu else 16) * 2**20 // 4
    mine = dataclasses.replace(
        mine,
        all_reduce_bytes_per_second=_all_reduce(elements, device),
        all_gather_bytes_per_second=_all_gather(elements, device),
        small_all_reduce_seconds=_small_all_reduce(device),
    )
    found = pairs.measure(from_all(mine.host), elements, device)
    dist.barrier()
    return from_all(dataclasses.replace(mine, clock=time.time(), pairs=tuple(found)))


def _matmul_flops(device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (768, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / seconds(lambda: a @ a, device)


def _all_reduce(elements: int, device: torch.device) -> float:
    """Bus bandwidth, 2 (n - 1) / n of the bytes a second, as nccl-tests defines it."""
    ranks = dist.get_world_size()
    tensor = torch.zeros(elements, device=device)

    def once() -> None:
        tensor.fill_(dist.get_rank() + 1)
        dist.all_reduce(tensor)

    spent = seconds(once, device)
    _expect(tensor, ranks * (ranks + 1) / 2, "all-reduce")
    return 2 * (ranks - 1) / ranks * tensor.nbytes / spent


def _all_gather(elements: int, device: torch.device) -> float:
    """Bus bandwidth, (n - 1) / n of the bytes gathered a second, as nccl-tests defines it."""
    ranks = dist.get_world_size()
    mine = torch.full((elements // ranks,), float(dist.get_rank()), device=device)
    whole = [torch.empty_like(mine) for _ in range(ranks)]
    spent = seconds(lambda: dist.all_gather(whole, mine), device)
    for rank, part in enumerate(whole):
        _expect(part, rank, "all-gather")
    return (ranks - 1) / ranks * sum(part.nbytes for part in whole) / spent


def _small_all_reduce(device: torch.device) -> float:
    tensor = torch.zeros(1, device=device)
    return seconds(lambda: dist.all_reduce(tensor), device, repeats=50)


def _expect(tensor: torch.Tensor, value: float, what: str) -> None:
    if not bool((tensor == value).all()):
        wrong = int((tensor != value).sum())
        raise RuntimeError(
            f"the {what} among all ranks gave {wrong:,} wrong values on {socket.gethostname()}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
