"""Look at the first batches of a run before it trains on them: dtypes, shapes and ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shardwright.train.data.batches.collator import IGNORED
from shardwright.train.errors import UserError


def check(
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    sizes: Sequence[int],
    sequence_length: int,
    embedding_rows: int,
    logits: int,
) -> None:
    """Raise UserError where a model of this many rows and logits cannot be trained on them. Pure.

    ``sizes`` is how many samples each of them is to have. An id beyond the embedding would
    be an IndexError on a CPU and a crash of the whole device on a GPU, at whatever step first meets
    it.
    """
    for batch, size in zip(batches, sizes, strict=True):
        # Padded rows are as long as the longest sample among them.
        width = batch["input_ids"].shape[-1] if "attention_mask" in batch else sequence_length
        shape = (size, min(width, sequence_length))
        for name, tensor in batch.items():
            if tensor.dtype != torch.int64 or tuple(tensor.shape) != shape:
                raise UserError(
                    f"the first batch has {name} of dtype {_name(tensor.dtype)} and shape "
                    f"{tuple(tensor.shape)}, where int64 and {shape} are wanted "
                    "(trainer.micro_batch_size, data.sequence_length); prepare the data again "
                    "in another data.cache_dir"
                )
        _check_ids("input_ids", batch["input_ids"], embedding_rows, "the model's embedding", "rows")
        labels = batch["labels"][batch["labels"].ne(IGNORED)]
        _check_ids("labels", labels, logits, "the model's head", "logits")
        mask = batch.get("attention_mask")
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise UserError(
                "the first batch has an attention_mask of other values than 0 and 1; prepare "
                "the data again in another data.cache_dir"
            )


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
