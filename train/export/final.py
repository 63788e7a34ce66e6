"""final/: stream whole fp32 weights, the last or the best, into a Hugging Face model directory."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from shardwright.train.checkpoint.discovery import best_whole
from shardwright.train.checkpoint.format import damage
from shardwright.train.checkpoint.format import outputs as format_outputs
from shardwright.train.checkpoint.format.layout import read_manifest, step_of
from shardwright.train.checkpoint.format.lazy import LazyTensor
from shardwright.train.checkpoint.read import merged, portable
from shardwright.train.console import progress
from shardwright.train.durable import begin_directory, publish_directory, temporary_of
from shardwright.train.export import adapter_files, parts
from shardwright.train.export import safetensors as whole
from shardwright.train.export.card import README, Card, average_in_words
from shardwright.train.model import adapter, adapter_base, origin
from shardwright.train.model.conversion import CannotTrace, placed
from shardwright.train.model.directory import (
    CONFIG,
    WrongWeights,
    check_loads,
    write_beside_weights,
    writers,
)
from shardwright.train.model.pretrained import auto_class_of
from shardwright.train.process.agreement import (
    check,
    from_all_patiently,
    patiently,
    together,
)
from shardwright.train.run_directory.names import (
    ADAPTER_FOLDER,
    CHECKPOINTS,
    FINAL,
    MODEL_FOLDER,
)

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
    """Write RUN_DIR/final and return its path. Collective.

    The weights are those of ``checkpoint``, or of the live engine where there is none. Each rank
    writes its own part of them, a slice at a time, and waits until that is on the disk; the first
    one then adds the rest and gives the whole its name. No rank waits for another's disk in a
    collective.

    What cannot be written beside the weights is left out, and ``say`` hears of it on the first
    rank. Raises, on all ranks alike, Stop where a rank was told to before the last tensor is there,
    FloatingPointError where a weight is not finite, and WrongWeights where `from_pretrained` would
    not find exactly the weights it looks for; final/ is not made then. Raises RuntimeError where it
    holds the weights but does not load for another reason.
    """
    final = trainer.run_dir / FINAL
    try:
        with patiently():
            plan = _begin(trainer, final, max_shard_bytes)
        check()
        plan = _of_first(plan)
        writer = _write_tensors(trainer, plan, checkpoint, temporary_of(final))
        with patiently(), progress.phase(f"completing {FINAL}/", comes_again=True):
            if trainer.is_world_process_zero():
                writer.check_sizes()
                _complete(trainer, card, final, checkpoint, say)
    except BaseException:
        if trainer.is_world_process_zero():
            shutil.rmtree(temporary_of(final), ignore_errors=True)
        raise
    return final


def _complete(
    trainer: Trainer,
    card: Callable[[], Card],
    final: Path,
    checkpoint: Path | None,
    say: Callable[[str], object],
) -> None:
    """Add to the weights what belongs beside them, and give the directory its name if it loads."""
    directory = temporary_of(final)
    failed = _write_beside_weights(trainer, card, directory)
    if getattr(trainer.config.adapter, "export", None) == "both":
        adapter_files.write(directory / ADAPTER_FOLDER, _adapters_checkpoint(trainer, checkpoint))
    trainer.engine.release()
    if CONFIG not in failed:
        with progress.phase(f"checking that {FINAL}/ loads", comes_again=True):
            _check_loads(trainer, directory, failed)
    publish_directory(final)
    for what, reason in failed.items():
        say(f"warning: {final} is without {what}: {damage.in_one_line(reason)}")
    if lost := [what for what in (CONFIG, _LOADING) if what in failed]:
        raise RuntimeError(
            f"{final} holds the whole weights, but does not load: {lost[0]} failed "
            f"({damage.in_one_line(failed[lost[0]])})"
        )


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
    auto_class = auto_class_of(trainer.config.objective)
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
    if (
        rule.export != "best"
        and trainer.is_world_process_zero()
        and (rule.export == "average" or exports_average(trainer))
    ):
        progress.write(_said_of_average(trainer), console)
    if rule.export != "best":
        return None
    best, passed_over = best_whole(
        trainer.run_dir / CHECKPOINTS, rule, gather=from_all_patiently, share=place
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


def _said_of_average(trainer: Trainer) -> str:
    """Return what is said where final/ is to get the average of the weights."""
    if exports_average(trainer):
        return f"final/ gets {of_average(trainer)}"
    return (
        "warning: the average of the weights begins at step "
        f"{trainer.config.trainer.first_averaged_step} and the run has ended at "
        f"{trainer.state.global_step}; final/ gets the last weights"
    )


def of_average(trainer: Trainer) -> str:
    """Return what the average of the weights is, in words."""
    assert trainer.average is not None
    return average_in_words(trainer.average.kind, trainer.average.taken)


def _begin(trainer: Trainer, final: Path, max_shard_bytes: int) -> whole.Plan | None:
    """On the first rank, make the files of the weights in their full size; return what they are."""
    if not trainer.is_world_process_zero():
        return None
    plan = _planned(trainer, max_shard_bytes)
    directory = begin_directory(final)
    whole.Writer(directory, plan).flush()
    return plan


def _planned(trainer: Trainer, max_shard_bytes: int) -> whole.Plan:
    """Return the files of fp32 parameters, tied ones once, and persistent buffers as they are."""
    model = adapter.bare(trainer.model)
    # ZeRO-3 leaves an empty tensor in place of a parameter and the whole shape beside it.
    shapes = {n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters()}
    outputs = [
        *(format_outputs.Output(name, shape, torch.float32) for name, shape in shapes.items()),
        *(format_outputs.Output(n, tuple(b.shape), b.dtype) for n, b in _buffers(model).items()),
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
    return whole.plan(outputs, max_shard_bytes, places)


def _buffers(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys() - dict(model.named_parameters()).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def _of_first(plan: whole.Plan | None) -> whole.Plan:
    """Return on every rank what the first one has planned. Collective."""
    found = [plan]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    assert found[0] is not None
    return found[0]


def _write_tensors(
    trainer: Trainer, plan: whole.Plan, checkpoint: Path | None, directory: Path
) -> whole.Writer:
    """Write this rank's part of the weights, and return once every rank's is on the disk."""
    writer = whole.Writer(directory, plan, makes_files=False)
    place = trainer.args.process_index, trainer.args.world_size
    total_bytes = plan.tensor_bytes // place[1]
    with (
        progress.phase(f"writing {FINAL}/", total=total_bytes, unit="B", comes_again=True) as shown,
        _not_writing_what_is_not_finite(),
        patiently() if parts.travel(trainer) else together() as others,
    ):

        def advance(written_bytes: int) -> None:
            others.look()
            shown.advance(written_bytes)

        if not trainer.config.adapter.trains_all:
            checkpoint = _adapters_checkpoint(trainer, checkpoint)
        if checkpoint is not None:
            found = _saved(trainer, checkpoint)
            whole.stream(found, writer, _BUDGET, advance, place)
        else:
            parts.write(trainer, _own(trainer), writer, others, advance)
        if place[0] == 0:
            for name, buffer in _buffers(trainer.model).items():
                writer.write(merged.whole(name) or name, buffer.cpu())
        writer.flush()
    check()
    return writer


def _saved(trainer: Trainer, checkpoint: Path) -> dict[str, LazyTensor]:
    """Return the weights of a checkpoint that final/ gets, by the names of the model there."""
    manifest = read_manifest(checkpoint)
    state = adapter_base.completed(
        portable.read(checkpoint),
        manifest,
        trainer.model,
        checkpoint,
        checks=trainer.is_world_process_zero(),
    )
    if (of_adapter := manifest.adapter) is not None:
        state = merged.merged(state, of_adapter)
    weights = state.ema if exports_average(trainer) else state.weights
    names = (merged.whole(name) for name, _ in trainer.model.named_parameters())
    return {name: weights[name] for name in names if name is not None}


def _adapters_checkpoint(trainer: Trainer, checkpoint: Path | None) -> Path:
    """Return the checkpoint out of which an adapter is merged, where the best one is not asked for.

    That of the last step, which a run has written by then.
    """
    return checkpoint or trainer.run_dir / CHECKPOINTS / f"checkpoint-{trainer.state.global_step}"


def exports_average(trainer: Trainer) -> bool:
    """Return whether final/ gets the average of the weights."""
    average, rule = trainer.average, trainer.config.checkpoint.export
    if average is None or not average.taken:
        return False
    return average.replaces_weights or rule == "average"


def _own(trainer: Trainer) -> parts.Parts:
    """Return this rank's part of the weights that final/ gets, where they are in memory."""
    if exports_average(trainer):
        assert trainer.average is not None
        return trainer.average.own_weights()
    return trainer.engine.own_weights(trainer)


@contextmanager
def _not_writing_what_is_not_finite() -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(
            f"{error}; final/ is not written, the checkpoints remain"
        ) from None
