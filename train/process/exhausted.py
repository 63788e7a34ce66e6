"""What to do where a machine ran out of memory or disk: no traceback says it. Imports no torch."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardwright.train.config import RunConfig
from shardwright.train.run_directory.choice import Choice

_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
ROOM_OF_A_RUN = (
    "free some space, keep fewer checkpoints (checkpoint.keep_last, trainer.save_every_steps), "
    "and resume the run"
)
# How libraries in other languages word what the system told them; torch 2.13's allocator of host
# memory raises a RuntimeError.
_FULL_TEXTS = {"No space left on device": errno.ENOSPC, "Disk quota exceeded": errno.EDQUOT}
_HOST_MEMORY_TEXTS = ("DefaultCPUAllocator", "Cannot allocate memory", "not enough memory")


def explained(
    error: BaseException,
    config: RunConfig | None = None,
    remedies: Sequence[str] = (),
    room: str = ROOM_OF_A_RUN,
) -> str | None:
    """Return what has run out, and what needs less of it; None where nothing has. Pure.

    Of memory that follows from the run's ``config``, or is ``remedies`` where there is none;
    ``room`` says what helps where a disk is full.
    """
    if getattr(error, "is_of_disk", False):
        return str(error)  # a save that has said it all
    for cause in _chain(error):
        if full := _full_disk(cause, room):
            return full
        if (on_gpu := _is_of_gpu(cause)) is None:
            continue
        what = "the GPU's memory" if on_gpu else "host memory"
        said = str(cause).strip().splitlines()
        wanted = smaller(config, on_gpu=on_gpu) if config is not None else remedies
        return "\n".join(
            [
                f"{what} has run out" + (f": {said[0]}" if said else ""),
                *([f"less is needed with {', or '.join(wanted)}"] if wanted else []),
            ]
        )
    return None


def is_of_gpu(error: BaseException) -> bool | None:
    """Whether a GPU's memory has run out, or the host's; None where neither has. Pure."""
    found = (_is_of_gpu(cause) for cause in _chain(error))
    return next((each for each in found if each is not None), None)


def _is_of_gpu(cause: BaseException) -> bool | None:
    if type(cause).__name__ == "OutOfMemoryError":  # torch's, of the device
        return True
    return False if isinstance(cause, MemoryError) or _is_of_host_memory(cause) else None


@dataclass(frozen=True)
class Taken:
    """Bytes that a rank has had at the most when memory ran out."""

    resident: int | None
    """Of the host."""
    allocated: int | None = None
    """Of its GPU, in tensors."""
    reserved: int | None = None
    """What the GPU's allocator took for them."""


def beside_the_plan(choice: Choice, taken: Taken, command: str, *, on_gpu: bool) -> str:
    """Return what was planned of a choice and what it took, and what to choose instead. Pure.

    ``command`` is what resumes the run. Ranks on CPUs have their tensors in host memory.
    """
    has_gpu = taken.allocated is not None

    def planned(device: int, host: int) -> str:
        if has_gpu and on_gpu:
            return f"{gib(device)} in tensors of a GPU"
        return f"{gib(host if has_gpu else device + host)} in tensors of a rank in host memory"

    was = "what a rank had is not known"
    if has_gpu and on_gpu:
        reserved = f", {gib(taken.reserved)} with what is reserved" if taken.reserved else ""
        was = f"it had {gib(taken.allocated or 0)}{reserved}"
    elif taken.resident is not None:
        was = f"the rank had {gib(taken.resident)} with its libraries"
    lines = [
        f"the plan that chose {' '.join(choice.words)} expected "
        f"{planned(choice.device_bytes, choice.host_bytes)}; {was}"
    ]
    if choice.smaller:
        expected = planned(choice.smaller_device_bytes, choice.smaller_host_bytes)
        lines.append(f"the next smaller choice, {expected}:")
        lines.append(f"  {command} {' '.join(choice.smaller)}")
    return "\n".join(lines)


def gib(size_bytes: int) -> str:
    """Return bytes as plans have them."""
    if size_bytes < 2**27:
        return f"{size_bytes / 2**20:,.0f} MiB"
    return f"{size_bytes / 2**30:,.1f} GiB"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _full_disk(error: BaseException, room: str) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    for text, meant in _FULL_TEXTS.items():
        if number is None and text in str(error):
            number = meant
    if number not in _FULL:
        return None
    place = getattr(error, "filename", None)
    where = f" where {place} is to be written" if place else f" ({str(error).splitlines()[0]})"
    return f"{_FULL[number]}{where}; {room}"


def _is_of_host_memory(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in _HOST_MEMORY_TEXTS
    )


def smaller(config: RunConfig, *, on_gpu: bool) -> list[str]:
    """Return what needs less memory, the cheapest first, of what is not yet chosen. Pure."""
    found: list[str] = []
    trainer, strategy, ranks = config.trainer, config.strategy, config.launcher.world_size
    if not on_gpu and trainer.dataloader_workers not in (0, "auto"):
        found.append(f"fewer trainer.dataloader_workers (now {trainer.dataloader_workers})")
    micro = trainer.micro_batch_size
    if isinstance(micro, int) and micro > 1:
        found.append(
            f"trainer.micro_batch_size={micro // 2} instead of {micro}, for the same batch"
        )
    if trainer.checkpoint_activations_every_blocks is None:
        found.append("trainer.checkpoint_activations_every_blocks=1")
    elif trainer.recompute == "selective":
        found.append("trainer.recompute=full")
    if on_gpu and not trainer.offload_activations:
        found.append("trainer.offload_activations=true")
    if config.precision.compute_dtype == "fp32" and on_gpu:
        found.append("precision=bf16")
    placement = strategy.placement
    if not placement["weights"].is_divided and ranks > 1:
        found.append("strategy=fsdp or zero3, which divide the model among ranks")
    elif ranks > 1:
        found.append("more ranks on other nodes")
    if on_gpu:
        if placement["moments"].offload == "none":
            found.append("strategy=zero2_offload, which keeps the optimizer in host memory")
    elif config.launcher.device == "cuda" and (
        getattr(strategy, "offload", False) or getattr(strategy, "offload_optimizer", "") == "cpu"
    ):
        found.append("a strategy that offloads less")
    return [*found, "a smaller model, or a shorter data.sequence_length, in a new run"]
