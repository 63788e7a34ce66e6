"""What a rank does in a test: whole runs of the real thing, seen from inside where needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.config import load
from train.rank import Rank, join, rank_from_environment
from train.run import assemble, run
from train.trainer import Trainer


def whole_run(run_dir: Path) -> None:
    """Do what `python -m train RUN_DIR` does, without its redirection of the terminal."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        run(run_dir, rank, io.StringIO())


def trained(run_dir: Path, look: Callable[[Trainer], Any]) -> Any:
    """Train, then return what ``look`` finds on the live engine of this rank."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_look(run_dir, rank, look)


def _train_and_look(run_dir: Path, rank: Rank, look: Callable[[Trainer], Any]) -> Any:
    # Its own frame, so that nothing holds the trainer when the group is left.
    trainer = assemble(run_dir, rank, io.StringIO())
    trainer.train()
    return look(trainer)


def state_through_dcp(run_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """Train, write model and optimizer with DCP, forget both, read them back; return both states.

    The optimizer that reads has no state yet, as one that resumes.
    """
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _state_through_dcp(run_dir, rank, checkpoint)


def _state_through_dcp(run_dir: Path, rank: Rank, checkpoint: Path) -> dict[str, Any]:
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    trainer = assemble(run_dir, rank, io.StringIO())
    trainer.train()
    optimizer = trainer.torch_optimizer()
    model_state, optimizer_state = get_state_dict(trainer.model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=checkpoint)
    written = _bits_of(optimizer)

    optimizer.state.clear()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.fill_(7.0)
    optimizer.zero_grad()
    model_state, optimizer_state = get_state_dict(trainer.model, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(
        trainer.model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return {"written": written, "read": _bits_of(optimizer)}


def state_through_zero0(run_dir: Path) -> dict[str, Any]:
    """Train at stage 0; return the optimizer's live state and that in DeepSpeed's checkpoint."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _state_through_zero0(run_dir, rank)


def _state_through_zero0(run_dir: Path, rank: Rank) -> dict[str, Any]:
    import torch

    from train.checkpoint.save import save

    trainer = assemble(run_dir, rank, io.StringIO())
    trainer.train()
    file = save(trainer) / "engine" / "mp_rank_00_model_states.pt"
    optimizer = trainer.innermost_optimizer()
    written = _bits_of(optimizer)
    read = torch.load(file, weights_only=False)["optimizer"]
    for state in optimizer.state.values():
        state.clear()
    optimizer.load_state_dict(read)
    return {"written": written, "read": _bits_of(optimizer)}


def _bits_of(optimizer: Any) -> dict[str, Any]:
    """Return this rank's part of every tensor of the optimizer as arrays, and its groups."""
    import torch

    def parts(value: Any) -> list[Any]:
        value = value.to_local() if hasattr(value, "to_local") else value
        # The 8-bit optimizer keeps codes and a scale for each block of them.
        inner = [value.codes, value.scale] if hasattr(value, "codes") else [value]
        return [torch.as_tensor(part).detach().clone().numpy() for part in inner]

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "weights": [parts(p) for p in parameters],
        "state": [{k: parts(v) for k, v in optimizer.state[p].items()} for p in parameters],
        "groups": [
            {k: parts(v) if isinstance(v, torch.Tensor) else v for k, v in g.items()}
            for g in ({k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups)
        ],
    }


def trained_with_broken_engine(run_dir: Path, damage: str) -> None:
    """Train with settings that were changed behind the config's back, as a silent fallback does."""
    from unittest import mock

    import torch

    from train import optimizer
    from train.config import RunConfig
    from train.strategy import fsdp, zero

    sound_settings, sound_build = zero.settings, optimizer.build

    def other_stage(config: Any, world_size: int) -> dict[str, Any]:
        values = sound_settings(config, world_size)
        return {**values, "zero_optimization": {"stage": 2}}

    def other_optimizer(config: RunConfig, *rest: Any) -> torch.optim.Optimizer:
        changed = config.trainer.model_copy(update={"muon_momentum": 0.5})
        return sound_build(config.model_copy(update={"trainer": changed}), *rest)

    def assemble_and_train() -> None:
        if damage == "stage":
            with mock.patch.object(
                zero, "training_arguments", lambda c, w: {"deepspeed": other_stage(c, w)}
            ):
                trainer = assemble(run_dir, rank, io.StringIO())
        elif damage == "fall_back_to_ddp":
            with mock.patch.object(fsdp, "shard", lambda model, config: model):
                trainer = assemble(run_dir, rank, io.StringIO())
        else:
            trainer = assemble(run_dir, rank, io.StringIO())
            if damage == "dtype":
                torch.nn.Module.to(trainer.model, torch.bfloat16)
        replacement = other_optimizer if damage == "momentum" else sound_build
        with mock.patch.object(optimizer, "build", replacement):
            trainer.train()

    rank = rank_from_environment()
    with join(load(run_dir), rank):
        assemble_and_train()


def trained_with_memory_watched(run_dir: Path) -> dict[str, Any]:
    """Train; return each block's forward calls per micro-batch, and the bytes kept for backward."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_watch_memory(run_dir, rank)


def _train_and_watch_memory(run_dir: Path, rank: Rank) -> dict[str, Any]:
    from torch import Tensor, nn
    from torch.autograd.graph import saved_tensors_hooks

    from train.models import blocks

    trainer = assemble(run_dir, rank, io.StringIO())
    calls = [0 for _ in blocks(trainer.model)]
    for i, block in enumerate(blocks(trainer.model)):

        def count(*_: Any, i: int = i) -> None:
            calls[i] += 1

        # Hooks of the block itself stay outside of what is recomputed.
        next(block.children()).register_forward_pre_hook(count)

    passes, kept_bytes = 0, 0
    compute_loss = trainer.compute_loss

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept_bytes
        if not isinstance(tensor, nn.Parameter):
            kept_bytes += tensor.numel() * tensor.itemsize
        return tensor

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal passes
        passes += 1
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            return compute_loss(*arguments, **options)

    trainer.compute_loss = watched  # type: ignore[method-assign]
    trainer.train()
    return {"calls": [n / passes for n in calls], "kept_bytes": kept_bytes / passes}
