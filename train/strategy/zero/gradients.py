"""Where ZeRO keeps the gradients of a step that are reduced: this rank's part of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwright.train.strategy.zero.masters import Piece, flat_partitions, to_hold

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch


def before_update(engine: Any, act: Callable[[], object]) -> None:
    """Have ``act`` called where the gradients are reduced, and neither scaled back nor clipped.

    deepspeed 0.19 does all of that, the step and the zeroing in this method of its engine.
    """
    take_step = engine._take_model_step

    def measured(*arguments: Any, **options: Any) -> Any:
        act()
        return take_step(*arguments, **options)

    engine._take_model_step = measured


def own(engine: Any) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield this rank's part of the gradients, as `Engine.own_gradients` does, at stages 1 to 3."""
    zero = engine.optimizer
    named = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 3:
        for name, parameter in named.items():
            if parameter.requires_grad:
                *_, start, length = to_hold(name, parameter)
                # The last rank's part is padded to the length of the others.
                yield name, start, zero.get_local_fp32_grad_for_param(parameter)[:length]
        return
    names = {parameter: name for name, parameter in named.items()}
    for index, (flat, pieces) in enumerate(flat_partitions(engine, names)):
        yield from cut(_parts(zero, index, flat), pieces)


def _parts(zero: Any, index: int, flat: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the gradient of a flat partition, in consecutive tensors."""
    if hasattr(zero, "fp32_groups_gradient_flat_partition"):  # stage 1 in bf16
        return [zero.fp32_groups_gradient_flat_partition[index]]
    if zero.cpu_offload:
        assert flat.grad is not None
        return [flat.grad]
    averaged: Sequence[torch.Tensor] = zero.averaged_gradients[index]
    return averaged


def cut(
    parts: Sequence[torch.Tensor], pieces: Sequence[Piece]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield the pieces of what consecutive tensors hold together. Pure."""
    at, ends = 0, []
    for part in parts:
        at += part.numel()
        ends.append(at)
    number = 0
    for name, start, length, place in pieces:
        done = 0
        while done < length:
            while ends[number] <= place + done:
                number += 1
            part = parts[number].view(-1)
            within = place + done - (ends[number] - part.numel())
            taken = min(length - done, part.numel() - within)
            yield name, start + done, part[within : within + taken]
            done += taken
