"""Trainings by other programs, which leave their own checkpoints and what their engines held then.

Each job makes many in one process group. ``held.pt`` beside a checkpoint is what it must read as.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

HELD = "held.pt"
STEPS = 2
SIZES: dict[str, dict[str, int]] = {
    "clm": {"hidden": 16, "heads": 2, "vocab": 64, "inner": 32},
    "mlm": {"hidden": 16, "heads": 2, "vocab": 64, "inner": 32},
    # Nothing that 2 or 4 divide: weights and partitions end in padding.
    "odd": {"hidden": 30, "heads": 3, "vocab": 211, "inner": 67},
}
"""By the kind of model; all tie their output to their input embeddings."""


def model_of(kind: str) -> Any:
    from transformers import (
        DistilBertConfig,
        DistilBertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
    )

    torch.manual_seed(0)
    size = SIZES[kind]
    if kind == "mlm":
        model: Any = DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=size["vocab"],
                dim=size["hidden"],
                n_layers=1,
                n_heads=size["heads"],
                hidden_dim=size["inner"],
                max_position_embeddings=16,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=size["vocab"],
                n_embd=size["hidden"],
                n_layer=1,
                n_head=size["heads"],
                n_inner=size["inner"],
                n_positions=16,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    model.register_buffer("counts", torch.arange(5))
    model.register_buffer("scale", torch.tensor([1.25, 0.5, 2.0]))
    return model


def groups_of(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Return two groups of parameters, as transformers makes them: matrices decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1, "lr": learning_rate},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, "lr": learning_rate},
    ]


def batches(kind: str, rank: int) -> Iterator[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    for _ in range(STEPS):
        yield torch.randint(0, SIZES[kind]["vocab"], (2, 8), generator=draw)


def note(directory: Path, weights: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Write on rank 0 what an engine holds, tied weights under each of their names."""
    if torch.distributed.get_rank() != 0:
        return
    first: dict[int, str] = {}
    names = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for name, parameter in names.items():
        kept = first.setdefault(id(parameter), name)
        found[name] = weights[kept].detach().cpu().clone()
    persistent = model.state_dict().keys()
    buffers = {n: b.cpu().clone() for n, b in model.named_buffers() if n in persistent}
    directory.mkdir(parents=True, exist_ok=True)
    tied = {n: first[id(p)] for n, p in names.items() if n != first[id(p)]}
    torch.save({"weights": found, "buffers": buffers, "tied": tied}, directory / HELD)


