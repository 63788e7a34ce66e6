"""What every engine shares and must be as asked for: batch, clip, optimizer, schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from train.config import RunConfig, TrainerConfig, accumulation_steps

if TYPE_CHECKING:
    from train.trainer import Trainer

# Our names of the schedules, and those of transformers.
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant_with_warmup",
    "warmup_stable_decay": "warmup_stable_decay",
    "inverse_sqrt": "inverse_sqrt",
}


def warmup_steps(trainer: TrainerConfig, total_steps: int) -> int:
    """Return steps of linear warm-up. Pure."""
    return trainer.warmup_steps or math.ceil(round(trainer.warmup_fraction * total_steps, 6))


def decay_steps(trainer: TrainerConfig, total_steps: int) -> int:
    """Return steps of the final decay of a warmup_stable_decay schedule. Pure."""
    return math.ceil(round(trainer.decay_fraction * total_steps, 6))


def expected(config: RunConfig, world_size: int, total_steps: int) -> dict[str, Any]:
    """Return the facts that `read_back` must find. Pure."""
    trainer = config.trainer
    schedule: dict[str, Any] = {"num_warmup_steps": warmup_steps(trainer, total_steps)}
    if trainer.lr_scheduler in ("linear", "cosine"):
        schedule["num_training_steps"] = total_steps
    if trainer.lr_scheduler == "warmup_stable_decay":
        schedule["num_decay_steps"] = decay_steps(trainer, total_steps)
    return {
        "global_batch_size": trainer.global_batch_size,
        "micro_batch_size": trainer.micro_batch_size,
        "accumulation_steps": accumulation_steps(trainer, world_size),
        "clip": trainer.max_grad_norm,
        "optimizer": {
            "class": "AdamW",
            "peak_learning_rate": trainer.learning_rate,
            "betas": [trainer.adam_beta1, trainer.adam_beta2],
            "epsilon": trainer.adam_epsilon,
            "weight_decays": sorted({trainer.weight_decay, 0.0}),
        },
        "schedule": {"name": SCHEDULES[trainer.lr_scheduler], **schedule},
    }


def read_back(trainer: Trainer) -> dict[str, Any]:
    """Return facts read off the live loop."""
    args, groups = trainer.args, trainer.torch_optimizer().param_groups
    return {
        "global_batch_size": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * args.world_size,
        "micro_batch_size": args.per_device_train_batch_size,
        "accumulation_steps": args.gradient_accumulation_steps,
        "clip": args.max_grad_norm,
        "optimizer": {
            "class": type(trainer.innermost_optimizer()).__name__,
            "peak_learning_rate": groups[0]["initial_lr"],
            "betas": list(groups[0]["betas"]),
            "epsilon": groups[0]["eps"],
            "weight_decays": sorted({g["weight_decay"] for g in groups} | {0.0}),
        },
        "schedule": _schedule(trainer),
    }


def _schedule(trainer: Trainer) -> dict[str, Any]:
    scheduler: Any = trainer.lr_scheduler
    arguments = scheduler.lr_lambdas[0].keywords
    kept = ("num_warmup_steps", "num_training_steps", "num_decay_steps")
    known = {name: arguments[name] for name in kept if arguments.get(name) is not None}
    name = str(getattr(trainer.args.lr_scheduler_type, "value", trainer.args.lr_scheduler_type))
    if name == "warmup_stable_decay":
        known.pop("num_training_steps", None)
    return {"name": name, **known}
