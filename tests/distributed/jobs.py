"""What a rank does in a test: whole runs of the real thing, seen from inside where needed."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwright.train.config import load
from shardwright.train.loop.trainer import Trainer
from shardwright.train.process.rank import Rank, rank_from_environment
from shardwright.train.run import assemble, run
from shardwright.train.strategy.group import join


def whole_run(run_dir: Path) -> str:
    """Do what `shardwright rank RUN_DIR` does; return what this rank prints on the terminal."""
    rank, console = rank_from_environment(), io.StringIO()
    with join(load(run_dir), rank):
        run(run_dir, load(run_dir), rank, console)
    return console.getvalue()


def trained(run_dir: Path, look: Callable[[Trainer], Any]) -> Any:
    """Train, then return what ``look`` finds on the live engine of this rank."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_look(run_dir, rank, look)


def trained_as_if_compiled(run_dir: Path) -> dict[str, Any]:
    """Train blocks that are to be compiled, with the compiler switched off as in debugging."""
    import torch

    with torch._dynamo.config.patch(disable=True):
        trained(run_dir, lambda _: None)
    facts: dict[str, Any] = json.loads((run_dir / "engine.json").read_text())
    return facts


def alone_in_a_shell_of_another_group(run_dir: Path) -> int:
    """Join as the only rank where the address of a group elsewhere stands; return the ranks met."""
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="203.0.113.1", MASTER_PORT="9")
    with join(load(run_dir), rank_from_environment()):
        return dist.get_world_size()


def _train_and_look(run_dir: Path, rank: Rank, look: Callable[[Trainer], Any]) -> Any:
    # Its own frame, so that nothing holds the trainer when the group is left.
    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
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

    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
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

    from shardwright.train.loop.saving.save import save

    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
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


def forget_compiled_code() -> None:
    """Have torch.compile start anew, as in a new process."""
    import torch

    torch.compiler.reset()


def trained_with_broken_engine(run_dir: Path, damage: str) -> None:
    """Train with settings that were changed behind the config's back, as a silent fallback does."""
    from unittest import mock

    import torch

    from shardwright.train.config import RunConfig
    from shardwright.train.model.blocks import blocks
    from shardwright.train.optimizer import build as optimizer
    from shardwright.train.strategy.fsdp.engine import Fsdp
    from shardwright.train.strategy.replicated import Replicated
    from shardwright.train.strategy.zero.engine import Zero

    sound_build = optimizer.build

    def other_stage(engine: Zero) -> dict[str, Any]:
        return {"deepspeed": {**engine.settings(), "zero_optimization": {"stage": 2}}}

    def other_optimizer(config: RunConfig, *rest: Any) -> torch.optim.Optimizer:
        changed = config.trainer.model_copy(update={"muon_momentum": 0.5})
        return sound_build(config.model_copy(update={"trainer": changed}), *rest)

    def assemble_and_train() -> None:
        if damage == "compiled_by_accelerate":
            os.environ["ACCELERATE_DYNAMO_BACKEND"] = "eager"  # forgotten as the group is left
        if damage == "stage":
            with mock.patch.object(Zero, "training_arguments", other_stage):
                trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        elif damage == "fall_back_to_ddp":
            with mock.patch.object(Fsdp, "shard", Replicated.shard):
                trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
        else:
            trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
            if damage == "dtype":
                torch.nn.Module.to(trainer.model, torch.bfloat16)
            elif damage == "recomputation":
                blocks(trainer.model)[1].gradient_checkpointing = True  # type: ignore[assignment]
            elif damage == "one_block_compiled":
                blocks(trainer.model)[1].compile()
            elif damage == "tf32":
                torch.backends.cuda.matmul.fp32_precision = "tf32"
        replacement = other_optimizer if damage == "momentum" else sound_build
        with mock.patch.object(optimizer, "build", replacement):
            trainer.train()

    rank = rank_from_environment()
    try:
        with join(load(run_dir), rank):
            assemble_and_train()
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def trained_with_memory_watched(run_dir: Path) -> dict[str, Any]:
    """Train; return each block's forward calls per micro-batch, and the bytes kept for backward."""
    rank = rank_from_environment()
    with join(load(run_dir), rank):
        return _train_and_watch_memory(run_dir, rank)


def _train_and_watch_memory(run_dir: Path, rank: Rank) -> dict[str, Any]:
    from torch import Tensor, nn
    from torch.autograd.graph import saved_tensors_hooks

    from shardwright.train.model.blocks import blocks

    trainer = assemble(run_dir, load(run_dir), rank, io.StringIO())
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


