"""Recompute the activations of transformer blocks in the backward pass instead of keeping them.

The same for every engine: the blocks' own switch in transformers, and torch's non-reentrant
checkpointing behind it. No module is wrapped, so that no parameter's name changes. DeepSpeed's own
checkpointing adds only what model parallelism needs and a copy to host memory, which fails on a CPU
(deepspeed 0.19 empties the block's input, of which it has made no copy there).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from shardwright.train.errors import UserError
from shardwright.train.model import selective
from shardwright.train.model.host_copies import HostCopies

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def recompute(forward: Callable[..., Any], *inputs: Any) -> Any:
    """Run a block and keep only its inputs; dropout repeats its masks when it runs again."""
    return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=True)


def recompute_cheap_parts(forward: Callable[..., Any], *inputs: Any) -> Any:
    """As `recompute`, and keep what products of matrices and attention give."""
    is_compiling = torch.compiler.is_compiling()
    return checkpoint(
        forward,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=True,
        context_fn=selective.contexts_to_compile if is_compiling else selective.contexts,
    )


RECOMPUTE: dict[str, Callable[..., Any]] = {
    "full": recompute,
    "selective": recompute_cheap_parts,
}
"""By the names of trainer.recompute."""


class FromHost:
    """As one of RECOMPUTE, with the inputs of blocks kept in host memory."""

    def __init__(self, function: Callable[..., Any], copies: HostCopies) -> None:
        self.function, self._copies = function, copies

    def __call__(self, forward: Callable[..., Any], *inputs: Any) -> Any:
        with self._copies.hooks():
            return self.function(forward, *inputs)


def enable(
    model: PreTrainedModel, every_blocks: int, *, offload: bool, parts: str = "full"
) -> None:
    """Let blocks 0, n, 2n and so on recompute their activations; ``parts`` is trainer.recompute.

    Raises UserError where the architecture does not support it, or has fewer blocks than n.
    """
    from shardwright.train.model.blocks import blocks

    field = f"trainer.checkpoint_activations_every_blocks={every_blocks}"
    found = blocks(model)
    if not (
        model.supports_gradient_checkpointing
        and all(isinstance(block, GradientCheckpointingLayer) for block in found)
    ):
        raise UserError(
            f"{field}: {type(model).__name__} does not support it; "
            "set it to null and lower trainer.micro_batch_size to save memory"
        )
    if every_blocks > len(found):
        raise UserError(
            f"{field} is more than the {len(found)} blocks of {type(model).__name__}; "
            f"set it to at most {len(found)}"
        )
    function: Any = RECOMPUTE[parts]
    if offload:
        function = FromHost(function, HostCopies())
    for block in found[::every_blocks]:
        block.gradient_checkpointing = True  # type: ignore[assignment]
        block._gradient_checkpointing_func = function


def read_back(model: PreTrainedModel) -> dict[str, Any]:
    """Return facts read off the live blocks."""
    from shardwright.train.model.blocks import blocks

    switched = [b for b in blocks(model) if getattr(b, "gradient_checkpointing", False)]
    functions = [getattr(block, "_gradient_checkpointing_func", None) for block in switched]
    return {
        "checkpoint_activations_every_blocks": every_blocks(
            [block in switched for block in blocks(model)]
        ),
        "recomputed_blocks": len(switched),
        "recompute": _parts(functions),
        "offload_activations": any(isinstance(function, FromHost) for function in functions),
    }


def _parts(functions: list[Any]) -> str | None:
    """Return which of RECOMPUTE they all are; None where there is none, or another."""
    inner = {f.function if isinstance(f, FromHost) else f for f in functions}
    found = [name for name, function in RECOMPUTE.items() if inner == {function}]
    return found[0] if found else None


def every_blocks(recomputed: list[bool]) -> int | str | None:
    """Return the n of "every n-th block" that gives this pattern: None where no block recomputes,
    and a list of the blocks in words where the pattern is no such thing. Pure.
    """
    if not any(recomputed):
        return None
    for n in range(1, len(recomputed) + 1):
        if recomputed == [i % n == 0 for i in range(len(recomputed))]:
            return n
    return f"only blocks {[i for i, flag in enumerate(recomputed) if flag]}"
