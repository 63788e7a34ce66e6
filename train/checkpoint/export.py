"""final/: stream whole fp32 weights, the last or the best, into a Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from train import stop
from train.checkpoint import portable
from train.checkpoint.discovery import best_whole
from train.checkpoint.layout import atomic_directory, read_manifest, step_of
from train.rank import from_all
from train.strategy import engine_of

if TYPE_CHECKING:
    from train.trainer import Trainer

MAX_SHARD_BYTES = 5 * 10**9


def export(
    trainer: Trainer,
    card: str,
    checkpoint: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write RUN_DIR/final and return its path. Collective; rank 0 writes.

    The weights are those of ``checkpoint``, or of the live engine where there is none.

    Raises Stop where a rank was told to before the last tensor is there; final/ is not made then.

    Rank 0 holds one shard of at most ``max_shard_bytes`` (or one tensor, where that is larger) in
    memory at a time. Raises FloatingPointError where a weight is not finite, and RuntimeError where
    `from_pretrained` would not find exactly the weights it looks for; final/ is not made then.
    """
    final = trainer.run_dir / "final"
    tensors = _whole_tensors(trainer, checkpoint)
    if trainer.is_world_process_zero():
        with atomic_directory(final) as directory:
            _write_shards(tensors, directory, max_shard_bytes)
            config = trainer.model.config
            config.architectures = [_architecture(trainer.model)]
            config.dtype = torch.float32
            # transformers switches the cache off for training; who samples wants it.
            config.use_cache = True
            config.save_pretrained(directory)
            if trainer.model.can_generate() and trainer.model.generation_config is not None:
                trainer.model.generation_config.save_pretrained(directory)
            assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
            trainer.processing_class.save_pretrained(directory)
            (directory / "README.md").write_text(card, encoding="utf-8")
            engine_of(trainer.config).release()
            check_loads(directory, causal=trainer.config.objective.kind == "clm")
    else:
        for _ in tensors:
            pass
    if dist.is_initialized():
        dist.barrier()
    return final


def best_checkpoint(trainer: Trainer, console: TextIO) -> Path | None:
    """Return the checkpoint whose weights final/ gets; None where that is the last step's.

    Collective; says on rank 0 what was chosen, and what was not and why.
    """
    rule, place = trainer.config.checkpoint, (trainer.args.process_index, trainer.args.world_size)
    if rule.export == "last":
        return None
    best, passed_over = best_whole(
        trainer.run_dir / "checkpoints", rule, gather=from_all, share=place
    )
    if best is None:
        text = "warning: no checkpoint that was evaluated is whole; final/ gets the last weights"
    else:
        value = read_manifest(best).metrics[rule.best_metric]
        text = (
            f"final/ gets the weights of {best.name}, the best by {rule.best_metric} ({value:.4f})"
        )
    if trainer.is_world_process_zero():
        print(*passed_over, text, sep="\n", file=console)
    is_last = best is not None and step_of(best) == trainer.state.global_step
    return None if is_last else best


def check_loads(directory: Path, *, causal: bool) -> None:
    """Let `from_pretrained` find every weight of the model, on the meta device.

    Raises RuntimeError naming the weights that are missing, unexpected or of another shape.
    """
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    loaded: Any = auto.from_pretrained(directory, device_map="meta", output_loading_info=True)
    _, info = loaded
    wrong = {k: sorted(map(str, v)) for k, v in info.items() if v and k != "error_msgs"}
    if wrong or info.get("error_msgs"):
        raise RuntimeError(f"{directory} does not load: {wrong or info['error_msgs']}")


def _architecture(model: PreTrainedModel) -> str:
    """Return the name of the model's class, without the one that `fully_shard` puts before it."""
    return next(c.__name__ for c in type(model).__mro__ if not c.__module__.startswith("torch."))


def _whole_tensors(
    trainer: Trainer, checkpoint: Path | None
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield fp32 parameters, tied ones once, then persistent buffers as they are."""
    names = set()
    for name, tensor in (
        engine_of(trainer.config).full_parameters(trainer)
        if checkpoint is None
        else _saved_parameters(trainer, checkpoint)
    ):
        stop.check()
        names.add(name)
        yield name, tensor
    saved = trainer.model.state_dict().keys()
    for name, buffer in trainer.model.named_buffers():
        if name in saved and name not in names:
            yield name, buffer.detach().cpu()


def _saved_parameters(
    trainer: Trainer, checkpoint: Path
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each parameter's name and, on rank 0, its fp32 master weight in a checkpoint."""
    is_first = trainer.is_world_process_zero()
    weights = portable.read(checkpoint).weights if is_first else {}
    for name, _ in trainer.model.named_parameters():
        yield name, weights[name].whole().float() if is_first else None


def _write_shards(
    tensors: Iterator[tuple[str, torch.Tensor | None]], directory: Path, max_shard_bytes: int
) -> None:
    files: list[Path] = []
    place: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    total_bytes = shard_bytes = 0

    def write() -> None:
        files.append(directory / f"part-{len(files)}")
        save_file(shard, files[-1], metadata={"format": "pt"})
        shard.clear()

    for name, tensor in tensors:
        assert tensor is not None
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"{name} holds NaN or infinity; final/ is not written, the checkpoints stand"
            )
        size = tensor.numel() * tensor.element_size()
        if shard and shard_bytes + size > max_shard_bytes:
            write()
            shard_bytes = 0
        place[name] = len(files)
        shard[name] = tensor.contiguous()
        shard_bytes += size
        total_bytes += size
    write()

    if len(files) == 1:
        files[0].rename(directory / "model.safetensors")
        return
    final_names = [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    for file, final_name in zip(files, final_names, strict=True):
        file.rename(directory / final_name)
    index: dict[str, Any] = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {name: final_names[i] for name, i in place.items()},
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
