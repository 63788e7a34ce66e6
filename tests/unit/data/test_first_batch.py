"""What a model cannot be trained on is refused before the first step, in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwright.train.data.batches.first_batch import check
from shardwright.train.errors import UserError


def batch(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = torch.arange(8).view(2, 4)
    sound = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    sound["labels"][0] = -100
    return {**sound, **changes}


def look(*batches: dict[str, Any], rows: int = 8, logits: int = 8) -> None:
    sizes = [2] * len(batches)
    check(batches, sizes=sizes, sequence_length=4, embedding_rows=rows, logits=logits)


def test_what_fits_passes() -> None:
    look(batch(), batch(labels=torch.full((2, 4), -100)))
    look({name: tensor for name, tensor in batch().items() if name != "attention_mask"})


def test_samples_laid_end_to_end_pass_as_far_as_they_can_be_long() -> None:
    ids = torch.arange(7)[None]
    told: dict[str, Any] = {
        "input_ids": ids,
        "labels": ids,
        "position_ids": ids,
        "document_groups": (ids,),
    }
    look(told)
    with pytest.raises(UserError, match=r"shape \(1, 9\), where int64 and \(1, 8\) are wanted"):
        look({name: torch.zeros(1, 9).long() for name in ("input_ids", "labels", "position_ids")})


IDS = torch.arange(8).view(2, 4)


@pytest.mark.parametrize(
    ("found", "sizes", "message"),
    [
        (
            batch(),
            {"rows": 7},
            r"the first batch has the token id 7 in input_ids, and the model's embedding has 7 rows"
            r" \(ids 0 to 6\); choose the tokenizer that belongs to the model",
        ),
        (batch(), {"logits": 7}, r"token id 7 in labels, and the model's head has 7 logits"),
        (batch(input_ids=IDS - 1), {}, r"the token id -1 in input_ids"),
        (batch(labels=IDS - 2), {}, r"the token id -2 in labels"),
        (
            batch(input_ids=IDS.int()),
            {},
            r"has input_ids of dtype int32 and shape \(2, 4\), where int64 and \(2, 4\) are wanted",
        ),
        (batch(labels=IDS.view(4, 2)), {}, r"has labels of dtype int64 and shape \(4, 2\), where"),
        (batch(attention_mask=IDS), {}, r"an attention_mask of other values than 0 and 1"),
    ],
)
def test_what_does_not_is_named(
    found: dict[str, torch.Tensor], sizes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        look(batch(), found, **({"rows": 8, "logits": 8} | sizes))
