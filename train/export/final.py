"""final/: stream whole fp32 weights, the last or the best, into a Hugging Face model directory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from shardwright.train.checkpoint.discovery import best_whole
from shardwright.train.checkpoint.format import damage
from shardwright.train.checkpoint.format import outputs as format_outputs
from shardwright.train.checkpoint.format.layout import read_manifest, step_of
from shardwright.train.checkpoint.read import portable
from shardwright.train.console import progress
from shardwright.train.durable import atomic_directory
from shardwright.train.export import safetensors as whole
from shardwright.train.export.card import README, Card
from shardwright.train.model import origin
from shardwright.train.model.conversion import CannotTrace, placed
from shardwright.train.model.directory import (
    CONFIG,
    WrongWeights,
    check_loads,
    write_beside_weights,
    writers,
)
from shardwright.train.process.agreement import check, from_all, together
from shardwright.train.run_directory.names import CHECKPOINTS, FINAL, MODEL_FOLDER

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer

logger = logging.getLogger(__name__)

_BUDGET = whole.budget(2**28, cores=4)
"""Other ranks may be on this node, each with its model."""


def export(
    trainer: Trainer,
    card: Callable[[], Card],
    checkpoint: Path | None = None,
    max_shard_bytes: int = whole.MAX_SHARD_BYTES,
    say: Callable[[str], object] = logger.warning,
) -> Path:
    """Write RUN_DIR/final and return its path. Collective; rank 0 writes.

    The weights are those of ``checkpoint``, or of the live engine where there is none.

    Rank 0 holds one whole tensor in memory at a time, or slices of a checkpoint's. What cannot be
    written beside the weights is left out, and ``say`` hears of it. Raises Stop where a rank was
    told to before the last tensor is there, FloatingPointError where a weight is not finite, and
    WrongWeights where `from_pretrained` would not find exactly the weights it looks for; final/ is
    not made then. Raises RuntimeError where it holds the weights but does not load for another
    reason.
    """
    final = trainer.run_dir / FINAL
    if trainer.is_world_process_zero():
        with atomic_directory(final) as directory:
            try:
                _write_tensors(trainer, checkpoint, directory, max_shard_bytes)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"{error}; final/ is not written, the checkpoints remain"
                ) from None
            failed = _write_beside_weights(trainer, card, directory)
            trainer.engine.release()
            if CONFIG not in failed:
                with progress.phase(f"checking that {FINAL}/ loads", comes_again=True):
                    _check_loads(trainer, directory, failed)
        for what, reason in failed.items():
            say(f"warning: {final} is without {what}: {damage.in_one_line(reason)}")
        if lost := [what for what in (CONFIG, _LOADING) if what in failed]:
            raise RuntimeError(
                f"{final} holds the whole weights, but does not load: {lost[0]} failed "
                f"({damage.in_one_line(failed[lost[0]])})"
            )
    elif checkpoint is None:
        for _ in _live_tensors(trainer):
            pass
    else:
        with together():
            pass
    if dist.is_initialized():
        dist.barrier()
    return final


_LOADING = "a check that `from_pretrained` loads it"


def _write_beside_weights(
    trainer: Trainer, card: Callable[[], Card], directory: Path
) -> dict[str, Exception]:
    """Write all but the weights; return what could not be, by what it is."""
    assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)
    code = origin.code_in(trainer.run_dir / MODEL_FOLDER)
    return write_beside_weights(
        directory,
        {
            **writers(trainer.model, trainer.processing_class, code),
            README: lambda apart: card().write(apart),
        },
    )


def _check_loads(trainer: Trainer, directory: Path, failed: dict[str, Exception]) -> None:
    causal = trainer.config.objective.kind == "clm"
    auto_class = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    try:
        check_loads(directory, auto_class, trusts_code=trainer.config.model.trusts_code)
    except WrongWeights:
        raise
    except Exception as error:  # of a library, or of the model's own code
        failed[_LOADING] = error


def best_checkpoint(trainer: Trainer, console: TextIO) -> Path | None:
    """Return the checkpoint whose weights final/ gets; None where that is the last step's.

    Collective; says on rank 0 what was chosen, and what was not and why.
    """
    rule, place = trainer.config.checkpoint, (trainer.args.process_index, trainer.args.world_size)
    if rule.export == "last":
        return None
    best, passed_over = best_whole(
        trainer.run_dir / CHECKPOINTS, rule, gather=from_all, share=place
    )
    if best is None:
        text = "warning: no checkpoint that was evaluated is whole; final/ gets the last weights"
    else:
        value = read_manifest(best).metrics[rule.best_metric]
        text = (
            f"final/ gets the weights of {best.name}, the best by {rule.best_metric} ({value:.4f})"
        )
    if trainer.is_world_process_zero():
        progress.write("\n".join(map(str, [*passed_over, text])), console)
    is_last = best is not None and step_of(best) == trainer.state.global_step
    return None if is_last else best


def _live_tensors(trainer: Trainer) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Yield each parameter's name and, on rank 0, its whole fp32 value. Collective; raises Stop."""
    for found in trainer.engine.full_parameters(trainer):
        check()
        yield found


def _write_tensors(
    trainer: Trainer, checkpoint: Path | None, directory: Path, max_shard_bytes: int
) -> None:
    """Write fp32 parameters, tied ones once, then persistent buffers as they are."""
    model = trainer.model
    parameters = dict(model.named_parameters())
    saved = model.state_dict().keys() - parameters.keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    # ZeRO-3 leaves an empty tensor in place of a parameter and the whole shape beside it.
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in parameters.items()}
    outputs = [
        *(format_outputs.Output(name, shape, torch.float32) for name, shape in shapes.items()),
        *(format_outputs.Output(name, tuple(b.shape), b.dtype) for name, b in buffers.items()),
    ]
    places: dict[str, tuple[format_outputs.Place, ...]] = {}
    try:
        outputs, places = placed(model, outputs)
    except CannotTrace as error:
        logger.warning(
            "transformers saves this architecture in another form, which cannot be streamed (%s): "
            "final/ has the names of the model in memory, which other versions may not know",
            error,
        )
    plan = whole.plan(outputs, max_shard_bytes, places)
    writer = whole.Writer(directory, plan)
    with progress.phase(
        f"writing {FINAL}/", total=plan.tensor_bytes, unit="B", comes_again=True
    ) as shown:
        _write_to(writer, trainer, checkpoint, parameters, buffers, shown.advance)


def _write_to(
    writer: whole.Writer,
    trainer: Trainer,
    checkpoint: Path | None,
    parameters: Collection[str],
    buffers: Mapping[str, torch.Tensor],
    advance: Callable[[int], object],
) -> None:
    if checkpoint is not None:
        weights = portable.read(checkpoint).weights
        with together():
            whole.stream({name: weights[name] for name in parameters}, writer, _BUDGET, advance)
    else:
        for name, tensor in _live_tensors(trainer):
            assert tensor is not None
            writer.write(name, tensor)
            advance(tensor.nbytes)
    for name, buffer in buffers.items():
        writer.write(name, buffer.cpu())
    writer.flush()
