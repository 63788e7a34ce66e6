"""Recover in bounded memory, and see when the first bytes are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from shardwright.train.export import safetensors as whole


@contextmanager
def once_written(do: Callable[[], object]) -> Iterator[None]:
    """Have something happen when the weights are written and nothing has its name yet."""
    flush = whole.Writer.flush

    def then_flush(writer: whole.Writer) -> None:
        do()
        flush(writer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole.Writer, "flush", then_flush)
        yield


MAX_MEMORY = 2**26
