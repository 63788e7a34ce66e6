"""One rank that writes a checkpoint: python -m benchmarks.engine_checkpoints KIND CONFIG OUT.

KIND is zero2, zero3 or fsdp; CONFIG the directory of a model's config.json. The engine is the real
one on gloo: DeepSpeed steps once and saves itself; FSDP's shards are saved by accelerate.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from shardwright.train.model.blocks import blocks
from shardwright.train.process.leave import leave_process_group

TAG = "global_step1"


def zero_settings(stage: int) -> dict[str, Any]:
    """Return DeepSpeed's config of a run in bf16 with fp32 master weights."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
    }


def write_zero(stage: int, model: PreTrainedModel, out: Path) -> None:
    """Step once under ZeRO and save, as a training script of DeepSpeed's users does."""
    import deepspeed

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=zero_settings(stage))
    ids = torch.arange(8)[None] + dist.get_rank()
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(out), tag=TAG)


def write_fsdp(model: PreTrainedModel, out: Path) -> None:
    """Shard with FSDP2 and save with accelerate's own function, as its Accelerator does."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import save_fsdp_model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_offload=False
    )
    save_fsdp_model(plugin, Accelerator(cpu=True), model, str(out))


def write(kind: str, config: str, out: str) -> None:
    """Be one of the ranks that torchrun has started, and write its part."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo")
    try:
        _build_and_write(kind, config, Path(out))
        dist.barrier()
    finally:
        leave_process_group()


def _build_and_write(kind: str, config: str, out: Path) -> None:
    # Its own frame, so that nothing holds the engine when the group is left.
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    if kind == "fsdp":
        write_fsdp(model, out)
    else:
        write_zero(int(kind.removeprefix("zero")), model, out)


if __name__ == "__main__":
    write(*sys.argv[1:])