@contextmanager
def group() -> Iterator[int]:
    """Be a rank of a gloo group, which DeepSpeed uses too; give its number."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    from shardwright.train.process.leave import leave_process_group
    from shardwright.train.strategy.zero.engine import Zero

    dist.init_process_group("gloo")
    try:
        Zero.adopt_process_group()
        yield dist.get_rank()
    finally:
        leave_process_group()


# --- DeepSpeed ----------------------------------------------------------------------------------

_CPU = {"device": "cpu"}
_MANY = {"sub_group_size": 500, "stage3_param_persistence_threshold": 0}
ENGINES: dict[str, dict[str, Any]] = {
    "zero0_fp32": {"stage": 0, "dtype": "fp32"},
    "zero0_bf16": {"stage": 0, "dtype": "bf16"},
    "zero0_fp16": {"stage": 0, "dtype": "fp16"},
    "zero0_fused": {"stage": 0, "dtype": "bf16", "fused": True},
    "zero0_fused_fp16": {"stage": 0, "dtype": "fp16", "fused": True},
    "zero0_frozen": {"stage": 0, "dtype": "bf16", "frozen": True},
    "zero1_fp32": {"stage": 1, "dtype": "fp32"},
    "zero1_bf16": {"stage": 1, "dtype": "bf16"},
    "zero1_bf16_optimizer": {"stage": 1, "dtype": "bf16", "fp32_gradients": True},
    "zero1_fp16": {"stage": 1, "dtype": "fp16"},
    "zero1_frozen": {"stage": 1, "dtype": "bf16", "frozen": True},
    "zero1_offload": {"stage": 1, "dtype": "bf16", "offload_optimizer": _CPU},
    "zero2_fp32": {"stage": 2, "dtype": "fp32"},
    "zero2_bf16": {"stage": 2, "dtype": "bf16"},
    "zero2_fp16": {"stage": 2, "dtype": "fp16"},
    "zero2_frozen": {"stage": 2, "dtype": "fp16", "frozen": True},
    "zero2_offload": {"stage": 2, "dtype": "bf16", "offload_optimizer": _CPU},
    "zero2_aligned": {"stage": 2, "dtype": "bf16", "parameter_alignment": True},
    "zero3_fp32": {"stage": 3, "dtype": "fp32"},
    "zero3_bf16": {"stage": 3, "dtype": "bf16", **_MANY},
    "zero3_fp16": {"stage": 3, "dtype": "fp16"},
    "zero3_frozen": {"stage": 3, "dtype": "bf16", "frozen": True},
    "zero3_offload": {"stage": 3, "dtype": "bf16", "offload_optimizer": _CPU},
}
"""By name: the stage, the dtype of the weights, whether some are frozen, and keys of ZeRO."""


def deepspeed_checkpoints(root: Path, jobs: list[tuple[str, str]]) -> None:
    """Train by each engine of ``jobs`` (engine, model) and save into root/engine-model."""
    with group() as rank:
        for engine, kind in jobs:
            _deepspeed_checkpoint(root / f"{engine}-{kind}", ENGINES[engine], kind, rank)


def _deepspeed_config(dtype: str, stage: int, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16", "initial_scale_power": 4},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
    }


def _deepspeed_checkpoint(directory: Path, asked: dict[str, Any], kind: str, rank: int) -> None:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    rest = dict(asked)
    dtype, stage = rest.pop("dtype"), rest.pop("stage")
    model = model_of(kind)
    if rest.pop("frozen", False):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "position_embeddings" not in name and "wpe" not in name
    fp32_gradients, is_fused = rest.pop("fp32_gradients", False), rest.pop("fused", False)
    config = _deepspeed_config(dtype, stage, **rest)
    if fp32_gradients:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(groups_of(model, 1e-2))
    # DeepSpeed gives flat masters to its own Adam only, which needs a compiler.
    fused = torch.optim.AdamW if is_fused else deepspeed.ops.adam.FusedAdam
    # torch multiplies fp16 on any CPU, but DeepSpeed refuses it where that is slow.
    with (
        mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=True),
        mock.patch.object(deepspeed.runtime.engine, "FusedAdam", fused),
    ):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        for ids in batches(kind, rank):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    assert is_fused == hasattr(engine.optimizer, "fp32_groups_flat")
    engine.save_checkpoint(str(directory))
    note(directory, _masters(engine), engine.module)
    engine.destroy()


def _masters(engine: Any) -> dict[str, torch.Tensor]:
    """Return what an engine steps, whole: masters, and frozen weights as they are. Collective."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    stepped = _replicated_masters(engine.optimizer)
    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        whole = stepped.get(id(parameter))
        if whole is None and parameter.requires_grad and engine.zero_optimization_stage() > 0:
            whole = safe_get_full_fp32_param(parameter)
        if whole is None:
            sharded = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(sharded):
                whole = parameter.detach().clone()
        found[name] = whole
    return found


def _replicated_masters(optimizer: Any) -> dict[int, torch.Tensor]:
    """Return the masters of stage 0 by the identity of their parameters."""
    found: dict[int, torch.Tensor] = {}
    for low, high in zip(
        getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=False
    ):
        if isinstance(high, list):
            found |= {id(p): master for p, master in zip(low, high, strict=True)}
    for low, flat in zip(
        getattr(optimizer, "fp16_groups", []),
        getattr(optimizer, "fp32_groups_flat", []),
        strict=False,
    ):
        pieces = flat.split([p.numel() for p in low])
        found |= {id(p): m.view(p.shape) for p, m in zip(low, pieces, strict=True)}
    return found


def by_zero_to_fp32(checkpoints: list[Path]) -> None:
    """Have DeepSpeed's own script merge each checkpoint, into by-deepspeed.pt in it."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for checkpoint in checkpoints:
        merged = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
        torch.save({n: t.clone() for n, t in merged.items()}, checkpoint / "by-deepspeed.pt")


def universal_checkpoint(checkpoint: Path, output: Path, inject: bool) -> None:
    """Have DeepSpeed convert a folder of a step, in this process."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=str(checkpoint),
            output_folder=str(output),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=inject,
        )
    )


# --- torch's distributed checkpoints ------------------------------------------------------------

DISTRIBUTED = ("sections", "flat", "bf16", "columns", "grid")


def distributed_checkpoints(root: Path, kind: str) -> None:
    """Shard a model in several ways and save each as root/<one of DISTRIBUTED>-kind."""
    with group():
        for form in DISTRIBUTED:
            _distributed_checkpoint(root / f"{form}-{kind}", form, kind)


