"""What a run on an Apple GPU (launcher.device=mps) cannot honour."""

from __future__ import annotations

from collections.abc import Iterator

from shardwright.train.config.optimizers import OPTIMIZERS
from shardwright.train.config.sections import Sections

DTYPES = ("fp32", "bf16")
"""Loss scaling and fp8 were tried nowhere but on NVIDIA GPUs."""


def contradictions(config: Sections) -> Iterator[str]:
    """Yield a message for each value that an Apple GPU has no way for. Pure."""
    if config.launcher.device != "mps":
        return
    precision, trainer = config.precision, config.trainer
    if config.strategy.kind != "single":
        # torch 2.13, distributed_c10d.py: gloo's `backend_capability` is of cpu and cuda.
        yield (
            f"strategy.kind={config.strategy.kind} divides work among ranks, but "
            "launcher.device=mps is one Apple GPU, whose tensors none of torch's collectives "
            "moves; set strategy=single"
        )
    if precision.compute_dtype not in DTYPES:
        yield (
            f"precision.compute_dtype={precision.compute_dtype} needs an NVIDIA GPU, but "
            "launcher.device=mps; choose precision=bf16 or precision=fp32"
        )
    elif precision.fp8_recipe is not None:
        yield (
            f"precision.fp8_recipe={precision.fp8_recipe} needs an NVIDIA GPU, but "
            "launcher.device=mps; choose precision=bf16"
        )
    if precision.allow_tf32:
        yield (
            "precision.allow_tf32=true needs an NVIDIA GPU, but launcher.device=mps; choose "
            "precision=fp32"
        )
    if OPTIMIZERS[trainer.optimizer].quantises:
        yield (
            f"trainer.optimizer={trainer.optimizer} has kernels for CPUs and NVIDIA GPUs alone, "
            "but launcher.device=mps; set trainer.optimizer=adamw"
        )
    if trainer.compile is True:
        yield (
            "trainer.compile=true: torch 2.13 calls its compiler for Apple GPUs a prototype, and "
            "launcher.device=mps has no test with it; set trainer.compile=false"
        )
    if trainer.dataloader_workers not in (0, "auto"):
        yield (
            f"trainer.dataloader_workers={trainer.dataloader_workers}: a loader's processes learn "
            "who tells them to stop from Linux's kernel alone, but launcher.device=mps is a Mac; "
            "set trainer.dataloader_workers=0"
        )
    for name in ("micro_batch_size", "checkpoint_activations_every_blocks"):
        if getattr(trainer, name) == "auto":
            yield (
                f"trainer.{name}=auto: the plan knows no Apple GPU (launcher.device=mps); give a "
                "number"
            )
