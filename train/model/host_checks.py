"""What transformers asks of each batch on the device, for which the host would wait: answered here.

Both questions are about padding and documents, which the rank knows of what it has put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import masking_utils

if TYPE_CHECKING:
    from torch import Tensor, nn

_has_whole_rows = False
_asked = masking_utils.find_packed_sequence_indices


def _packed_sequence_indices(position_ids: Tensor) -> Tensor | None:
    return None if _has_whole_rows else _asked(position_ids)


def take_padding_as_known(model: nn.Module) -> None:
    """Have a model not look for padding in batches without a mask (5.23, PreTrainedModel): none is.

    It is there to warn people who forget the mask.
    """
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = _say_nothing  # type: ignore[assignment]


def _say_nothing(*batch: Any, **more: Any) -> None:
    pass


@contextmanager
def batches_have_documents(separate: bool) -> Iterator[None]:
    """Say whether positions begin anew within the rows of the batches inside of the block.

    Where they do not, nobody has to look whether they do (5.23, masking_utils).
    """
    global _has_whole_rows
    before, _has_whole_rows = _has_whole_rows, not separate
    masking_utils.find_packed_sequence_indices = _packed_sequence_indices
    try:
        yield
    finally:
        _has_whole_rows = before
        masking_utils.find_packed_sequence_indices = _asked
