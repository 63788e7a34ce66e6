"""What a rank holds: bytes of parameters, gradients and optimizer state on the live engine."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.plan.live import LiveBytes
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join

Storages = dict[int, int]
"""Bytes of each storage by its address: tensors that share one are counted once."""


def bytes_held(run_dir: Path) -> dict[str, int]:
    """Train with accumulation; return the bytes of each kind between two micro-batches of a step.

    They are weighed from the second step on, when the optimizer has its state. What is held is held
    in every one: a thread of gloo's may keep the tensor of a finished collective for a while longer
    (torch 2.13, ProcessGroupGloo::runLoop sets its work free after it has woken who waits).
    """
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_weigh(run_dir, rank)


def _train_and_weigh(run_dir: Path, rank: Rank) -> dict[str, int]:
    gc.collect()
    before = _live()
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
    held: list[dict[str, int]] = []
    step = trainer.training_step

    def weighed(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = step(*args, **kwargs)
        if trainer.state.global_step == len(held) + 1:
            held.append(_weigh(trainer, before))
        return loss

    trainer.training_step = weighed  # type: ignore[method-assign]
    trainer.train()
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    assert len(held) == trainer.state.max_steps - 1
    return {kind: min(h[kind] for h in held) for kind in held[0]} | {"whole_model": whole}


def held_and_peak(run_dir: Path) -> dict[str, int]:
    """Train; return what `bytes_held` does, of steps 2, 4 and 6, and what is alive at the most.

    The latter is of steps 3 and 5: "passes" in forward and backward passes, "update" in the
    optimizer's step, of all tensors but those that were there before the run; the smaller of the
    two for the reason that `bytes_held` gives. The run has six steps of two micro-batches at least.
    """
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        gc.collect()
        before = _tensors()
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
            self._held.append(_weigh(self._trainer, _storages(self._before)))
        if self._live is not None:
            self._peaks[-1]["passes"] = max(self._peaks[-1]["passes"], self._live.peak)
            self._live.begin()
        return loss

    def _watch(self) -> LiveBytes:
        gc.collect()
        live = LiveBytes()
        live.leave_out(self._before)
        live.take_in(part for tensor in _tensors() for part in _parts(tensor))
        live.__enter__()
        return live


def _is_tensor(found: object) -> bool:
    return issubclass(type(found), torch.Tensor) and type(found).__name__ != "FakeTensor"


def _tensors() -> list[torch.Tensor]:
    return [t for t in gc.get_objects() if _is_tensor(t) and t.device.type != "meta"]


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return what an object holds besides itself: a shard, a gradient, which gc does not see."""
    found = [tensor]
    if hasattr(tensor, "ds_tensor"):
        found.append(tensor.ds_tensor)
    if tensor.is_leaf and tensor.grad is not None:
        found.append(tensor.grad)
    return found


def _weigh(trainer: Trainer, before: Storages) -> dict[str, int]:
    """Gradients are whatever floats are alive and are neither parameters nor optimizer state."""
    gc.collect()
    parameters = _storages(_local(p) for p in trainer.model.parameters())
    optimizer = _storages(_optimizer_tensors(trainer))
    # In fp32 the optimizer updates the parameters themselves.
    optimizer = {k: v for k, v in optimizer.items() if k not in parameters}
    buffers = _storages(trainer.model.buffers())
    known = {**before, **parameters, **optimizer, **buffers}
    gradients = {k: v for k, v in _live().items() if k not in known}
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(optimizer.values()),
    }


def _local(parameter: torch.Tensor) -> torch.Tensor:
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3: this rank's part
        return parameter.ds_tensor
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _optimizer_tensors(trainer: Trainer) -> Iterable[torch.Tensor]:
    optimizer = trainer.innermost_optimizer()
    for group in optimizer.param_groups:
        yield from (_local(p) for p in group["params"])
    for state in optimizer.state.values():
        yield from (_local(v) for v in state.values() if isinstance(v, torch.Tensor))
    for name in ("fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        yield from (p for p in getattr(trainer.torch_optimizer(), name, []))


def _storages(tensors: Iterable[torch.Tensor]) -> Storages:
    storages = (t.untyped_storage() for t in tensors)
    return {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}


def _live() -> Storages:
    """Return what is alive in Python; a tensor that only C++ holds does not show."""
    tensors = [
        o
        for o in gc.get_objects()
        if issubclass(type(o), torch.Tensor) and type(o).__name__ != "FakeTensor"
    ]
    plain = [_local(t) for t in tensors if t.device.type != "meta" and t.is_floating_point()]
    # An attribute of a tensor is not an object that gc tracks.
    plain += [t.grad for t in plain if t.is_leaf and t.grad is not None]
    return _storages(plain)
