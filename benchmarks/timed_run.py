"""One timed training in a process of its own: python -m benchmarks.timed_run SIDE RUN_DIR N.

It trains what RUN_DIR/config.yaml says, the first N steps uncounted, and writes
RUN_DIR/figures.json. SIDE is ours, or stock: what one would write with transformers alone, or
stock_tuned: the same, compiled.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.data import Dataset

from benchmarks.flops import matmul_parameters
from benchmarks.report import TUNED
from shardwright.train import config as run_config
from shardwright.train import data
from shardwright.train.config import (
    RankLayout,
    RunConfig,
    accumulation_steps,
    samples_wanted,
    total_steps,
)
from shardwright.train.data.batches.loader import train_loader
from shardwright.train.model import build as models
from shardwright.train.process.memory import peak_resident_bytes
from shardwright.train.process.rank import rank_from_environment
from shardwright.train.run import assemble
from shardwright.train.strategy.group import join
from shardwright.train.strategy.replicated import Replicated


class Clock(transformers.TrainerCallback):
    """Notes the time at the end of the last warm-up step and of the last step."""

    def __init__(self, warmup_steps: int) -> None:
        self.warmup_steps = warmup_steps
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.warmup_steps, state.max_steps):
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # what was launched has to have run
            self.times.append(time.perf_counter())


def timed(trainer: transformers.Trainer, warmup_steps: int) -> dict[str, Any]:
    """Train and return what was measured."""
    clock = Clock(warmup_steps)
    trainer.add_callback(clock)
    assert isinstance(trainer.model, transformers.PreTrainedModel)
    parameters = matmul_parameters(trainer.model)
    trainer.train()
    started, ended = clock.times
    on_gpu = trainer.args.device.type == "cuda"
    return {
        "seconds": ended - started,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes(),
        "matmul_parameters": parameters,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU ({platform.machine()})",
        "cuda": torch.version.cuda if on_gpu else None,
    }


class StockSamples(Dataset[Any]):
    """The very samples that ours trains on, in its order, as a map-style dataset."""

    def __init__(self, samples: Dataset[Any], keys: list[Any]) -> None:
        self.samples, self.keys = samples, keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Any:
        return self.samples[self.keys[index]]


def stock_trainer(
    config: RunConfig, run_dir: Path, ranks: int = 1, *, is_tuned: bool = False
) -> transformers.Trainer:
    """Return a plain Trainer of the same model on the same batches, with the model's own loss."""
    prepared = data.prepare(config, run_dir)
    wanted = samples_wanted(config, prepared.samples_per_epoch, prepared.samples_of_max_tokens)
    steps = total_steps(config.trainer, wanted)
    layout = RankLayout(replicas=ranks)
    loaders = [
        train_loader(prepared, config, rank=rank, layout=layout, total_steps=steps)
        for rank in range(ranks)
    ]
    loader = loaders[0]
    orders: list[Any] = [each.batch_sampler for each in loaders]

    def collate(samples: list[Any]) -> dict[str, torch.Tensor]:
        batch = loader.collate_fn(samples)
        if config.objective.kind == "clm":
            batch["labels"] = batch["input_ids"]  # the model shifts them itself
        return batch

    trainer = config.trainer
    args = transformers.TrainingArguments(
        output_dir=str(run_dir),
        seed=config.seed,
        use_cpu=config.launcher.device == "cpu",
        ddp_backend=dist.get_backend() if dist.is_initialized() else None,
        bf16=config.precision.compute_dtype == "bf16",
        max_steps=steps,
        per_device_train_batch_size=trainer.samples_per_pass,
        gradient_accumulation_steps=accumulation_steps(trainer, layout),
        dataloader_num_workers=loader.num_workers,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,  # the samples are no dictionaries yet
        optim="adamw_torch_fused",
        torch_compile=is_tuned,
        gradient_checkpointing=trainer.checkpoint_activations_every_blocks is not None or None,
        learning_rate=trainer.learning_rate,
        lr_scheduler_type=trainer.lr_scheduler,
        weight_decay=trainer.weight_decay,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_epsilon=trainer.adam_epsilon,
        max_grad_norm=trainer.max_grad_norm,
        logging_steps=trainer.log_every_steps or 10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    model, values = models.build(config, prepared.tokenizer)
    return transformers.Trainer(
        model=Replicated(config, layout).shard(model, values),
        args=args,
        # accelerate hands batches to the ranks in turns.
        train_dataset=StockSamples(
            loader.dataset,
            [key for batches in zip(*orders, strict=True) for batch in batches for key in batch],
        ),
        data_collator=collate,
    )


def main(argv: list[str]) -> None:
    side, run_dir, warmup_steps = argv[0], Path(argv[1]), int(argv[2])
    config = run_config.load(run_dir)
    if side == "ours":
        rank = rank_from_environment()
        with join(config, rank):
            figures = timed(assemble(run_dir, config, rank, sys.stdout), warmup_steps)
    else:
        trainer = stock_trainer(config, run_dir, is_tuned=side == TUNED)
        figures = timed(trainer, warmup_steps)
    (run_dir / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
