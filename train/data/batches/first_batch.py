"""Look at the first batches of a run before it trains on them: dtypes, shapes and ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from shardwright.train.data.batches.collator import IGNORED
from shardwright.train.errors import UserError

OF_TOKENS = frozenset({"input_ids", "labels", "attention_mask", "position_ids"})
"""What a batch has of each token; it may have more, of documents."""
OF_TARGETS = frozenset({"decoder_input_ids", "labels"})
"""What it has of each token that a decoder writes, where an encoder reads others."""


def check(
    batches: Sequence[Mapping[str, Any]],
    *,
    sizes: Sequence[int],
    sequence_length: int,
    embedding_rows: int,
    logits: int,
    targets: int | None = None,
) -> None:
    """Raise UserError where a model of this many rows and logits cannot be trained on them. Pure.

    ``sizes`` is how many samples each of them is to have, ``targets`` how many tokens a decoder
    writes of each, where there is one. An id beyond the embedding would be an IndexError on a CPU
    and a crash of the whole device on a GPU, at whatever step first meets it.
    """
    for batch, size in zip(batches, sizes, strict=True):
        shape = _shape(batch, size, sequence_length)
        shapes = dict.fromkeys(OF_TOKENS, shape)
        if targets is not None:
            shapes |= dict.fromkeys(OF_TARGETS, (size, targets))
        for name in sorted(shapes.keys() & batch.keys()):
            tensor, shape = batch[name], shapes[name]
            if tensor.dtype != torch.int64 or tuple(tensor.shape) != shape:
                raise UserError(
                    f"the first batch has {name} of dtype {_name(tensor.dtype)} and shape "
                    f"{tuple(tensor.shape)}, where int64 and {shape} are wanted "
                    "(trainer.micro_batch_size, data.sequence_length); prepare the data again "
                    "in another data.cache_dir"
                )
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                of = (embedding_rows, "the model's embedding", "rows")
                _check_ids(name, batch[name], *of)
        labels = batch["labels"][batch["labels"].ne(IGNORED)]
        _check_ids("labels", labels, logits, "the model's head", "logits")
        mask = batch.get("attention_mask")
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise UserError(
                "the first batch has an attention_mask of other values than 0 and 1; prepare "
                "the data again in another data.cache_dir"
            )


def _shape(
    batch: Mapping[str, torch.Tensor], samples: int, sequence_length: int
) -> tuple[int, int]:
    """Return the shape that a batch is to have: of samples of different lengths, within bounds."""
    rows, width = batch["input_ids"].shape
    if "attention_mask" in batch:  # padded to the longest of them
        return samples, min(width, sequence_length)
    if "position_ids" in batch and rows == 1:  # laid end to end
        return 1, min(width, samples * sequence_length)
    return samples, sequence_length


def _check_ids(name: str, ids: torch.Tensor, count: int, what: str, unit: str) -> None:
    if not ids.numel():
        return
    lowest, highest = (int(value) for value in ids.aminmax())
    if lowest >= 0 and highest < count:
        return
    wrong = lowest if lowest < 0 else highest
    raise UserError(
        f"the first batch has the token id {wrong} in {name}, and {what} has {count:,} {unit} "
        f"(ids 0 to {count - 1:,}); choose the tokenizer that belongs to the model, or for a model "
        "from scratch a larger model.vocab_size"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
