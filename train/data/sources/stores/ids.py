"""Token ids in pieces, as texts are: a document, or a part of a long one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

PIECE_IDS = 2**16


class Ids(NamedTuple):
    """A document, or one piece of a long one."""

    ids: NDArray[np.integer]
    begins: bool = True
    ends: bool = True


def in_pieces(ids: NDArray[np.integer]) -> Iterator[Ids]:
    """Yield a document, a long one in pieces: it may be mapped, and longer than memory."""
    for start in range(0, max(1, len(ids)), PIECE_IDS):
        end = start + PIECE_IDS
        yield Ids(ids[start:end], begins=start == 0, ends=end >= len(ids))


def split(ids: NDArray[np.integer], separator: int | None) -> Iterator[Ids]:
    """Yield the documents of ids that are told where they end by an id, which is their last."""
    begins = True
    for start in range(0, len(ids), PIECE_IDS):
        piece = ids[start : start + PIECE_IDS]
        cuts = [] if separator is None else (np.flatnonzero(piece == separator) + 1).tolist()
        at = 0
        for cut in cuts:
            yield Ids(piece[at:cut], begins, ends=True)
            at, begins = cut, True
        if at < len(piece):
            is_last = start + PIECE_IDS >= len(ids)
            yield Ids(piece[at:], begins, ends=is_last)
            begins = is_last