def _distributed_checkpoint(directory: Path, form: str, kind: str) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh

    model = model_of(kind)
    if form == "bf16":
        model = model.bfloat16()
    ranks = torch.arange(dist.get_world_size())
    if form in ("columns", "grid"):
        shape = (2, -1) if form == "grid" and len(ranks) > 2 else (-1,)
        state = _cut(model, DeviceMesh("cpu", ranks.view(shape)))
    else:
        fully_shard(model, mesh=DeviceMesh("cpu", ranks))
        state = get_model_state_dict(model)
    average = {f"{name}": tensor * 0.5 for name, tensor in state.items()}
    step = torch.tensor(STEPS)
    saved: dict[str, Any] = {
        "sections": {"model": state, "optim": {"state": {}}, "ema": average},
        # As torchtitan does it.
        "flat": {**state, "train_state": {"step": step}, "optimizer": {"param_groups.lr": step}},
        "bf16": {"app": {"model": state}},
        "columns": {"state_dict": state},
        "grid": {"module": state},
    }[form]
    dcp.save(saved, checkpoint_id=directory)
    note(directory, _whole(model), model)


def _cut(model: nn.Module, mesh: Any) -> dict[str, Any]:
    """Return a state cut along columns, on a grid along rows and columns, as tensor parallelism."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    found = {}
    for name, tensor in model.state_dict().items():
        dims = range(tensor.ndim)[-mesh.ndim :]
        placements = [Replicate()] * (mesh.ndim - len(dims)) + [Shard(dim) for dim in dims]
        found[name] = distribute_tensor(tensor, mesh, placements)
    # In three dimensions, of which neither the first nor the last is cut.
    cube = torch.arange(3 * 7 * 5.0).view(3, 7, 5)
    model.register_parameter("cube", nn.Parameter(cube))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(1)]
    found["cube"] = distribute_tensor(cube, mesh, placements)
    return found


# --- accelerate and the Trainer -----------------------------------------------------------------

BLOCKS = {"clm": "GPT2Block", "mlm": "TransformerBlock", "odd": "GPT2Block"}
LIBRARIES = (
    *("accelerate_fsdp", "accelerate_fsdp_full", "accelerate_ddp", "accelerate_zero2"),
    *("trainer_fsdp", "trainer_fsdp_full", "trainer_ddp", "trainer_zero1", "trainer_zero3"),
)


def library_checkpoint(directory: Path, library: str, kind: str) -> None:
    """Train a kind of model by one of LIBRARIES and save.

    With accelerate the checkpoint is that directory, with the Trainer checkpoint-2 in it.
    """
    with group() as rank:
        save = _accelerate if library.startswith("accelerate") else _transformers
        save(directory, library, kind, rank)


def _fsdp_on_a_cpu() -> None:
    """accelerate takes FSDP on a CPU for DDP unless it believes in GPUs."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return FSDP's or DDP's weights. Collective."""
    return {
        name: p.full_tensor() if hasattr(p, "full_tensor") else p.detach()
        for name, p in model.named_parameters()
    }


def _accelerate(directory: Path, library: str, kind: str, rank: int) -> None:
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import PartialState

    plugins: dict[str, Any] = {}
    if "zero" in library:
        config = _deepspeed_config("bf16", int(library[-1]))
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=config)
    if "fsdp" in library:
        PartialState(cpu=True)
        _fsdp_on_a_cpu()
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[BLOCKS[kind]],
            state_dict_type="FULL_STATE_DICT" if "full" in library else "SHARDED_STATE_DICT",
        )
    accelerator = Accelerator(cpu="ddp" in library, **plugins)
    model = model_of(kind)
    optimizer = torch.optim.AdamW(groups_of(model, 1e-2))
    model, optimizer = accelerator.prepare(model, optimizer)
    for ids in batches(kind, rank):
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(directory))
    inner = accelerator.unwrap_model(model)
    note(directory, _masters(model) if "zero" in library else _whole(inner), inner)


def _transformers(directory: Path, library: str, kind: str, rank: int) -> None:
    from transformers import Trainer, TrainingArguments
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    options: dict[str, Any] = {}
    if "zero" in library:
        stage = int(library[-1])
        options["deepspeed"] = _deepspeed_config("bf16", stage)
        options["bf16"] = True
        if stage == 3:
            gathered = {"stage3_gather_16bit_weights_on_model_save": True}
            options["deepspeed"]["zero_optimization"] |= gathered
    elif "fsdp" in library:
        options["fsdp"] = True
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": [BLOCKS[kind]],
            "state_dict_type": "FULL_STATE_DICT" if "full" in library else "SHARDED_STATE_DICT",
        }
    arguments = TrainingArguments(
        output_dir=str(directory),
        use_cpu="fsdp" not in library,
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        ddp_backend="gloo",
        **options,
    )
    _ = arguments.device
    if "fsdp" in library:
        _fsdp_on_a_cpu()
    rows = [
        {"input_ids": ids, "labels": ids} for batch in batches(kind, 0) for ids in [*batch, *batch]
    ]
    model = model_of(kind)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    try:
        trainer.train()
        is_zero = "zero" in library
        weights = _masters(trainer.model_wrapped) if is_zero else _whole(model)
        note(directory / f"checkpoint-{STEPS}", weights, model)
    finally:
        unset_hf_deepspeed_config()
