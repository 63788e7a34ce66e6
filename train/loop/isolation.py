"""Prove on the live engine that a document does not see another: change some, and read the rest."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shardwright.train.model.document_attention import bounds_of, is_compiled, kernel_in_use
from shardwright.train.strategy.verify import EngineMismatch

if TYPE_CHECKING:
    from shardwright.train.loop.trainer import Trainer

LENGTHS = np.array([8, 4, 4, 8, 4, 4])
"""Tokens of the documents that are looked at: no longer than any run's may be, not all beginning in
step, and of as many in all as products in fp8 take. A pass over them costs less than any step."""
TOLERANCE = 1e-5
"""Of what its own change does to a document: far above rounding, which is none where nothing that
goes into a logit has changed, and far below the weight of one token among so few."""


def check(trainer: Trainer) -> dict[str, Any]:
    """Return by how much logits of documents change with others, at most, as a share of their own.

    Collective, and leaves the engine and its random numbers as they are. Raises EngineMismatch
    where documents see each other. The share is None where the model is not told of documents, or
    computes with scales that are one number for all of a batch.
    """
    bounds = bounds_of(trainer.model, trainer.config)
    if bounds is None or trainer.config.precision.scales_whole_tensors:
        return {"seen_of_other_documents": None}
    number = torch.from_numpy(np.repeat(np.arange(len(LENGTHS)), LENGTHS))
    embedding: Any = trainer.model.get_input_embeddings()
    ids = torch.arange(len(number)) % embedding.num_embeddings
    others = (ids + embedding.num_embeddings // 2) % embedding.num_embeddings
    arguments = bounds.of(LENGTHS, (1, len(number)))

    # Each second document changes, once those and once the rest: one is seen from both sides.
    changes = [number % 2 == side for side in (0, 1)]
    first, *changed = _logits(
        trainer, [ids, *(torch.where(change, others, ids) for change in changes)], arguments
    )
    seen = 0.0
    for logits, change in zip(changed, changes, strict=True):
        moved = (logits - first).abs().amax(-1)
        seen = max(seen, float(moved[~change].max() / moved[change].max()))
    if not seen <= TOLERANCE:
        field = "unpad" if trainer.config.data.line_by_line else "document_attention"
        kernel, _ = kernel_in_use(trainer.model)
        raise EngineMismatch(
            f"data.{field}=true is not what is running: where one document changes, others change "
            f"{seen:.2g} times as much ({kernel} attention of {type(trainer.model).__name__}); "
            f"nothing was trained. Set data.{field}=false, or choose another model.attention"
        )
    return {"seen_of_other_documents": seen}


def _logits(
    trainer: Trainer, inputs: list[torch.Tensor], arguments: dict[str, Any]
) -> list[torch.Tensor]:
    """Return the logits of each input, shape (tokens, vocabulary), as an evaluation has them."""
    model, found = trainer.model_wrapped, []
    # What is compiled for this shape would serve nothing else.
    eager = torch.compiler.set_stance("force_eager") if is_compiled(trainer.model) else None
    model.eval()
    try:
        with torch.no_grad(), eager or nullcontext():
            for ids in inputs:
                batch = trainer._prepare_inputs({"input_ids": ids[None], **arguments})
                found.append(model(**batch).logits[0].float())
    finally:
        model.train()
        trainer.engine.after_evaluation(trainer)
    return found
