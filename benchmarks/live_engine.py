"""What the ranks of a run hold and have alive at the most, while they train: for `benchmarks.plan`.

As a rank's module it trains several runs, one after the other: python -m benchmarks.live_engine
RUN_DIR..., and leaves in each what it has found.
"""

from __future__ import annotations

import gc
import io
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwright.train.config import load

if TYPE_CHECKING:
    import torch

    from shardwright.train.loop.trainer import Trainer
    from shardwright.train.plan.live import LiveBytes

PORTS = "BENCHMARK_PORTS"
"""In the environment of ranks: a port for each run, as many groups follow each other."""


def held_and_peak(run_dir: Path) -> dict[str, int]:
    """Train; return the bytes of each category, of steps 2, 4 and 6, and what is alive at the most.

    The latter is of steps 3 and 5: "passes" in forward and backward passes, "update" in the
    optimizer's step, of all tensors but those that were there before the run. Of each it is the
    least: a thread of gloo's may keep the tensor of a finished collective for a while longer (torch
    2.13, ProcessGroupGloo::runLoop sets its work free after it has woken who waits). The run has
    six steps of two micro-batches at least.
    """
    from shardwright.train.plan.held import tensors
    from shardwright.train.process.rank import rank_from_environment
    from shardwright.train.run import assemble
    from shardwright.train.strategy.group import join

    rank = rank_from_environment()
    with join(load(run_dir), rank):
        gc.collect()
        before = list(tensors())
        trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        watched = _Watched(trainer, before)
        trainer.training_step = watched  # type: ignore[method-assign]
        trainer.train()
        assert trainer.state.max_steps == 6
        return watched.found()


class _Watched:
    """A training step that is weighed in steps 2, 4 and 6, and watched in 3 and 5."""

    def __init__(self, trainer: Trainer, before: list[torch.Tensor]) -> None:
        self._trainer, self._step, self._before = trainer, trainer.training_step, before
        self._live: LiveBytes | None = None
        self._seen = 0
        """Steps that were done at the last micro-batch."""
        self._held: list[dict[str, int]] = []
        self._peaks: list[dict[str, int]] = []

    def found(self) -> dict[str, int]:
        """Return the bytes of each kind: the least of what was found in each step."""
        both = (self._held, self._peaks)
        return {kind: min(each[kind] for each in kinds) for kinds in both for kind in kinds[0]}

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        done = self._trainer.state.global_step
        begins, self._seen = done != self._seen, done
        if begins and self._live is not None:
            self._live.__exit__(None, None, None)
            self._peaks[-1]["update"] = self._live.peak
            self._live = None
        if begins and done in (2, 4):
            self._live = self._watch()
            self._peaks.append({"passes": 0})
        if self._live is not None:
            self._live.begin()
        loss = self._step(*args, **kwargs)
        if begins and done in (1, 3, 5):
            self._held.append(together(self._trainer, self._before))
        if self._live is not None:
            self._peaks[-1]["passes"] = max(self._peaks[-1]["passes"], self._live.peak)
            self._live.begin()
        return loss

    def _watch(self) -> LiveBytes:
        from shardwright.train.plan.held import tensors
        from shardwright.train.plan.live import LiveBytes

        gc.collect()
        live = LiveBytes()
        live.leave_out(self._before)
        live.take_in(part for tensor in tensors() for part in _parts(tensor))
        live.__enter__()
        return live


def together(trainer: Trainer, before: Sequence[torch.Tensor]) -> dict[str, int]:
    """Return what a rank holds of each category, on whatever device."""
    from shardwright.train.plan.held import CATEGORIES, held, storages

    found = held(trainer, storages(before)).values()
    return {category: sum(each[category] for each in found) for category in CATEGORIES}


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what an object holds besides itself: a shard, a gradient, which gc does not see."""
    found = [tensor]
    if hasattr(tensor, "ds_tensor"):
        found.append(tensor.ds_tensor)
    if tensor.is_leaf and tensor.grad is not None:
        found.append(tensor.grad)
    return found


# --- ranks ----------------------------------------------------------------------------------------


def answer(run_dir: Path, rank: int) -> Path:
    """Return where a rank leaves what it has found."""
    return run_dir / f"held-{rank}.json"


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on now."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports: list[int] = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def environment_of(rank: int, ranks: int, ports: Sequence[int]) -> Mapping[str, str]:
    """Return the variables of a rank, as torchrun sets them, and the ports of its runs. Pure."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        PORTS: " ".join(map(str, ports)),
    }


def main(arguments: Sequence[str]) -> int:
    """Train the runs as one of their ranks; what fails in one is its answer."""
    from shardwright.train.model import first_values

    first_values.DEALT_FROM_ELEMENTS = 1  # small models start as large ones do
    rank = int(os.environ["RANK"])
    for port, run_dir in zip(os.environ[PORTS].split(), map(Path, arguments), strict=True):
        os.environ["MASTER_PORT"] = port
        try:
            found: dict[str, Any] = held_and_peak(run_dir)
        except Exception:
            found = {"error": traceback.format_exc()}
        answer(run_dir, rank).write_text(json.dumps(found))
        if "error" in found:
            return 1  # the others wait for it in a collective, and end with the group
        gc.collect()
        gc.freeze()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
