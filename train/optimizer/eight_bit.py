"""torchao's AdamW of 8-bit moments; these as fp32 ones, for a checkpoint, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shardwright.train.config import RunConfig
from shardwright.train.errors import UserError, not_installed
from shardwright.train.optimizer.adamw import ADAMW, settings
from shardwright.train.optimizer.groups import groups_of
from shardwright.train.optimizer.kind import AdamwOf, Kind

FIRST_MOMENT = "exp_avg"
"""The one that has a sign."""


def _build(
    config: RunConfig, model: PreTrainedModel, decayed: Collection[str], adamw: AdamwOf
) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError(not_installed("trainer.optimizer=adamw_8bit", "torchao")) from None
    # torchao compiles its step. torch 2.13 finds compiled code of an earlier process by what does
    # not tell the ranks' local shapes apart (torch/_functorch/_aot_autograd/autograd_cache.py):
    # under FSDP the second run on a machine learned something else.
    torch._functorch.config.enable_autograd_cache = False
    groups = groups_of(model, decayed, config.trainer)
    return AdamW8bit(groups, **settings(config.trainer))


KIND = Kind("AdamW8bit", {"adamw": ADAMW}, _build)


def in_use(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == KIND.class_name


def is_quantised(tensor: Any) -> bool:
    return type(tensor).__name__ == "OptimState8bit"


def appearing_in_fp32(value: Any) -> Any:
    """Return a tree in which each quantised tensor says that it is in fp32, sharing its bytes.

    It says otherwise to be in the parameter's dtype, which need not hold what its bytes mean.
    """
    if isinstance(value, dict):
        return {key: appearing_in_fp32(item) for key, item in value.items()}
    if isinstance(value, DTensor) and is_quantised(local := value.to_local()):
        return DTensor.from_local(
            appearing_in_fp32(local),
            value.device_mesh,
            value.placements,
            run_check=False,
            shape=value.shape,
            stride=value.stride(),
        )
    if is_quantised(value):
        return type(value)(value.codes, value.scale, value.qmap, value.signed, torch.float32)
    return value


def dequantised(value: Any) -> Any:
    """Return a tree with the fp32 values of each quantised tensor in its place."""
    if isinstance(value, dict):
        return {key: dequantised(item) for key, item in value.items()}
    return value.dequantize() if is_quantised(value) else value


def quantised(
    optimizer: Any, parameter: torch.Tensor, kind: str, values: torch.Tensor
) -> torch.Tensor:
    """Return a moment as the optimizer keeps it, out of fp32 ``values`` laid out as the parameter.

    Where they are what `dequantised` gave, it means the same values bit for bit, which is all that
    the next step sees of it. torchao leaves small tensors, and sizes that are no multiple of a
    block, in the parameter's dtype.
    """
    buffer = optimizer._new_buffer(parameter, kind == FIRST_MOMENT)
    local: Any = buffer.to_local() if isinstance(buffer, DTensor) else buffer
    source = values.to_local() if isinstance(values, DTensor) else values
    if not is_quantised(local):
        local.copy_(source)
        return buffer
    codes, scale = encoded(source, local.qmap, local.block_size)
    local.codes.copy_(codes)
    local.scale.copy_(scale)
    return buffer


def encoded(
    values: torch.Tensor, qmap: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes, shaped as ``values``, and a scale for each block.

    Blocks that were dequantised are met exactly. torchao divides a block by its largest magnitude,
    which is then a 1, or a -1 that its map of signed values has nothing for: the nearest is -0.993,
    so the scale is not always the largest magnitude of what was dequantised. Other blocks are
    quantised as torchao does it.
    """
    blocks = values.reshape(-1, block_size)
    candidates = _scales(blocks, qmap)
    scale = next(candidates)
    codes, is_exact = _with_scale(blocks, scale, qmap)
    for candidate in candidates:
        if bool(is_exact.all()):
            break
        found, is_met = _with_scale(blocks, candidate, qmap)
        is_better = is_met & ~is_exact
        codes = torch.where(is_better, found, codes)
        scale = torch.where(is_better, candidate, scale)
        is_exact |= is_met
    return codes.view(values.shape), scale.view(-1)


def _with_scale(
    blocks: torch.Tensor, scale: torch.Tensor, qmap: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of blocks, and for each block whether they mean exactly its values."""
    from torchao.optim.quant_utils import quantize_8bit_with_qmap

    codes = quantize_8bit_with_qmap(blocks / scale, qmap)
    return codes, (qmap[codes.int()] * scale == blocks).all(dim=1, keepdim=True)


def _scales(blocks: torch.Tensor, qmap: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the scales that a dequantised block may have had, torchao's own choice first."""
    smallest = 1e-12  # torchao's own bound (optim/quant_utils.py, scale_tensor, 0.18)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    yield largest.clip(smallest)
    rounded = (largest / qmap[0].abs()).clip(smallest) if qmap[0] < 0 else largest.clip(smallest)
    yield rounded
    for direction in (torch.inf, -torch.inf):
        neighbour = rounded
        for _ in range(2):
            neighbour = torch.nextafter(neighbour, torch.full_like(neighbour, direction))
            yield neighbour
    yield torch.full_like(largest, smallest)
