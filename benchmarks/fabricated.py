"""Checkpoints laid out like DeepSpeed's own, of models that are too large to train here.

A test holds them against those of the real engine. Masters are random, moments zeros: whoever
recovers weights has to pass over them all the same.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.engine_checkpoints import TAG, zero_settings

Shapes = dict[str, torch.Size]


def write_zero(stage: int, model: PreTrainedModel, out: Path, ranks: int = 2) -> None:
    """Write a checkpoint of ZeRO-2 or ZeRO-3 in bf16, one rank's part in memory at a time.

    ``model`` is on the meta device; no weights of it are tied, and it has no buffers.
    """
    directory = out / TAG
    directory.mkdir(parents=True)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    for rank in range(ranks):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        state = _zero2(shapes, rank, ranks) if stage == 2 else _zero3(shapes, rank, ranks)
        torch.save(_with_settings(stage, {"optimizer_state_dict": state}), directory / name)
        del state
    if stage == 2:
        module = _views(shapes)
        torch.save(_model_states(stage, shapes, module, ranks), directory / _model_file(stage, 0))
    else:
        for rank in range(ranks):
            module = {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes}
            torch.save(
                _model_states(stage, shapes, module, ranks), directory / _model_file(stage, rank)
            )
    (out / "latest").write_text(TAG)


def _model_file(stage: int, rank: int) -> str:
    return (
        f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        if stage == 3
        else ("mp_rank_00_model_states.pt")
    )


def _zero2(shapes: Shapes, rank: int, ranks: int) -> dict[str, Any]:
    """Return the state of one rank: an equal part of all parameters end to end."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.utils.tensor_fragment import fragment_address

    total = sum(shape.numel() for shape in shapes.values())
    # The engine aligns each rank's part to two elements.
    part = math.ceil(total / (2 * ranks)) * 2
    mapping: OrderedDict[str, Any] = OrderedDict()
    begin, low, high = 0, rank * part, (rank + 1) * part
    for name, shape in shapes.items():
        end = begin + shape.numel()
        if begin < high and end > low:
            start = max(begin, low)
            mapping[name] = fragment_address(numel=min(end, high) - start, start=start - low)
        begin = end
    padding = part * ranks - total
    return {
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": 1.0,
        "base_optimizer_state": _adam(part),
        "single_partition_of_fp32_groups": [_masters(part, rank)],
        "zero_stage": _stage(2),
        "group_paddings": [padding if rank == ranks - 1 else 0],
        "param_alignment_paddings": [[0] * len(shapes)],
        "partition_count": [ranks],
        "ds_version": _version(),
        "param_slice_mappings": [mapping],
    }


def _zero3(shapes: Shapes, rank: int, ranks: int) -> dict[str, Any]:
    """Return the state of one rank: an equal part of each parameter, end to end."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    numel = sum(math.ceil(shape.numel() / ranks) for shape in shapes.values())
    return {
        "zero_stage": _stage(3),
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
        "partition_count": ranks,
        "optimizer_state_dict": _adam(numel),
        "fp32_flat_groups": [_masters(numel, rank)],
    }


def _adam(numel: int) -> dict[str, Any]:
    parameter = torch.nn.Parameter(torch.empty(1))
    groups = torch.optim.AdamW([parameter], lr=1e-3).state_dict()["param_groups"]
    moments = {"exp_avg": torch.zeros(numel), "exp_avg_sq": torch.zeros(numel)}
    return {"state": {0: {"step": torch.tensor(1.0), **moments}}, "param_groups": groups}


def _masters(numel: int, rank: int) -> torch.Tensor:
    return torch.empty(numel).normal_(std=0.02, generator=torch.Generator().manual_seed(rank))


def _views(shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return parameters in bf16 as the engine has them: views of one flat tensor."""
    total = sum(shape.numel() for shape in shapes.values())
    flat = torch.zeros(math.ceil(total / 4) * 4, dtype=torch.bfloat16)
    parts = torch.split(flat[:total], [shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


def _model_states(
    stage: int, shapes: Shapes, module: dict[str, torch.Tensor], ranks: int
) -> dict[str, Any]:
    nothing = ("lr_scheduler", "data_sampler", "random_ltd")
    return _with_settings(
        stage,
        {
            "module": OrderedDict(module),
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [OrderedDict(shapes)],
            "frozen_param_shapes": OrderedDict(),
            "shared_params": {},
            "frozen_param_fragments": OrderedDict(),
            **dict.fromkeys(nothing),
            "skipped_steps": 0,
            "global_steps": 1,
            "global_samples": ranks,
            "dp_world_size": ranks,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        },
    )


def _with_settings(stage: int, tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "ds_config": zero_settings(stage), "ds_version": _version()}


def _stage(number: int) -> Any:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    return ZeroStageEnum(number)


def _version() -> str:
    import deepspeed

    return str(deepspeed.__version__)