def trained_in_emulated_fp8(run_dir: Path) -> dict[str, Any]:
    """Train with torchao's fp8 products emulated on a CPU; return the model's layers and names.

    The emulation and the missing GPU are all that is patched.
    """
    import dataclasses
    from unittest import mock

    from shardwright.train.model import fp8

    sound_config = fp8.torchao_config

    def emulated(recipe: str) -> Any:
        return dataclasses.replace(sound_config(recipe), emulate=True)

    def look(trainer: Trainer) -> dict[str, Any]:
        modules = trainer.model.named_modules()
        return {
            "fp8_layers": [n for n, m in modules if type(m).__name__.endswith("Float8Linear")],
            "parameters": [name for name, _ in trainer.model.named_parameters()],
        }

    with (
        mock.patch.object(fp8, "torchao_config", emulated),
        mock.patch.object(fp8, "_check_device"),
    ):
        return trained(run_dir, look)


def trained_in_fp16_on_a_cpu(run_dir: Path) -> dict[str, Any]:
    """Train in fp16; return the loss scale, and how many steps the schedule has counted."""

    def look(trainer: Trainer) -> dict[str, Any]:
        return {"loss_scale": loss_scale(trainer), "scheduled": scheduled_steps(trainer)}

    with fp16_allowed_on_a_cpu():
        return trained(run_dir, look)


def loss_scale(trainer: Trainer) -> float | None:
    """Return the factor on the loss, torch's or DeepSpeed's; None where losses are not scaled."""
    from shardwright.train.strategy.loss_scale import loss_scale_state

    return loss_scale_state(trainer).get("scale")


def scheduled_steps(trainer: Trainer) -> int:
    """Return how many steps the schedule of the learning rate has counted."""
    assert trainer.lr_scheduler is not None
    return trainer.lr_scheduler.last_epoch


@contextmanager
def fp16_allowed_on_a_cpu() -> Iterator[None]:
    """Patch what refuses fp16 or leaves it out: torch computes in it on any CPU.

    DeepSpeed finds it slow there, and accelerate drops it without a word (1.15, Accelerator).
    """
    from unittest import mock

    import torch
    from deepspeed.accelerator import get_accelerator

    sound = Trainer.create_accelerator_and_postprocess

    def with_scaler(trainer: Trainer) -> None:
        sound(trainer)
        accelerator = trainer.accelerator
        on_cpu = trainer.args.device.type == "cpu"
        if trainer.args.fp16 and on_cpu and not trainer.is_deepspeed_enabled:
            accelerator.native_amp = True
            assert accelerator.scaler_handler is not None
            settings = accelerator.scaler_handler.to_kwargs()
            accelerator.scaler = torch.amp.GradScaler("cpu", **settings)

    with (
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True),
        mock.patch.object(Trainer, "create_accelerator_and_postprocess", with_scaler),
    ):
        yield


def restored_and_saved(run_dir: Path, directory: Path) -> None:
    """Restore a run that has no step left, and write what its engine then holds."""
    from shardwright.train.checkpoint.format.hashed import HashedFolder
    from shardwright.train.loop.saving.peers import Peers

    def save(trainer: Trainer) -> None:
        directory.mkdir(exist_ok=True)
        folder, peers = HashedFolder(directory), Peers(trainer.args.process_index)
        state = trainer.engine.save_state(trainer, is_first=peers.is_first, into=None)
        written = peers.collect(lambda: state.write(folder))
        peers.attempt(lambda: state.finish(folder, written) if peers.rank == 0 else None)

    trained(run_dir, save)


def held(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the master weight and the moments of each parameter, whole, as the engine has them.

    Collective, by what each engine offers for it.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    from shardwright.train.strategy.zero import masters as zero_masters

    engine = trainer.model_wrapped
    is_sharded_zero = trainer.config.strategy.kind == "zero" and trainer.config.strategy.stage > 0
    masters = zero_masters.replicated_masters(engine) if hasattr(engine, "optimizer") else {}
    optimizer = trainer.innermost_optimizer()
    links: Any = getattr(engine, "optimizer", None)
    if hasattr(links, "round_robin_bit16_groups"):
        # deepspeed 0.19 links parameters to masters in another order than that in which
        # round_robin_gradients lays them out, and moments before all groups have some.
        links.bit16_groups = links.round_robin_bit16_groups
        links._link_all_hp_params()
        links._hp_optimizer_states_linked = False
        links._lazy_init_hp_params_optimizer_state()

    def array(tensor: Any) -> Any:
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return tensor.detach().clone().cpu().numpy()

    found = {}
    for name, parameter in trainer.model.named_parameters():
        if is_sharded_zero:
            tensors = {
                "weight": safe_get_full_fp32_param(parameter),
                "exp_avg": safe_get_full_optimizer_state(parameter, "exp_avg"),
                "exp_avg_sq": safe_get_full_optimizer_state(parameter, "exp_avg_sq"),
            }
        else:
            master = masters.get(parameter, parameter)
            state = optimizer.state[master]
            tensors = {"weight": master, **{k: v for k, v in state.items() if k != "step"}}
        found[name] = {kind: array(tensor) for kind, tensor in tensors.items()}
    return found
