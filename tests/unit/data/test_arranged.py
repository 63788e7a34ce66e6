"""What is looked at of token stores, to say how their documents are packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shardwright.train.data import arranged
from shardwright.train.data.tokens.store import StoreWriter, TokenStore


def store_of(directory: Path, tokens: list[int], ends: list[int]) -> TokenStore:
    with StoreWriter(
        directory, "train-0", vocabulary_size=100, words=False, lines=False, documents=bool(ends)
    ) as writer:
        writer.append(tokens, [], ends)
    return TokenStore(directory, "train-0")


@pytest.mark.parametrize("are_kept", [True, False])
def test_ends_of_documents_are_found_by_where_they_are_kept_or_by_what_ends_them(
    are_kept: bool, tmp_path: Path
) -> None:
    store = store_of(tmp_path, [5, 6, 1, 2, 7, 1, 2, 1, 2], [4, 7, 9] if are_kept else [])
    found = [int(end) for part in arranged._ends(store, (1, 2)) for end in part]
    assert found == [4, 7, 9]


def test_what_is_read_of_a_store_is_not_mapped(tmp_path: Path) -> None:
    """A mapped page that was looked at counts as memory of the process that looked."""
    store = store_of(tmp_path, list(range(50)), [50])
    part = arranged._read(store.tokens, 10, 5)
    assert part.tolist() == [10, 11, 12, 13, 14]
    assert not isinstance(part, np.memmap)
    assert part.base is None
    assert arranged._read(store.tokens, 48, 5).tolist() == [48, 49]
    (tmp_path / "none").mkdir()
    assert len(arranged._read(store_of(tmp_path / "none", [], []).tokens, 0, 5)) == 0
